// A vector of W floats, once for each instruction set; kernels are written over it, once.
//
// Everything stands in a namespace of the instruction set's name, and nothing here or in the
// kernels calls a std template: an inline function compiled for AVX-512 could be the one copy that
// the linker keeps for every caller. Arithmetic and shifts are the compiler's own on vector types.
#pragma once
#include <cstdint>
#include <cstring>

#include "common/half.h"
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#define PEFTKERN_INLINE static inline __attribute__((always_inline))
// On loops over an array of vectors: only once they are unrolled does the array live in registers.
#if defined(__clang__)
#define PEFTKERN_UNROLL _Pragma("unroll")
#else
#define PEFTKERN_UNROLL _Pragma("GCC unroll 16")
#endif

namespace peftkern {

namespace PEFTKERN_ISA {

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

#if defined(__AVX512F__)

PEFTKERN_INLINE F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
PEFTKERN_INLINE float sum(F v) { return _mm512_reduce_add_ps(v); }
PEFTKERN_INLINE __mmask16 first(int64_t n) { return static_cast<__mmask16>((1u << n) - 1); }
// The first n lanes; the rest is zero, and its memory is not touched.
PEFTKERN_INLINE F load_first(const float* from, int64_t n) {
  return n >= W ? load(from) : F(_mm512_maskz_loadu_ps(first(n), from));
}
PEFTKERN_INLINE U load_first(const uint32_t* from, int64_t n) {
  return n >= W ? load_bits<U>(from) : U(_mm512_maskz_loadu_epi32(first(n), from));
}
PEFTKERN_INLINE F permute(F v, U index) { return _mm512_permutexvar_ps(__m512i(index), v); }
// table[byte] for W bytes.
PEFTKERN_INLINE F gather(const float* table, const uint8_t* bytes) {
  const __m128i index = _mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes));
  return _mm512_i32gather_ps(_mm512_cvtepu8_epi32(index), table, 4);
}
// Past the caches, for what nobody reads soon. `to` lies on a multiple of 4 * W bytes.
PEFTKERN_INLINE void stream(float* to, F v) { _mm512_stream_ps(to, v); }
// Before another thread may read what was streamed.
PEFTKERN_INLINE void end_stream() { _mm_sfence(); }

// 16 floats, looked up by the low four bits of each lane.
struct Table {
  F values;
  explicit Table(const float* v) : values(load(v)) {}
  PEFTKERN_INLINE F look_up(const Table& t, U index) { return permute(t.values, index); }
};
// W four-bit codes in the order of the elements, from W / 2 bytes that hold the high nibble first.
PEFTKERN_INLINE U codes(const uint8_t* packed) {
  uint64_t bytes;
  std::memcpy(&bytes, packed, sizeof bytes);
  const __m512i low = _mm512_set1_epi32(static_cast<int>(bytes));
  const __m512i both = _mm512_mask_set1_epi32(low, 0xFF00, static_cast<int>(bytes >> 32));
  const __m512i shifts =
      _mm512_setr_epi32(4, 0, 12, 8, 20, 16, 28, 24, 4, 0, 12, 8, 20, 16, 28, 24);
  return U(_mm512_srlv_epi32(both, shifts));
}
// The way back: W codes to W / 2 bytes.
PEFTKERN_INLINE void pack(uint8_t* to, U code) {
  const U64 pairs = U64(code) << 4 | U64(code) >> 32;
  _mm_storel_epi64(reinterpret_cast<__m128i*>(to), _mm512_cvtepi64_epi8(__m512i(pairs)));
}
// code + step where v is not at most this; what is no number counts as above.
PEFTKERN_INLINE U step_up(U code, uint32_t step, F v, F threshold) {
  const __mmask16 above = _mm512_cmp_ps_mask(v, threshold, _CMP_NLE_UQ);
  return U(_mm512_mask_add_epi32(__m512i(code), above, __m512i(code), __m512i(splat(step))));
}
// The 64-bit products of the even lanes.
PEFTKERN_INLINE U64 multiply_even(U a, U b) {
  return U64(_mm512_mul_epu32(__m512i(a), __m512i(b)));
}
PEFTKERN_INLINE F load(const fp16* from) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}
PEFTKERN_INLINE void store(fp16* to, F v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to),
                      _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
PEFTKERN_INLINE U widen(const uint16_t* from) {
  return U(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))));
}
PEFTKERN_INLINE void narrow(uint16_t* to, U v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi32_epi16(__m512i(v)));
}

#elif defined(__AVX2__)

PEFTKERN_INLINE F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
PEFTKERN_INLINE float sum(F v) {
  __m128 half = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  half = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}
PEFTKERN_INLINE __m256i first(int64_t n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(n)), __m256i(lanes()));
}
PEFTKERN_INLINE F load_first(const float* from, int64_t n) {
  return n >= W ? load(from) : F(_mm256_maskload_ps(from, first(n)));
}
PEFTKERN_INLINE U load_first(const uint32_t* from, int64_t n) {
  if (n >= W) return load_bits<U>(from);
  return U(_mm256_maskload_epi32(reinterpret_cast<const int*>(from), first(n)));
}
PEFTKERN_INLINE F permute(F v, U index) { return _mm256_permutevar8x32_ps(v, __m256i(index)); }
PEFTKERN_INLINE F gather(const float* table, const uint8_t* bytes) {
  const __m128i index = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(bytes));
  return _mm256_i32gather_ps(table, _mm256_cvtepu8_epi32(index), 4);
}
PEFTKERN_INLINE void stream(float* to, F v) { _mm256_stream_ps(to, v); }
PEFTKERN_INLINE void end_stream() { _mm_sfence(); }

struct Table {
  F low, high;
  explicit Table(const float* v) : low(load(v)), high(load(v + 8)) {}
  PEFTKERN_INLINE F look_up(const Table& t, U index) {
    const __m256 bit_3 = _mm256_castsi256_ps(__m256i(index << 28));  // a blend looks at the sign
    return _mm256_blendv_ps(permute(t.low, index), permute(t.high, index), bit_3);
  }
};
PEFTKERN_INLINE U codes(const uint8_t* packed) {
  int bytes;
  std::memcpy(&bytes, packed, sizeof bytes);
  return U(
      _mm256_srlv_epi32(_mm256_set1_epi32(bytes), _mm256_setr_epi32(4, 0, 12, 8, 20, 16, 28, 24)));
}
PEFTKERN_INLINE void pack(uint8_t* to, U code) {
  const __m256i pairs = __m256i(U64(code) << 4 | U64(code) >> 32);  // a byte in each 64 bits
  const __m256i words = _mm256_shuffle_epi8(
      pairs, _mm256_setr_epi8(0, 8, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1,
                              0, 8, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1));
  const __m128i bytes =
      _mm_or_si128(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
  const int four = _mm_cvtsi128_si32(bytes);
  std::memcpy(to, &four, sizeof four);
}
PEFTKERN_INLINE U64 multiply_even(U a, U b) {
  return U64(_mm256_mul_epu32(__m256i(a), __m256i(b)));
}
PEFTKERN_INLINE F load(const fp16* from) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}
PEFTKERN_INLINE void store(fp16* to, F v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to),
                   _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
PEFTKERN_INLINE U widen(const uint16_t* from) {
  return U(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
}
PEFTKERN_INLINE void narrow(uint16_t* to, U v) {
  const __m256i packed = _mm256_packus_epi32(__m256i(v), __m256i(v));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to),
                   _mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0b1000)));
}

#else

PEFTKERN_INLINE F fma(F a, F b, F c) { return a * b + c; }
PEFTKERN_INLINE float sum(F v) {
  float total = 0;
  for (int i = 0; i < W; ++i) total += v[i];
  return total;
}
PEFTKERN_INLINE F load_first(const float* from, int64_t n) {
  F v{};
  for (int i = 0; i < W && i < n; ++i) v[i] = from[i];
  return v;
}
PEFTKERN_INLINE U load_first(const uint32_t* from, int64_t n) {
  U v{};
  for (int i = 0; i < W && i < n; ++i) v[i] = from[i];
  return v;
}
PEFTKERN_INLINE F permute(F v, U index) {
  F out;
  for (int i = 0; i < W; ++i) out[i] = v[index[i] & (W - 1)];
  return out;
}
PEFTKERN_INLINE F gather(const float* table, const uint8_t* bytes) {
  F v;
  for (int i = 0; i < W; ++i) v[i] = table[bytes[i]];
  return v;
}
PEFTKERN_INLINE void stream(float* to, F v) { store(to, v); }
PEFTKERN_INLINE void end_stream() {}

struct Table {
  const float* values;
  explicit Table(const float* v) : values(v) {}
  PEFTKERN_INLINE F look_up(const Table& t, U index) {
    F out;
    for (int i = 0; i < W; ++i) out[i] = t.values[index[i] & 15];
    return out;
  }
};
PEFTKERN_INLINE U codes(const uint8_t* packed) {
  U out;
  for (int i = 0; i < W; ++i) out[i] = i % 2 ? packed[i / 2] & 15 : packed[i / 2] >> 4;
  return out;
}
PEFTKERN_INLINE void pack(uint8_t* to, U code) {
  for (int i = 0; i < W; i += 2) to[i / 2] = static_cast<uint8_t>(code[i] << 4 | code[i + 1]);
}
PEFTKERN_INLINE U64 multiply_even(U a, U b) {
  U64 out;
  for (int i = 0; i < W / 2; ++i) out[i] = static_cast<uint64_t>(a[2 * i]) * b[2 * i];
  return out;
}
PEFTKERN_INLINE float to_float(fp16 h) {
  const uint32_t sign = (h.bits & 0x8000u) << 16, magnitude = h.bits & 0x7FFFu;
  float value;
  if (magnitude >= 0x7C00u) {  // infinity or NaN
    const uint32_t bits = sign | 0x7F800000u | (magnitude & 0x3FFu) << 13;
    std::memcpy(&value, &bits, sizeof value);
    return value;
  }
  // The exponent is right once the value, read as a float, is multiplied by 2^112; this holds for
  // subnormal halves too.
  const uint32_t bits = magnitude << 13;
  std::memcpy(&value, &bits, sizeof value);
  value *= 0x1p112f;
  return sign ? -value : value;
}
PEFTKERN_INLINE fp16 to_half(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  const uint16_t sign = static_cast<uint16_t>((bits & 0x80000000u) >> 16);
  bits &= 0x7FFFFFFFu;
  if (bits > 0x7F800000u) return {static_cast<uint16_t>(sign | 0x7E00u)};
  if (bits >= 0x477FF000u) return {static_cast<uint16_t>(sign | 0x7C00u)};
  if (bits < 0x38800000u) {  // subnormal: adding 0.5 lets the unit round at the right place
    float magnitude;
    std::memcpy(&magnitude, &bits, sizeof magnitude);
    magnitude += 0.5f;
    std::memcpy(&bits, &magnitude, sizeof bits);
    return {static_cast<uint16_t>(sign | (bits - 0x3F000000u))};
  }
  bits += 0xFFFu + (bits >> 13 & 1);
  return {static_cast<uint16_t>(sign | ((bits - 0x38000000u) >> 13))};
}
PEFTKERN_INLINE F load(const fp16* from) {
  F v;
  for (int i = 0; i < W; ++i) v[i] = to_float(from[i]);
  return v;
}
PEFTKERN_INLINE void store(fp16* to, F v) {
  for (int i = 0; i < W; ++i) to[i] = to_half(v[i]);
}
PEFTKERN_INLINE U widen(const uint16_t* from) {
  U v;
  for (int i = 0; i < W; ++i) v[i] = from[i];
  return v;
}
PEFTKERN_INLINE void narrow(uint16_t* to, U v) {
  for (int i = 0; i < W; ++i) to[i] = static_cast<uint16_t>(v[i]);
}

#endif

#if !defined(__AVX512F__)
PEFTKERN_INLINE U step_up(U code, uint32_t step, F v, F threshold) {
  return code + (~U(v <= threshold) & step);
}
#endif

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

}  // namespace PEFTKERN_ISA
}  // namespace peftkern
