// Between a weight and its values.
#pragma once
#include "sparse/entries.h"
#include "sparse/turned.h"

namespace peftkern::sparse::PEFTKERN_ISA {

// Calls f(place in the weight, position) of every entry of rows [begin, end).
template <typename Function>
PEFTKERN_INLINE void for_each_entry(const Pattern& pattern, const Strides& strides, int64_t begin,
                                    int64_t end, const Function& f) {
  const bool whole = strides.inner_size == pattern.columns;
  const auto at = [&](int64_t row, int64_t column) {
    if (whole) return row * strides.row + column * strides.inner;
    return row * strides.row + column / strides.inner_size * strides.outer +
           column % strides.inner_size * strides.inner;
  };
  constexpr int64_t kPart = 16 * kTile;
  uint32_t room[kPart + kLanes];
  for (int64_t row = begin; row < end; ++row) {
    const int64_t step = pattern.is_bitmap ? kPart : max(1, pattern.columns);
    for (int64_t column = 0; column < pattern.columns; column += step) {
      with_entries(pattern, row, column, min(pattern.columns, column + step), room,
                   [&](const auto* columns, int64_t base, int64_t count, int64_t first) {
                     for (int64_t k = 0; k < count; ++k) {
                       f(at(row, base + static_cast<int64_t>(columns[k])), first + k);
                     }
                   });
    }
  }
}

template <typename T, typename A>
void gather(const Pattern& pattern, const T* weight, const Strides& strides, int64_t begin,
            int64_t end, A* values) {
  for_each_entry(pattern, strides, begin, end,
                 [&](int64_t at, int64_t k) { values[k] = widen_one(weight[at]); });
}

template <typename T, typename A>
void scatter(const Pattern& pattern, T* weight, const Strides& strides, int64_t begin, int64_t end,
             const A* values) {
  for_each_entry(pattern, strides, begin, end,
                 [&](int64_t at, int64_t k) { narrow_one(values[k], weight + at); });
}

}  // namespace peftkern::sparse::PEFTKERN_ISA
