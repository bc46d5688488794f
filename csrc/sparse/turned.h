// Operands turned, a block of tokens at a time, so that the tokens of one column lie side by side:
// sums over tokens then take whole vectors of both operands.
#pragma once
#include "common/blocks.h"
#include "sparse/sparse.h"

namespace peftkern::sparse::PEFTKERN_ISA {

using namespace peftkern::PEFTKERN_ISA;

template <int... i>
struct Places {};
#if defined(__AVX512F__)
typedef Places<0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15> AllLanes;
#else
typedef Places<0, 1, 2, 3, 4, 5, 6, 7> AllLanes;
#endif

// Lanes of a and b in turn, `step` of each; and those that are left.
template <int step, int... i>
PEFTKERN_INLINE F even(F a, F b, Places<i...>) {
  return __builtin_shufflevector(a, b, (i & step ? W + i - step : i)...);
}
template <int step, int... i>
PEFTKERN_INLINE F odd(F a, F b, Places<i...>) {
  return __builtin_shufflevector(a, b, (i & step ? W + i : i + step)...);
}

template <int step>
PEFTKERN_INLINE void exchange(F (&v)[W]) {
  PEFTKERN_UNROLL
  for (int i = 0; i < W; ++i) {
    if (i & step) continue;
    const F a = v[i], b = v[i + step];
    v[i] = even<step>(a, b, AllLanes{});
    v[i + step] = odd<step>(a, b, AllLanes{});
  }
}

PEFTKERN_INLINE void transpose(F (&v)[W]) {
  exchange<1>(v);
  exchange<2>(v);
  exchange<4>(v);
  if constexpr (W == 16) exchange<8>(v);
}

// Sums of the lanes of a and of b in turn, `step` of each.
template <int step>
PEFTKERN_INLINE F fold(F a, F b) {
  return even<step>(a, b, AllLanes{}) + odd<step>(a, b, AllLanes{});
}

// The sums of R vectors, in order.
template <int R>
PEFTKERN_INLINE void sums_of(const F (&v)[R], float* sums) {
  if constexpr (R == 8) {
    const F low = fold<2>(fold<1>(v[0], v[1]), fold<1>(v[2], v[3]));
    const F high = fold<2>(fold<1>(v[4], v[5]), fold<1>(v[6], v[7]));
    const F all = fold<4>(low, high);
#if defined(__AVX512F__)
    _mm256_storeu_ps(sums, _mm512_castps512_ps256(all) + _mm512_extractf32x8_ps(all, 1));
#else
    store(sums, all);
#endif
  } else {
    PEFTKERN_UNROLL
    for (int r = 0; r < R; ++r) sums[r] = sum(v[r]);
  }
}
template <int R>
PEFTKERN_INLINE void sums_of(const double (&v)[R], double* sums) {
  for (int r = 0; r < R; ++r) sums[r] = v[r];
}

PEFTKERN_INLINE F whole(const float* from) { return load(from); }
PEFTKERN_INLINE double whole(const double* from) { return *from; }
PEFTKERN_INLINE void put(float* to, F v) { store(to, v); }
PEFTKERN_INLINE void put(double* to, double v) { *to = v; }

PEFTKERN_INLINE float widen_one(float v) { return v; }
PEFTKERN_INLINE double widen_one(double v) { return v; }
PEFTKERN_INLINE float widen_one(fp16 v) { return load_some(&v, 1)[0]; }
PEFTKERN_INLINE float widen_one(bf16 v) {
  const uint32_t bits = static_cast<uint32_t>(v.bits) << 16;
  float wide;
  std::memcpy(&wide, &bits, sizeof wide);
  return wide;
}
PEFTKERN_INLINE void narrow_one(float v, float* to) { *to = v; }
PEFTKERN_INLINE void narrow_one(double v, double* to) { *to = v; }
PEFTKERN_INLINE void narrow_one(float v, fp16* to) { store_some(to, splat(v), 1); }
PEFTKERN_INLINE void narrow_one(float v, bf16* to) {
  uint32_t bits;
  std::memcpy(&bits, &v, sizeof bits);
  const bool nan = v != v;
  to->bits =
      static_cast<uint16_t>((nan ? bits | 0x400000u : bits + 0x7FFFu + (bits >> 16 & 1)) >> 16);
}

constexpr int64_t round_up(int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }

// to[c * length + m] = x[m, c] of `tokens` and `columns`; zero from there to a whole vector.
template <typename T, typename A>
PEFTKERN_INLINE void turn_any(const Operand<T>& x, int64_t tokens, int64_t columns, A* to,
                              int64_t length) {
  for (int64_t c = 0; c < columns; ++c, to += length) {
    const T* from = x.data + c * x.column_stride;
    for (int64_t m = 0; m < tokens; ++m) to[m] = widen_one(from[m * x.token_stride]);
    for (int64_t m = tokens; m < round_up(tokens); ++m) to[m] = 0;
  }
}

template <typename T>
inline void turn(const Operand<T>& x, int64_t tokens, int64_t columns, float* to, int64_t length) {
  if (x.token_stride == 1) {  // it lies so already
    for (int64_t c = 0; c < columns; ++c, to += length) {
      const T* from = x.data + c * x.column_stride;
      for (int64_t m = 0; m < round_up(tokens); m += W) {
        store(to + m, m < tokens ? read(from + m, tokens - m) : F{});
      }
    }
    return;
  }
  if (x.column_stride != 1) return turn_any(x, tokens, columns, to, length);
  for (int64_t m = 0; m < round_up(tokens); m += W) {
    const T* from = x.data + m * x.token_stride;
    for (int64_t c = 0; c < columns; c += W) {
      F v[W];
      if (tokens - m >= W && columns - c >= W) {
        PEFTKERN_UNROLL
        for (int i = 0; i < W; ++i) v[i] = load(from + i * x.token_stride + c);
      } else {
        for (int i = 0; i < W; ++i) {
          v[i] = m + i < tokens ? read(from + i * x.token_stride + c, columns - c) : F{};
        }
      }
      transpose(v);
      const int64_t count = min(W, columns - c);
      if (count == W) {
        PEFTKERN_UNROLL
        for (int i = 0; i < W; ++i) store(to + (c + i) * length + m, v[i]);
      } else {
        for (int64_t i = 0; i < count; ++i) store(to + (c + i) * length + m, v[i]);
      }
    }
  }
}
inline void turn(const Operand<double>& x, int64_t tokens, int64_t columns, double* to,
                 int64_t length) {
  turn_any(x, tokens, columns, to, length);
}

template <typename T>
PEFTKERN_INLINE Operand<T> part_of(const Operand<T>& x, int64_t token, int64_t column) {
  return {x.data + token * x.token_stride + column * x.column_stride, x.token_stride,
          x.column_stride};
}

// How a kernel's operands get there: columns from `column` on, for a block of tokens.
template <typename T, typename A>
PEFTKERN_INLINE void fill(const Operand<T>& x, int64_t token, int64_t tokens, int64_t column,
                          int64_t columns, int64_t length, A* to) {
  turn(part_of(x, token, column), tokens, columns, to, length);
}

}  // namespace peftkern::sparse::PEFTKERN_ISA
