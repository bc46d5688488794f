// A vector of W floats, once for each instruction set; kernels are written over it, once.
//
// Everything stands in a namespace of the instruction set's name, and nothing here or in the
// kernels calls a std template: an inline function compiled for AVX-512 could be the one copy that
// the linker keeps for every caller. Arithmetic and shifts are the compiler's own on vector types.
#pragma once
#include <cstdint>
#include <cstring>

#include "common/half.h"

#define PEFTKERN_INLINE static inline __attribute__((always_inline))
// On loops over an array of vectors: only once they are unrolled does the array live in registers.
#if defined(__clang__)
#define PEFTKERN_UNROLL _Pragma("unroll")
#else
#define PEFTKERN_UNROLL _Pragma("GCC unroll 16")
#endif

namespace peftkern::PEFTKERN_ISA {

#if defined(__AVX512F__)
inline constexpr int W = 16;
#else
inline constexpr int W = 8;
#endif
typedef float F __attribute__((vector_size(4 * W)));
typedef uint32_t U __attribute__((vector_size(4 * W)));
typedef int32_t I __attribute__((vector_size(4 * W)));
typedef uint64_t U64 __attribute__((vector_size(4 * W)));  // W / 2 lanes

PEFTKERN_INLINE int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
PEFTKERN_INLINE int64_t max(int64_t a, int64_t b) { return a < b ? b : a; }
PEFTKERN_INLINE F splat(float x) { return x - F{}; }
PEFTKERN_INLINE U splat(uint32_t x) { return x - U{}; }

template <typename V>
PEFTKERN_INLINE V load_bits(const void* from) {
  V v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

PEFTKERN_INLINE F load(const float* from) { return load_bits<F>(from); }
PEFTKERN_INLINE void store(float* to, F v) { std::memcpy(to, &v, sizeof v); }

// Lane numbers 0, 1, 2, ...
PEFTKERN_INLINE U lanes() {
  U v;
  for (int i = 0; i < W; ++i) v[i] = static_cast<uint32_t>(i);
  return v;
}

}  // namespace peftkern::PEFTKERN_ISA

#if defined(__AVX512F__)
#include "common/simd_avx512.h"
#elif defined(__AVX2__)
#include "common/simd_avx2.h"
#else
#include "common/simd_baseline.h"
#endif

namespace peftkern::PEFTKERN_ISA {

PEFTKERN_INLINE F load(const bf16* from) { return F(widen(&from->bits) << 16); }
// Rounds to nearest even; a NaN stays one.
PEFTKERN_INLINE void store(bf16* to, F v) {
  const U bits = U(v);
  const U rounded = (bits + 0x7FFFu + (bits >> 16 & 1)) >> 16;
  const U nan = U(v != v);
  narrow(&to->bits, (nan & (bits >> 16 | 0x40u)) | (~nan & rounded));
}
PEFTKERN_INLINE F load(const double* from) {
  F v;
  for (int i = 0; i < W; ++i) v[i] = static_cast<float>(from[i]);
  return v;
}
PEFTKERN_INLINE void store(double* to, F v) {
  for (int i = 0; i < W; ++i) to[i] = v[i];
}

// Any count below W, through a full vector on the stack.
template <typename T>
PEFTKERN_INLINE F load_some(const T* from, int64_t n) {
  T buffer[W] = {};
  std::memcpy(buffer, from, static_cast<size_t>(n) * sizeof(T));
  return load(buffer);
}
template <typename T>
PEFTKERN_INLINE void store_some(T* to, F v, int64_t n) {
  T buffer[W];
  store(buffer, v);
  std::memcpy(to, buffer, static_cast<size_t>(n) * sizeof(T));
}

}  // namespace peftkern::PEFTKERN_ISA
