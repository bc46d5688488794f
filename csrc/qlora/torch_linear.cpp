// The binding of linear: y = x W^T + bias + scale * (D(x) A^T) B^T, group by group.
#include "qlora/few_rows_jobs.h"
#include "qlora/forward.h"
#include "qlora/panels.h"
#include "qlora/small_products.h"

namespace peftkern::qlora {
namespace {

// down = D(x) A^T for one run, into rows of `down` [inputs, rank].
void down_of(const Problem& p, const Run& run, const Matrix& down) {
  if (run.adapter < 0) return;
  Scratch scratch;
  const Matrix a = as_dtype(p.a_of(run.adapter), p.sums, scratch);
  const TimesTransposed times_a(a, run.end - run.begin, scratch);
  for_row_tiles(p, p.x, run.begin, run.end, true, [&](const Matrix& z, int64_t row) {
    times_a.into(down.part_rows(row, row + z.rows), z, 1, false);
  });
}

// target = scale * s b^T, on top of a bias: by our own product in the sums' dtype, whose bits
// depend on neither threads nor library.
void low_rank(const Problem& p, const Matrix& s, const Matrix& b, const Matrix& target,
              Scratch& scratch) {
  if (target.dtype != p.sums) {
    return multiply(target, s, b.transposed(), p.bias ? 1 : 0, p.scale);
  }
  const TimesTransposed times_b(b, s.rows, scratch);
  parallel(s.rows, s.columns * b.rows, [&](int64_t begin, int64_t end) {
    times_b.into(target.part_rows(begin, end), s.part_rows(begin, end), p.scale,
                 p.bias.has_value());
  });
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
      low_rank(p, s, b, target, piece);
    } else if (p.rank && !p.bias) {
      clear(target);
    }
  }
  return p.bias || p.rank;
}

}  // namespace

void forward(const std::vector<Forward>& problems) {
  Scratch scratch;
  FewRowsJobs jobs(scratch);
  for (const auto& [p, y, down] : problems) {
    for (const Run& run : p.runs) down_of(p, run, down);
    p.for_each_expert([&](const Run* first, const Run* last) {
      const int64_t begin = first->begin, end = last[-1].end;
      if (few_rows_kernels(p, end - begin)) {
        for (const Run* run = first; run < last; ++run) jobs.add(p, *run, down, y);
        return;
      }
      const Term product{p, first->expert, p.x.part_rows(begin, end)};
      by_panels({product}, Side::rows, y.part_rows(begin, end),
                [&](int64_t n, int64_t stop, const Matrix& part) {
                  return start(p, first, last, down, n, stop, part);
                });
    });
  }
  jobs.run();
}

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
  forward({{p, Matrix::of(y, p.x.rows, p.base.rows), Matrix::of(down, p.x.rows, p.rank)}});
  return {y, down};
}

PEFTKERN_OPS(CPU, m) { m.impl("qlora_linear", TORCH_BOX(&linear)); }

}  // namespace peftkern::qlora
