// One call of linear or of its gradient, as the binding sees it: the operands, checked, and which
// rows of x belong to which expert and which adapter.
#pragma once
#include "common/dropout.h"
#include "qlora/base.h"

namespace peftkern::qlora {

// Rows [begin, end) of x that share an expert and an adapter; adapter -1 is none.
struct Run {
  int64_t begin, end, expert, adapter;
};

struct Problem {
  Base base;
  Matrix x;            // [inputs, in]
  ScalarType sums;     // float, or double for double
  ScalarType product;  // the dtype in which x meets W
  MaybeTensor bias, lora_a, lora_b;
  int64_t rank = 0, adapters = 0;
  double scale;
  Dropout dropout;
  std::vector<Run> runs;  // in the order of the rows

  // `like` has x's rows and dtype: x itself, or the gradient of y where x is not needed.
  Problem(const MaybeTensor& x_tensor, const Tensor& like, const std::vector<Tensor>& weight,
          const std::vector<int64_t>& layout, const MaybeTensor& bias, const MaybeTensor& lora_a,
          const MaybeTensor& lora_b, double scale, double p, const MaybeTensor& seed,
          const MaybeTensor& offsets, const MaybeTensor& adapter)
      : base(weight, layout), x{}, bias(bias), lora_a(lora_a), lora_b(lora_b), scale(scale) {
    STD_TORCH_CHECK(like.dim() > 0, "x must have at least one axis");
    int64_t inputs = 1;
    for (int64_t d = 0; d + 1 < like.dim(); ++d) inputs *= like.size(d);
    x = Matrix::dense(nullptr, like.scalar_type(), inputs, base.columns);
    if (x_tensor) {
      check_count(*x_tensor, "x", inputs * base.columns);
      check_dtype(*x_tensor, "x", x.dtype);
      x = Matrix::of(*x_tensor, inputs, base.columns);
    }
    sums = x.dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
    product = base.product_dtype(x.dtype, sums);
    if (bias) check_count(*bias, "bias", base.experts * base.rows);
    if (lora_a) {
      STD_TORCH_CHECK(lora_b.has_value(), "lora_b must come with lora_a");
      rank = lora_a->size(-2);
      adapters = lora_a->dim() == 3 ? lora_a->size(0) : 1;
      check_count(*lora_a, "lora_a", adapters * rank * base.columns);
      check_count(*lora_b, "lora_b", adapters * rank * base.rows);
    }
    if (lora_a) dropout = Dropout(p, seed);
    find_runs(offsets, adapter);
  }

  Matrix a_of(int64_t adapter) const {
    return Matrix::of(*lora_a, adapters * rank, base.columns)
        .part_rows(adapter * rank, (adapter + 1) * rank);
  }
  Matrix b_of(int64_t adapter) const {
    return Matrix::of(*lora_b, adapters * base.rows, rank)
        .part_rows(adapter * base.rows, (adapter + 1) * base.rows);
  }
  Matrix bias_of(int64_t expert) const {
    return Matrix::of(*bias, base.experts, base.rows).part_rows(expert, expert + 1);
  }

  // A part of x or of its gradient in the sums' dtype, dropped where asked; the matrix's own memory
  // where that is the same. Parts are small enough to stay in a core's cache.
  Matrix tile(const Matrix& from, int64_t row_begin, int64_t row_end, int64_t column_begin,
              int64_t column_end, bool drop, Scratch& scratch) const {
    const Matrix part = from.part(row_begin, row_end, column_begin, column_end);
    drop = drop && dropout.p > 0;
    if (part.dtype == sums && !drop) return part;
    void* memory = scratch.take_bytes(part.rows * part.columns * size_of(sums));
    const Matrix to = Matrix::dense(memory, sums, part.rows, part.columns);
    for (int64_t i = 0; i < part.rows; ++i) {
      convert_row(part.at(i, 0), part.dtype, to.at(i, 0), sums, part.columns);
    }
    if (drop) dropout.apply(to, row_begin, column_begin, from.columns);
    return to;
  }

  // Calls f(first run, last run) for the runs of each expert that has rows.
  template <typename Function>
  void for_each_expert(const Function& f) const {
    for (size_t first = 0; first < runs.size();) {
      size_t last = first;
      while (last < runs.size() && runs[last].expert == runs[first].expert) ++last;
      f(runs.data() + first, runs.data() + last);
      first = last;
    }
  }

 private:
  void find_runs(const MaybeTensor& offsets, const MaybeTensor& adapter) {
    if (!offsets) {
      STD_TORCH_CHECK(base.experts == 1 && adapters <= 1, "offsets must come with experts");
      if (x.rows) runs.push_back({0, x.rows, 0, rank ? 0 : -1});
      return;
    }
    check_count(*offsets, "offsets", base.experts + 1);
    check_dtype(*offsets, "offsets", ScalarType::Long);
    const int64_t* bounds = offsets->const_data_ptr<int64_t>();
    const int32_t* owner = nullptr;
    if (adapter) {
      check_count(*adapter, "adapter", x.rows);
      check_dtype(*adapter, "adapter", ScalarType::Int);
      owner = adapter->const_data_ptr<int32_t>();
    }
    STD_TORCH_CHECK(bounds[0] == 0 && bounds[base.experts] == x.rows, "offsets must span the rows");
    for (int64_t expert = 0; expert < base.experts; ++expert) {
      STD_TORCH_CHECK(bounds[expert] <= bounds[expert + 1], "offsets must not fall");
      for (int64_t row = bounds[expert]; row < bounds[expert + 1];) {
        const int64_t g = !rank ? -1 : owner ? owner[row] : expert;
        STD_TORCH_CHECK(g >= -1 && g < adapters, "adapter must be there, got ", g);
        int64_t end = owner ? row + 1 : bounds[expert + 1];
        while (owner && end < bounds[expert + 1] && owner[end] == owner[row]) ++end;
        runs.push_back({row, end, expert, g});
        row = end;
      }
    }
  }
};

}  // namespace peftkern::qlora
