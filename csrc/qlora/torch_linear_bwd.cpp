// The binding of linear's gradient. With t = scale * g B:
//   grad_x = g W + D(t A)     grad_a = t^T D(x)     grad_b = scale * g^T down     grad_bias = sum g
#include "qlora/panels.h"
#include "qlora/small_products.h"

namespace peftkern::qlora {
namespace {

// What a call adds up, in the sums' dtype; a null pointer is a gradient nobody asked for.
struct Sums {
  Matrix t{}, bias{}, a{}, b{}, weight{};

  static Matrix zeros(int64_t rows, int64_t columns, ScalarType dtype, Scratch& scratch) {
    void* memory = scratch.take_bytes(rows * columns * size_of(dtype));
    const Matrix sum = Matrix::dense(memory, dtype, rows, columns);
    clear(sum);
    return sum;
  }
};

// Part i of a stack of equal parts.
Matrix part_of(const Matrix& stack, int64_t i, int64_t rows) {
  return stack.part_rows(i * rows, (i + 1) * rows);
}

// The ones that sum up the rows of a tile.
Matrix row_of_ones(ScalarType dtype, Scratch& scratch) {
  void* memory = scratch.take_bytes(kTileRows * size_of(dtype));
  with_sums(dtype, [&](const auto&, auto* type) {
    std::fill_n(static_cast<decltype(type)>(memory), kTileRows, 1);
  });
  return Matrix::dense(memory, dtype, 1, kTileRows);
}

// What one run adds to the gradients of the parameters; and its rows of t.
void add_run(const Problem& p, const Run& run, const Matrix& grad, const Matrix& down,
             const Sums& sums) {
  Scratch scratch;
  if (sums.weight.data) {
    const Matrix g = as_dtype(grad.part_rows(run.begin, run.end), p.sums, scratch);
    const Matrix x = as_dtype(p.x.part_rows(run.begin, run.end), p.sums, scratch);
    multiply(part_of(sums.weight, run.expert, p.base.rows), g.transposed(), x, 1);
  }
  const bool low_rank = run.adapter >= 0 && p.rank;
  if (sums.t.data && low_rank) {
    const Matrix b = as_dtype(p.b_of(run.adapter), p.sums, scratch);
    for_row_tiles(p, grad, run.begin, run.end, false, [&](const Matrix& g, int64_t row) {
      product(sums.t.part_rows(row, row + g.rows), g, b, p.scale, false);
    });
  }
  if (sums.bias.data || (sums.b.data && low_rank)) {
    const Matrix ones = row_of_ones(p.sums, scratch);
    for_column_tiles(p, grad, run.begin, run.end, false,
                     [&](const Matrix& g, int64_t row, int64_t column) {
                       if (sums.bias.data) {
                         const Matrix bias = part_of(sums.bias, run.expert, 1);
                         product(bias.part(0, 1, column, column + g.columns),
                                 ones.part(0, 1, 0, g.rows), g, 1, true);
                       }
                       if (sums.b.data && low_rank) {
                         const Matrix b = part_of(sums.b, run.adapter, p.base.rows);
                         product(b.part_rows(column, column + g.columns), g.transposed(),
                                 down.part_rows(row, row + g.rows), p.scale, true);
                       }
                     });
  }
  if (sums.a.data && low_rank) {
    const Matrix a = part_of(sums.a, run.adapter, p.rank);
    for_column_tiles(p, p.x, run.begin, run.end, true,
                     [&](const Matrix& z, int64_t row, int64_t column) {
                       product(a.part(0, p.rank, column, column + z.columns),
                               sums.t.part_rows(row, row + z.rows).transposed(), z, 1, true);
                     });
  }
}

// Into `out` [rows of the runs, k_end - k_begin]: D(t A). Whether anything was there.
bool start(const Problem& p, const Run* first, const Run* last, const Matrix& t, int64_t k_begin,
           int64_t k_end, const Matrix& out) {
  if (!t.data) return false;
  for (const Run* run = first; run < last; ++run) {
    Scratch scratch;
    const Matrix target = out.part_rows(run->begin - first->begin, run->end - first->begin);
    const bool direct = target.dtype == p.sums;
    const Matrix u =
        direct ? target
               : Matrix::dense(scratch.take_bytes(target.rows * target.columns * size_of(p.sums)),
                               p.sums, target.rows, target.columns);
    if (run->adapter < 0) {
      clear(u);
    } else {
      const Matrix a =
          as_dtype(p.a_of(run->adapter).part(0, p.rank, k_begin, k_end), p.sums, scratch);
      parallel(u.rows, u.columns * p.rank, [&](int64_t i, int64_t n) {
        product(u.part_rows(i, n), t.part_rows(run->begin + i, run->begin + n), a, 1, false);
        p.dropout.apply(u.part_rows(i, n), run->begin + i, k_begin, p.base.columns);
      });
    }
    if (!direct) convert(u, target);
  }
  return true;
}

}  // namespace

// `needs` and the result: x, weight, bias, lora_a, lora_b; only what is needed is returned.
std::vector<Tensor> linear_bwd(const Tensor& grad_tensor, const MaybeTensor& x,
                               const Tensor& down_tensor, std::vector<Tensor> weight,
                               std::vector<int64_t> layout, const MaybeTensor& bias,
                               const MaybeTensor& lora_a, const MaybeTensor& lora_b, double scale,
                               double dropout, const MaybeTensor& seed, const MaybeTensor& offsets,
                               const MaybeTensor& adapter, std::vector<bool> needs) {
  const Problem p(x, grad_tensor, weight, layout, bias, lora_a, lora_b, scale, dropout, seed,
                  offsets, adapter);
  check_count(grad_tensor, "grad", p.x.rows * p.base.rows);
  check_count(down_tensor, "down", p.x.rows * p.rank);
  check_dtype(down_tensor, "down", p.sums);
  const Matrix grad = Matrix::of(grad_tensor, p.x.rows, p.base.rows);
  const Matrix down = Matrix::of(down_tensor, p.x.rows, p.rank);
  const bool need_x = needs.at(0), need_weight = needs.at(1), need_bias = needs.at(2) && bias,
             need_a = needs.at(3) && p.rank, need_b = needs.at(4) && p.rank;
  STD_TORCH_CHECK(x || !(need_weight || need_a), "x must come where a gradient needs it");
  Scratch scratch;
  std::vector<Tensor> out;
  Matrix grad_x{};
  if (need_x) {
    std::vector<int64_t> shape(grad_tensor.sizes().begin(), grad_tensor.sizes().end());
    shape.back() = p.base.columns;
    out.push_back(empty(shape, p.x.dtype));
    grad_x = Matrix::of(out.back(), p.x.rows, p.base.columns);
  }
  // Where a parameter has the sums' dtype, its gradient is summed up in place.
  std::vector<std::pair<Matrix, Matrix>> rounded;
  const auto sum_for = [&](bool needed, const Tensor& parameter, int64_t rows, int64_t columns) {
    if (!needed) return Matrix{};
    out.push_back(empty_as(parameter));
    const Matrix target = Matrix::of(out.back(), rows, columns);
    if (target.dtype != p.sums) {
      rounded.emplace_back(Sums::zeros(rows, columns, p.sums, scratch), target);
      return rounded.back().first;
    }
    clear(target);
    return target;
  };
  Sums sums;
  sums.weight = sum_for(need_weight, weight[0], p.base.experts * p.base.rows, p.base.columns);
  if (bias) sums.bias = sum_for(need_bias, *bias, p.base.experts, p.base.rows);
  if (p.rank) {
    sums.a = sum_for(need_a, *lora_a, p.adapters * p.rank, p.base.columns);
    sums.b = sum_for(need_b, *lora_b, p.adapters * p.base.rows, p.rank);
    if (need_x || need_a) sums.t = Sums::zeros(p.x.rows, p.rank, p.sums, scratch);
  }
  for (const Run& run : p.runs) add_run(p, run, grad, down, sums);
  if (need_x) {
    p.for_each_expert([&](const Run* first, const Run* last) {
      const int64_t begin = first->begin, end = last[-1].end;
      by_panels(p, first->expert, Side::columns, grad.part_rows(begin, end),
                grad_x.part_rows(begin, end), [&](int64_t k, int64_t stop, const Matrix& part) {
                  return start(p, first, last, sums.t, k, stop, part);
                });
    });
  }
  for (const auto& [sum, target] : rounded) convert(sum, target);
  return out;
}

PEFTKERN_OPS(CPU, m) { m.impl("qlora_linear_bwd", TORCH_BOX(&linear_bwd)); }

}  // namespace peftkern::qlora
