// The binding of linear's gradient. With t = scale * g B:
//   grad_x = g W + D(t A)     grad_a = t^T D(x)     grad_b = scale * g^T down     grad_bias = sum g
#include "qlora/backward.h"
#include "qlora/panels.h"
#include "qlora/small_products.h"

namespace peftkern::qlora {
namespace {

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

void add_to(const Matrix& to, const Matrix& from) {
  with_sums(to.dtype, [&](const auto&, auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    for (int64_t row = 0; row < to.rows; ++row) {
      T* target = static_cast<T*>(to.at(row, 0));
      const T* source = static_cast<const T*>(from.at(row, 0));
      for (int64_t i = 0; i < to.columns; ++i) target[i] += source[i];
    }
  });
}

// What a problem's runs of one expert give to grad_x.
struct Part {
  const Backward& of;
  const Run *first, *last;
};

// u [rows of the runs, k_end - k_begin] = D(t A), or on top of it; in the sums' dtype.
void low_rank(const Part& part, int64_t k_begin, int64_t k_end, const Matrix& u, bool add) {
  const Problem& p = part.of.p;
  for (const Run* run = part.first; run < part.last; ++run) {
    const Matrix target = u.part_rows(run->begin - part.first->begin, run->end - part.first->begin);
    if (run->adapter < 0) {
      if (!add) clear(target);
      continue;
    }
    Scratch scratch;
    const Matrix a =
        as_dtype(p.a_of(run->adapter).part(0, p.rank, k_begin, k_end), p.sums, scratch);
    parallel(target.rows, target.columns * p.rank, [&](int64_t begin, int64_t end) {
      Scratch piece;
      const Matrix rows = target.part_rows(begin, end);
      const bool beside = add && p.dropout.p > 0;  // what is there already must not be dropped
      void* memory =
          beside ? piece.take_bytes(rows.rows * rows.columns * size_of(p.sums)) : nullptr;
      const Matrix out = beside ? Matrix::dense(memory, p.sums, rows.rows, rows.columns) : rows;
      const Matrix t = part.of.sums.t.part_rows(run->begin + begin, run->begin + end);
      product(out, t, a, 1, add && !beside);
      p.dropout.apply(out, run->begin + begin, k_begin, p.base.columns);
      if (beside) add_to(rows, out);
    });
  }
}

// The same for all parts, into `out` in the product's dtype. Whether anything was there.
bool start(const std::vector<Part>& parts, int64_t k_begin, int64_t k_end, const Matrix& out) {
  const ScalarType sums = parts[0].of.p.sums;
  Scratch scratch;
  Matrix u = out;
  bool there = false;
  for (const Part& part : parts) {
    if (!part.of.sums.t.data) continue;
    if (!there && out.dtype != sums) {
      void* memory = scratch.take_bytes(out.rows * out.columns * size_of(sums));
      u = Matrix::dense(memory, sums, out.rows, out.columns);
    }
    low_rank(part, k_begin, k_end, u, there);
    there = true;
  }
  if (there && out.dtype != sums) convert(u, out);
  return there;
}

}  // namespace

void backward(const std::vector<Backward>& problems, const Matrix& grad_x) {
  for (const Backward& b : problems) {
    for (const Run& run : b.p.runs) add_run(b.p, run, b.grad, b.down, b.sums);
  }
  if (!grad_x.data) return;
  problems[0].p.for_each_expert([&](const Run* first, const Run* last) {
    const int64_t begin = first->begin, end = last[-1].end;
    std::vector<Part> parts;
    std::vector<Term> terms;
    for (const Backward& b : problems) {
      const bool whole = problems.size() > 1;
      const Run* from = whole ? b.p.runs.data() : first;
      parts.push_back({b, from, whole ? from + b.p.runs.size() : last});
      terms.push_back({b.p, from->expert, b.grad.part_rows(begin, end)});
    }
    by_panels(
        terms, Side::columns, grad_x.part_rows(begin, end),
        [&](int64_t k, int64_t stop, const Matrix& out) { return start(parts, k, stop, out); });
  });
}

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
  const bool need_x = needs.at(0), need_weight = needs.at(1), need_bias = needs.at(2) && bias,
             need_a = needs.at(3) && p.rank, need_b = needs.at(4) && p.rank;
  STD_TORCH_CHECK(x || !(need_weight || need_a), "x must come where a gradient needs it");
  Scratch scratch;
  std::vector<Tensor> out;
  Gradients gradients(scratch, out);
  const Matrix grad_x = need_x ? gradients.of_x(grad_tensor, p) : Matrix{};
  Backward b{p,
             Matrix::of(grad_tensor, p.x.rows, p.base.rows),
             Matrix::of(down_tensor, p.x.rows, p.rank),
             {}};
  const int64_t rows = p.base.experts * p.base.rows, columns = p.base.columns;
  if (need_weight) b.sums.weight = gradients.of(weight[0], p.sums, rows, columns);
  if (need_bias) b.sums.bias = gradients.of(*bias, p.sums, p.base.experts, p.base.rows);
  if (need_a) b.sums.a = gradients.of(*lora_a, p.sums, p.adapters * p.rank, columns);
  if (need_b) b.sums.b = gradients.of(*lora_b, p.sums, p.adapters * p.base.rows, p.rank);
  if (p.rank && (need_x || need_a)) b.sums.t = Sums::zeros(p.x.rows, p.rank, p.sums, scratch);
  backward({b}, grad_x);
  gradients.round();
  return out;
}

PEFTKERN_OPS(CPU, m) { m.impl("qlora_linear_bwd", TORCH_BOX(&linear_bwd)); }

}  // namespace peftkern::qlora
