// The binding of linear: y = x W^T + bias + scale * (D(x) A^T) B^T, group by group.
#include "qlora/panels.h"
#include "qlora/small_products.h"

namespace peftkern::qlora {
namespace {

// In bf16, tiles still multiply in float: at 4096 x 4096, 16 rows take 2.1 ms so and 2.8 ms by
// panels, 24 rows 3.0 and 2.9.
constexpr int64_t kMostTilesBf16 = 16;

// The most rows of one expert that are multiplied without decoding the weight into memory.
int64_t most_rows_without_panels(const Problem& p) {
  if (p.base.is_dense() || p.sums != ScalarType::Float) return 0;
  if (!kernels().serves_few_rows(p.base.codes)) return 0;
  return p.product == ScalarType::BFloat16 ? kMostTilesBf16 : kernels().most_tiles;
}

// down = D(x) A^T for one run, into rows of `down` [inputs, rank].
void down_of(const Problem& p, const Run& run, const Matrix& down) {
  if (run.adapter < 0) return;
  Scratch scratch;
  const Matrix a = as_dtype(p.a_of(run.adapter), p.sums, scratch);
  for_row_tiles(p, p.x, run.begin, run.end, true, [&](const Matrix& z, int64_t row) {
    dots(down.part_rows(row, row + z.rows), z, a);
  });
}

// One run straight from the packed bytes.
void few_rows(const Problem& p, const Run& run, const Matrix& down, const Matrix& y) {
  Scratch scratch;
  const auto f32 = ScalarType::Float;
  const Weight weight = p.base.of_expert(run.expert);
  const int64_t inputs = run.end - run.begin, width = kernels().laid_out_width(p.base.columns);
  const Matrix x = as_dtype(p.x.part_rows(run.begin, run.end), f32, scratch);
  float* laid_out = scratch.take<float>(inputs * width);
  parallel((inputs + kGroup - 1) / kGroup, kGroup * width, [&](int64_t begin, int64_t end) {
    for (int64_t m = begin * kGroup; m < std::min(end * kGroup, inputs); m += kGroup) {
      kernels().lay_out(weight, static_cast<const float*>(x.at(m, 0)), std::min(kGroup, inputs - m),
                        laid_out + m * width);
    }
  });
  const Matrix target = y.part_rows(run.begin, run.end);
  const bool direct = y.dtype == f32;
  FewRows io{laid_out, nullptr, nullptr, nullptr, nullptr, inputs, p.rank};
  io.y = direct ? static_cast<float*>(target.at(0, 0)) : scratch.take<float>(inputs * y.columns);
  if (p.bias) io.bias = static_cast<float*>(as_dtype(p.bias_of(run.expert), f32, scratch).at(0, 0));
  if (run.adapter >= 0) {
    float* scaled = scratch.take<float>(inputs * p.rank);
    const float* from = static_cast<const float*>(down.at(run.begin, 0));
    for (int64_t i = 0; i < inputs * p.rank; ++i) {
      scaled[i] = static_cast<float>(p.scale) * from[i];
    }
    io.down = scaled;
    io.lora_b = static_cast<float*>(as_dtype(p.b_of(run.adapter), f32, scratch).at(0, 0));
  }
  const auto kernel = inputs <= kernels().most_few_rows ? kernels().few_rows : kernels().tiles;
  parallel(p.base.rows, inputs * p.base.columns / 4,
           [&](int64_t begin, int64_t end) { kernel(weight, io, begin, end); });
  if (!direct) convert(Matrix::dense(io.y, f32, inputs, y.columns), target);
}

// Into `out` [rows of the runs, n_end - n_begin]: bias and low-rank term. Whether anything was
// there.
bool start(const Problem& p, const Run* first, const Run* last, const Matrix& down, int64_t n_begin,
           int64_t n_end, const Matrix& out) {
  Scratch scratch;
  if (p.bias) {
    const Matrix bias =
        as_dtype(p.bias_of(first->expert).part(0, 1, n_begin, n_end), out.dtype, scratch);
    parallel(out.rows, out.columns, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        std::memcpy(out.at(row, 0), bias.at(0, 0),
                    static_cast<size_t>(out.columns * size_of(out.dtype)));
      }
    });
  }
  for (const Run* run = first; run < last; ++run) {
    const Matrix target = out.part_rows(run->begin - first->begin, run->end - first->begin);
    Scratch piece;
    if (run->adapter >= 0) {
      const Matrix b = as_dtype(p.b_of(run->adapter).part_rows(n_begin, n_end), out.dtype, piece);
      const Matrix s = as_dtype(down.part_rows(run->begin, run->end), out.dtype, piece);
      multiply(target, s, b.transposed(), p.bias ? 1 : 0, p.scale);
    } else if (p.rank && !p.bias) {
      clear(target);
    }
  }
  return p.bias || p.rank;
}

}  // namespace

std::tuple<Tensor, Tensor> linear(const Tensor& x, std::vector<Tensor> weight,
                                  std::vector<int64_t> layout, const MaybeTensor& bias,
                                  const MaybeTensor& lora_a, const MaybeTensor& lora_b,
                                  double scale, double dropout, const MaybeTensor& seed,
                                  const MaybeTensor& offsets, const MaybeTensor& adapter) {
  const Problem p(x, x, weight, layout, bias, lora_a, lora_b, scale, dropout, seed, offsets,
                  adapter);
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  shape.back() = p.base.rows;
  Tensor y = empty(shape, x.scalar_type());
  Tensor down = empty({p.x.rows, p.rank}, p.sums);
  const Matrix out = Matrix::of(y, p.x.rows, p.base.rows);
  const Matrix s = Matrix::of(down, p.x.rows, p.rank);
  for (const Run& run : p.runs) down_of(p, run, s);
  const int64_t few = most_rows_without_panels(p);
  p.for_each_expert([&](const Run* first, const Run* last) {
    if (last[-1].end - first->begin <= few) {
      for (const Run* run = first; run < last; ++run) few_rows(p, *run, s, out);
    } else {
      const int64_t begin = first->begin, end = last[-1].end;
      by_panels(p, first->expert, Side::rows, p.x.part_rows(begin, end), out.part_rows(begin, end),
                [&](int64_t n, int64_t stop, const Matrix& part) {
                  return start(p, first, last, s, n, stop, part);
                });
    }
  });
  return {y, down};
}

PEFTKERN_OPS(CPU, m) { m.impl("qlora_linear", TORCH_BOX(&linear)); }

}  // namespace peftkern::qlora
