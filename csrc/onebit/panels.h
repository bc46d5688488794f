// W as a panel of levels, transposed, for the library's product; and what makes y of that product.
#pragma once
#include "onebit/laid_out.h"

namespace peftkern::onebit::PEFTKERN_ISA {

// The levels of one of a nibble's codes, rounded to T.
template <typename T>
struct Values {
  float value[16];
  explicit Values(const double* level) {
    for (int i = 0; i < 16; ++i) {
      T rounded[W];
      store(rounded, splat(static_cast<float>(level[i])));
      value[i] = load(rounded)[0];
    }
  }
};
template <>
struct Values<double> {
  const double* value;
  explicit Values(const double* level) : value(level) {}
};

// Of n lanes.
PEFTKERN_INLINE void put(const Values<float>& values, U nibble, int64_t n, float* to) {
  store_first(to, Table::look_up(Table(values.value), nibble), n);
}
PEFTKERN_INLINE void put(const Values<peftkern::bf16>& values, U nibble, int64_t n,
                         peftkern::bf16* to) {
  const U bits = U(Table::look_up(Table(values.value), nibble)) >> 16;  // nothing is left to round
  if (n >= W) return narrow(&to->bits, bits);
  uint16_t some[W];
  narrow(some, bits);
  std::memcpy(to, some, static_cast<size_t>(n) * sizeof *some);
}
PEFTKERN_INLINE void put(const Values<double>& values, U nibble, int64_t n, double* to) {
  for (int64_t i = 0; i < min(n, W); ++i) to[i] = values.value[nibble[i] & 15u];
}

template <int kCodes, typename T>
PEFTKERN_INLINE void panel_by(const LaidOut& weight, const Panel& at, T* out) {
  const Meaning meaning(weight.bits);
  const Values<T> values[4] = {Values<T>(meaning.level[0]), Values<T>(meaning.level[1]),
                               Values<T>(meaning.level[2]), Values<T>(meaning.level[3])};
  const int64_t words = words_of(weight.columns, weight.bits), tiles = tiles_of(weight.rows);
  constexpr int64_t kColumns = kNibbles * kCodes;
  for (int64_t w = at.word_begin; w < at.word_end; ++w, out += kColumns * at.stride) {
    const int64_t columns = min(kColumns, weight.columns - w * kColumns);
    for (int64_t n = at.row_begin; n < at.row_end; n += W) {
      const int64_t tile = place_of(tiles, words, w / kBlockWords, n / kTileRows);
      const int64_t place = tile + w % kBlockWords * kTileRows + n % kTileRows;
      U word = load_bits<U>(weight.words + 4 * place);
      T* to = out + n - at.row_begin;
      for (int64_t k = 0; k < columns; k += kCodes, word >>= 4) {
        PEFTKERN_UNROLL
        for (int p = 0; p < kCodes; ++p, to += at.stride) {
          if (k + p < columns) put(values[p], word, at.row_end - n, to);
        }
      }
    }
  }
}

template <typename T>
void panel(const LaidOut& weight, const Panel& at, T* out) {
  switch (weight.bits) {
    case 1:
      return panel_by<4>(weight, at, out);
    case 2:
      return panel_by<2>(weight, at, out);
    default:
      return panel_by<1>(weight, at, out);
  }
}

template <typename T>
void finish(const T* x, int64_t columns, double mean, double scale, const float* bias, int64_t rows,
            T* y) {
  F sums{};
  for (int64_t k = 0; k < columns; k += W) {
    sums += columns - k >= W ? load(x + k) : load_some(x + k, columns - k);
  }
  float start = 0;
  for (int i = 0; i < W; ++i) start += sums[i];
  start *= static_cast<float>(mean);
  const F by = splat(static_cast<float>(scale));
  for (int64_t n = 0; n < rows; n += W) {
    const int64_t left = rows - n;
    F v = fma(by, left >= W ? load(y + n) : load_some(y + n, left), splat(start));
    if (bias) v += load_first(bias + n, left);
    store_first(y + n, v, left);
  }
}

inline void finish_double(const double* x, int64_t columns, double mean, double scale,
                          const double* bias, int64_t rows, double* y) {
  double sum = 0;
  for (int64_t k = 0; k < columns; ++k) sum += x[k];
  for (int64_t n = 0; n < rows; ++n) {
    y[n] = scale * y[n] + mean * sum + (bias ? bias[n] : 0);
  }
}

}  // namespace peftkern::onebit::PEFTKERN_ISA
