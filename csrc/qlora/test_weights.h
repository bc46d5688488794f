// Weights for the tests: numbers without a pattern, quantised, in memory of their own.
#pragma once
#include <vector>

#include "common/testing.h"
#include "qlora/qlora.h"

namespace peftkern::qlora {

inline constexpr float kCodebook[16] = {-8, -7, -6, -5, -4, -3, -2, 0, 1, 2, 3, 4, 5, 6, 7, 8};
inline constexpr uint8_t kInOrder[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

inline std::vector<float> midpoints() {
  std::vector<float> out(15);
  for (int i = 0; i < 15; ++i) out[i] = (kCodebook[i] + kCodebook[i + 1]) / 2 / 8;
  return out;
}

// A weight and the memory that it lies in.
struct Stored {
  std::vector<uint8_t> packed;
  std::vector<float> absmax;
  Weight weight{};

  void describe(int64_t rows, int64_t columns, int64_t block, int64_t bits) {
    weight.packed = packed.data();
    weight.absmax = absmax.data();
    weight.codebook = kCodebook;
    weight.rows = rows;
    weight.columns = columns;
    weight.block = block;
    weight.bits = bits;
  }
};

struct Nibbles : Stored {
  Nibbles(const std::vector<float>& w, int64_t rows, int64_t columns, int64_t block,
          const uint8_t* codes = kInOrder) {
    packed.resize((w.size() + 1) / 2);
    absmax.resize((w.size() + static_cast<size_t>(block) - 1) / static_cast<size_t>(block));
    const std::vector<float> thresholds = midpoints();
    kernels().f32.quantize(w.data(), rows * columns, {thresholds.data(), codes}, block, 0,
                           static_cast<int64_t>(absmax.size()), packed.data(), absmax.data());
    describe(rows, columns, block, 4);
  }
};

struct Bytes : Stored {
  Bytes(const std::vector<float>& w, int64_t rows, int64_t columns, int64_t pieces = 1) {
    packed.resize(w.size());
    absmax.resize(static_cast<size_t>(rows));
    for (int64_t i = 0; i < pieces; ++i) {
      kernels().f32.quantize_rows(w.data(), columns, rows * i / pieces, rows * (i + 1) / pieces,
                                  reinterpret_cast<int8_t*>(packed.data()), absmax.data());
    }
    describe(rows, columns, columns, 8);
  }
};

inline std::vector<float> dense(const Weight& w) {
  std::vector<float> out(static_cast<size_t>(w.rows * w.columns));
  kernels().f32.dequantize(w, 0, w.rows * w.columns, false, out.data());
  return out;
}

}  // namespace peftkern::qlora
