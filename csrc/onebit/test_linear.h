// Tests of linear on packed codes; part of test.cpp.
#pragma once
#include <cmath>
#include <cstring>
#include <vector>

#include "common/testing.h"
#include "onebit/linear.h"

namespace peftkern::onebit {

// Canonical bytes without a pattern, in the order that kernels read.
struct Codes {
  std::vector<uint8_t> packed, words;
  LaidOut weight{};

  Codes(int64_t rows, int64_t columns, int64_t bits) {
    const int64_t size = bytes_of(columns, bits), used = columns * bits - 8 * (size - 1);
    packed.resize(static_cast<size_t>(rows * size));
    uint32_t state = 1;
    for (size_t i = 0; i < packed.size(); ++i) {
      state = state * 1664525u + 1013904223u;
      const bool last = static_cast<int64_t>(i + 1) % size == 0;
      packed[i] = static_cast<uint8_t>(state >> 24 & (last ? (1 << used) - 1 : 255));
    }
    words.assign(static_cast<size_t>(laid_out_bytes(rows, columns, bits)), 0xAA);
    const int64_t tiles = tiles_of(rows), cut = tiles / 2;
    linear_kernels().lay_out(packed.data(), rows, columns, bits, 0, cut, words.data());
    linear_kernels().lay_out(packed.data(), rows, columns, bits, cut, tiles, words.data());
    weight = {words.data(), rows, columns, bits};
  }

  double at(int64_t n, int64_t k) const {
    const int64_t bit = k * weight.bits, size = bytes_of(weight.columns, weight.bits);
    const int code = packed[n * size + bit / 8] >> bit % 8 & ((1 << weight.bits) - 1);
    return level(weight.bits, code) / unit_of(weight.bits);
  }
};

// Quarters: sums of them are exact in any order where levels are whole numbers.
inline std::vector<float> quarters(int64_t count) {
  std::vector<float> out(static_cast<size_t>(count));
  for (size_t i = 0; i < out.size(); ++i) out[i] = static_cast<float>(i * 7 % 23) / 4 - 2;
  return out;
}

inline constexpr float kMean = 0.25f, kScale = 0.5f;

// x W^T + bias; `pieces` of the tiles are computed apart.
inline std::vector<float> products(const LaidOut& weight, const std::vector<float>& x,
                                   const std::vector<float>& bias, int64_t pieces) {
  const int64_t inputs = static_cast<int64_t>(x.size()) / weight.columns;
  std::vector<float> y(static_cast<size_t>(inputs * weight.rows), NAN);
  const Product io{x.data(), bias.data(), y.data(), inputs, kMean, kScale};
  const int64_t tiles = tiles_of(weight.rows);
  for (int64_t i = 0; i < pieces; ++i) {
    linear_kernels().product(weight, io, tiles * i / pieces, tiles * (i + 1) / pieces);
  }
  return y;
}

inline void is_the_product(const Codes& codes, int64_t inputs) {
  const LaidOut& weight = codes.weight;
  const std::vector<float> x = quarters(inputs * weight.columns), bias = quarters(weight.rows);
  const std::vector<float> y = products(weight, x, bias, 1);
  for (int64_t m = 0; m < inputs; ++m) {
    for (int64_t n = 0; n < weight.rows; ++n) {
      double sum = bias[n], size = 2;
      for (int64_t k = 0; k < weight.columns; ++k) {
        const double part = x[m * weight.columns + k] * (kMean + kScale * codes.at(n, k));
        sum += part;
        size += std::fabs(part);
      }
      const double error = std::fabs(y[m * weight.rows + n] - sum);
      EXPECT(weight.bits == 1 ? error == 0 : error <= 5e-7 * size);
    }
  }
  EXPECT(products(weight, x, bias, 3) == y);
}

// All ways through the tiles of a step and what is left of them, blocks and what is left.
inline void lookups_are_the_product() {
  for (int64_t bits : {1, 2, 4}) {
    for (int64_t columns : {1, 31, 33, 300, 1100}) {
      for (int64_t rows : {1, 16, 33, 170}) is_the_product(Codes(rows, columns, bits), 7);
    }
  }
}

template <typename T, typename Sums>
void panels_are_levels(const PanelKernels<T, Sums>& by, double (*value)(T)) {
  for (int64_t bits : {1, 2, 4}) {
    const int64_t rows = 37, columns = 75, words = words_of(columns, bits);
    const Codes codes(rows, columns, bits);
    for (int64_t begin : {0, 16}) {
      const int64_t stride = rows - begin + 3, cut = words / 2, per_word = 32 / bits;
      std::vector<T> out(static_cast<size_t>(columns * stride), T{});
      by.panel(codes.weight, {begin, rows, 0, cut, stride}, out.data());
      by.panel(codes.weight, {begin, rows, cut, words, stride},
               out.data() + cut * per_word * stride);
      for (int64_t k = 0; k < columns; ++k) {
        for (int64_t n = begin; n < rows; ++n) {
          const double wanted = codes.at(n, k), found = value(out[k * stride + n - begin]);
          EXPECT(std::fabs(found - wanted) <= std::fabs(wanted) * (sizeof(T) == 2 ? 4e-3 : 1e-7));
        }
        EXPECT(value(out[k * stride + rows - begin]) == 0);
      }
    }
  }
}

inline void panels_are_levels_and_touch_nothing_else() {
  panels_are_levels<float>(linear_kernels().f32, [](float v) -> double { return v; });
  panels_are_levels<double>(linear_kernels().f64, [](double v) { return v; });
  panels_are_levels<peftkern::bf16>(linear_kernels().bf16, [](peftkern::bf16 v) -> double {
    const uint32_t bits = uint32_t{v.bits} << 16;
    float wide;
    std::memcpy(&wide, &bits, sizeof wide);
    return wide;
  });
}

}  // namespace peftkern::onebit
