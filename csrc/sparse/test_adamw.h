// The optimiser's step, on the places of both kinds of patterns.
#pragma once
#include <algorithm>
#include <cmath>

#include "common/testing.h"
#include "sparse/adamw.h"

namespace peftkern::sparse {
namespace {

// Every third column and every fifth row's first: as csr and as a bitmap.
struct Example {
  static constexpr int64_t rows = 11, columns = 301, words = 10, tiles = 3;
  std::vector<int32_t> row_start{0}, prefix;
  std::vector<uint16_t> column;
  std::vector<uint32_t> bits = std::vector<uint32_t>(rows * words);
  std::vector<float> weight, values, grad, exp_avg, exp_avg_sq;
  std::vector<int32_t> born;
  std::vector<int64_t> wide_row_start, wide_prefix;

  Example() : weight(numbers(rows * columns, 9)) {
    for (int64_t row = 0; row < rows; ++row) {
      for (int64_t c = 0; c < columns; ++c) {
        if (c % kTile == 0) prefix.push_back(static_cast<int32_t>(column.size()));
        if (row == 4 || (row % 5 ? c % 3 : c)) continue;  // row 4 is empty
        bits[row * words + c / 32] |= 1u << c % 32;
        column.push_back(static_cast<uint16_t>(c));
      }
      row_start.push_back(static_cast<int32_t>(column.size()));
    }
    values = numbers(entries(), 2);
    grad = numbers(entries(), 3);
    exp_avg = numbers(entries(), 4);
    exp_avg_sq = numbers(entries(), 5);
    for (float& square : exp_avg_sq) square *= square;
    for (int64_t e = 0; e < entries(); ++e) born.push_back(static_cast<int32_t>(e % 5));
    wide_row_start.assign(row_start.begin(), row_start.end());
    wide_prefix.assign(prefix.begin(), prefix.end());
  }
  int64_t entries() const { return static_cast<int64_t>(column.size()); }
  Packed<float, float> io(bool bitmap, bool wide = false) {
    const void* places = bitmap ? static_cast<const void*>(bits.data()) : column.data();
    const void* positions = (bitmap ? prefix : row_start).data();
    if (wide) positions = (bitmap ? wide_prefix : wide_row_start).data();
    return {weight.data(),
            values.data(),
            grad.data(),
            exp_avg.data(),
            exp_avg_sq.data(),
            born.data(),
            {bitmap, rows, columns, entries(), places, positions, wide}};
  }
};

// Of ages 1 to 3; at step 4, entries born at 4 do not move.
struct Rates {
  float rate[4], spread[4];
  Adamw<float> by;
  Rates() : rate{}, spread{} {
    for (int age = 1; age < 4; ++age) {
      rate[age] = static_cast<float>(1e-2 / (1 - std::pow(0.9, age)));
      spread[age] = static_cast<float>(1 / std::sqrt(1 - std::pow(0.999, age)));
    }
    by = {1 - 1e-4f, 0.999f, 0.1f, 0.001f, 1e-8f, 4, {rate, spread, 3}};
  }
};

void a_step_moves_what_is_old_enough_and_writes_where_it_belongs() {
  const Example before;
  const Rates rates;
  for (bool bitmap : {false, true}) {
    Example after;
    optimizer_kernels().f32.adamw(after.io(bitmap), rates.by, 0, after.entries());
    std::vector<float> weight = before.weight;
    for (int64_t row = 0, e = 0; row < Example::rows; ++row) {
      for (; e < before.row_start[row + 1]; ++e) {
        const int age = std::min(4 - before.born[e], 3);
        const double m = 0.9 * before.exp_avg[e] + 0.1 * before.grad[e],
                     s = 0.999 * before.exp_avg_sq[e] + 0.001 * before.grad[e] * before.grad[e];
        double value = before.values[e];
        if (age >= 1) {
          const double down = std::sqrt(s / (1 - std::pow(0.999, age))) + 1e-8;
          value = value * (1 - 1e-4) - 1e-2 / (1 - std::pow(0.9, age)) * m / down;
          EXPECT(std::fabs(after.exp_avg[e] - m) < 1e-6);
          EXPECT(std::fabs(after.exp_avg_sq[e] - s) < 1e-6);
        } else {
          EXPECT(after.values[e] == before.values[e] && after.exp_avg[e] == before.exp_avg[e]);
        }
        EXPECT(std::fabs(after.values[e] - value) < 1e-4 * (1 + std::fabs(value)));
        weight[row * Example::columns + before.column[e]] = after.values[e];
      }
    }
    EXPECT(after.weight == weight);
  }
}

void any_range_of_entries_makes_the_same_step() {
  const Rates rates;
  Example whole;
  optimizer_kernels().f32.adamw(whole.io(false), rates.by, 0, whole.entries());
  for (bool bitmap : {false, true}) {
    for (int64_t size : {1, 7, 150}) {
      Example parts;
      for (int64_t e = 0; e < parts.entries(); e += size) {
        optimizer_kernels().f32.adamw(parts.io(bitmap, size == 7), rates.by, e,
                                      std::min(e + size, parts.entries()));
      }
      EXPECT(parts.weight == whole.weight && parts.values == whole.values);
      EXPECT(parts.exp_avg == whole.exp_avg && parts.exp_avg_sq == whole.exp_avg_sq);
    }
  }
}

}  // namespace
}  // namespace peftkern::sparse
