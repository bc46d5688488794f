// Tests of what lies between latent weights and their codes; part of test.cpp.
#pragma once
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "common/testing.h"
#include "onebit/onebit.h"

namespace peftkern::onebit {

// Numbers without a pattern, the same on every machine.
inline std::vector<float> numbers(int64_t count) {
  std::vector<float> out(static_cast<size_t>(count));
  uint32_t state = 1;
  for (float& x : out) {
    state = state * 1664525u + 1013904223u;
    x = static_cast<float>(static_cast<int32_t>(state)) / 2147483648.0f;
  }
  return out;
}

// Of mean 0.25 and steps of 1: limits are thresholds, and values mean + level.
inline Quantizer<float> quantizer_of(int64_t bits) {
  Quantizer<float> by{};
  by.mean = 0.25f;
  by.bits = bits;
  const int64_t count = int64_t{1} << bits;
  for (int64_t t = 0; t < 16; ++t) {
    const bool there = t + 1 < count;
    by.limits[t] = there ? static_cast<float>((level(bits, t) + level(bits, t + 1)) / 2)
                         : std::numeric_limits<float>::infinity();
    if (t < count) by.values[t] = 0.25f + static_cast<float>(level(bits, t));
  }
  return by;
}

inline uint8_t code_of(const Quantizer<float>& by, float w) {
  uint8_t code = 0;
  for (int t = 0; t + 1 < 1 << by.bits; ++t) code += w - by.mean > by.limits[t];
  return code;
}

inline void bytes_come_back_and_nothing_else_is_touched() {
  for (int64_t bits : {1, 2, 4}) {
    for (int64_t width = 0; width < 300; ++width) {
      std::vector<uint8_t> codes(static_cast<size_t>(width));
      for (int64_t i = 0; i < width; ++i) {
        codes[i] = static_cast<uint8_t>((i * i + 3 * i) >> 1 & ((1 << bits) - 1));
      }
      const int64_t bytes = bytes_of(width, bits);
      std::vector<uint8_t> packed(static_cast<size_t>(bytes + 1), 0xAA);
      kernels().pack(codes.data(), width, bits, packed.data());
      EXPECT(packed[bytes] == 0xAA);
      for (int64_t i = 0; i < 8 * bytes / bits; ++i) {
        const int code = packed[i * bits / 8] >> (i * bits % 8) & ((1 << bits) - 1);
        EXPECT(code == (i < width ? codes[i] : 0));
      }
      std::vector<uint8_t> back(static_cast<size_t>(width + 1), 0xAA);
      kernels().unpack(packed.data(), width, bits, back.data());
      EXPECT(back[width] == 0xAA && std::equal(codes.begin(), codes.end(), back.begin()));
    }
  }
}

inline void a_tie_takes_the_lower_code_and_what_is_no_number_the_lowest() {
  for (int64_t bits : {1, 2, 4}) {
    Quantizer<float> by = quantizer_of(bits);
    by.mean = 0;
    for (int t = 0; t + 1 < 1 << bits; ++t) {
      const float on = by.limits[t], above = std::nextafter(on, INFINITY);
      const float w[3] = {on, above, NAN};
      uint8_t packed[2], codes[3];
      kernels().f32.encode(w, by, 3, 0, 1, packed);
      kernels().unpack(packed, 3, bits, codes);
      EXPECT(codes[0] == t && codes[1] == t + 1 && codes[2] == 0);
    }
  }
}

inline void any_range_is_quantised_alike() {
  constexpr int64_t kRows = 7, kColumns = 37, kCount = kRows * kColumns;
  const std::vector<float> w = numbers(kCount);
  for (int64_t bits : {1, 2, 4}) {
    const Quantizer<float> by = quantizer_of(bits);
    const int64_t bytes = bytes_of(kColumns, bits);
    std::vector<uint8_t> packed(static_cast<size_t>(kRows * bytes));
    for (int64_t row = 0; row < kRows; row += 2) {
      kernels().f32.encode(w.data(), by, kColumns, row, row < 6 ? row + 2 : kRows, packed.data());
    }
    std::vector<float> decoded(kCount), dense(kCount + 1, 7);
    kernels().f32.dequantize(packed.data(), by, kColumns, 0, 3, decoded.data());
    kernels().f32.dequantize(packed.data(), by, kColumns, 3, kRows, decoded.data());
    for (int64_t begin = 0; begin < kCount; begin += 23) {
      kernels().f32.quantize(w.data(), by, begin, begin + 23 < kCount ? begin + 23 : kCount,
                             dense.data());
    }
    EXPECT(dense[kCount] == 7);
    for (int64_t i = 0; i < kCount; ++i) {
      EXPECT(dense[i] == by.values[code_of(by, w[i])] && decoded[i] == dense[i]);
    }
  }
}

// Small whole numbers, whose sums are exact in any order.
inline void sums_take_every_element_once() {
  for (int64_t count : {int64_t{1}, int64_t{63}, int64_t{65}, kPiece, kPiece + 5, 3 * kPiece}) {
    std::vector<float> w(static_cast<size_t>(count));
    double first = 0, second = 0;
    for (int64_t i = 0; i < count; ++i) {
      w[i] = static_cast<float>(i % 7);
      first += w[i] - 2;
      second += (w[i] - 2) * (w[i] - 2);
    }
    const int64_t pieces = pieces_of(count);
    std::vector<double> sums(static_cast<size_t>(2 * pieces), NAN);
    for (int64_t p = 0; p < pieces; ++p) {
      kernels().f32.sums(w.data(), count, 2, true, p, p + 1, sums.data());
    }
    for (int64_t p = 0; p < pieces; ++p) {
      first -= sums[2 * p];
      second -= sums[2 * p + 1];
    }
    EXPECT(first == 0 && second == 0);
  }
}

inline void slopes_are_the_closed_form() {
  constexpr int64_t kCount = 101;
  const std::vector<float> w = numbers(kCount), grad = numbers(kCount + 1);
  const Quantizer<float> by = quantizer_of(2);
  Slopes<float> at{};
  for (int64_t code = 0; code < 4; ++code) at.levels[code] = static_cast<float>(level(2, code));
  at.straight = 0.75f;
  at.along = 0.5f;
  at.shift = 0.125f;
  at.slope = -2;
  double sums[2], first = 0, second = 0;
  kernels().f32.slope_sums(grad.data(), w.data(), by, at, kCount, 0, 1, sums);
  std::vector<float> out(kCount + 1, 7);
  kernels().f32.slope(grad.data(), w.data(), by, at, 0, 40, out.data());
  kernels().f32.slope(grad.data(), w.data(), by, at, 40, kCount, out.data());
  for (int64_t i = 0; i < kCount; ++i) {
    const float above = w[i] - by.mean;
    first += grad[i];
    second += grad[i] * (at.levels[code_of(by, w[i])] - above * at.along);
    EXPECT(std::fabs(out[i] - (0.75f * grad[i] + 0.125f - 2 * above)) < 1e-6f);
  }
  EXPECT(out[kCount] == 7);
  EXPECT(std::fabs(sums[0] - first) < 1e-5 && std::fabs(sums[1] - second) < 1e-5);
}

}  // namespace peftkern::onebit
