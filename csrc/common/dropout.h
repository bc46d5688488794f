// Dropout, as ops take it; part of the binding.
#pragma once
#include <cmath>

#include "common/convert.h"

namespace peftkern {

struct Dropout {
  double p = 0;
  uint64_t seed = 0;

  Dropout() = default;
  Dropout(double p, const MaybeTensor& seed_tensor) {
    if (!(p > 0)) return;
    STD_TORCH_CHECK(seed_tensor && p <= 1, "dropout must be at most 1 and come with a seed");
    check_count(*seed_tensor, "seed", 1);
    check_dtype(*seed_tensor, "seed", ScalarType::Long);
    this->p = p;
    seed = static_cast<uint64_t>(*seed_tensor->const_data_ptr<int64_t>());
  }

  // What is below this is dropped, of an element's word; and what the others are multiplied by.
  uint64_t threshold() const { return static_cast<uint64_t>(std::llround(std::ldexp(p, 32))); }
  double factor() const { return p < 1 ? 1 / (1 - p) : 0; }

  // D(x), in place, of a part of a matrix whose rows have `width` elements; the part starts at this
  // row and column, and an element's place in the whole decides whether it is kept.
  void apply(const Matrix& x, int64_t row, int64_t column, int64_t width) const {
    if (p == 0) return;
    with_kernels(shared_kernels(), x.dtype, [&](const auto& typed, auto* type) {
      for (int64_t i = 0; i < x.rows; ++i) {
        auto* at = static_cast<decltype(type)>(x.at(i, 0));
        typed.dropout(at, x.columns, seed, threshold(), factor(), (row + i) * width + column, at);
      }
    });
  }
};

}  // namespace peftkern
