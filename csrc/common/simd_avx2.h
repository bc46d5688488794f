// Eight lanes in AVX2, with FMA and F16C. Part of simd.h.
#pragma once
#include <immintrin.h>

namespace peftkern::PEFTKERN_ISA {

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
PEFTKERN_INLINE U load_bytes(const uint8_t* from) {
  return U(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from))));
}
PEFTKERN_INLINE F gather(const float* table, const uint8_t* bytes) {
  return _mm256_i32gather_ps(table, __m256i(load_bytes(bytes)), 4);
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
PEFTKERN_INLINE F load(const int8_t* from) {
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from));
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes));
}
PEFTKERN_INLINE void narrow(int8_t* to, U v) {
  const __m256i first_bytes = _mm256_set1_epi32(0x0C080400);  // of the four lanes of each half
  const __m256i fours = _mm256_shuffle_epi8(__m256i(v), first_bytes);
  const __m128i bytes =
      _mm_unpacklo_epi32(_mm256_castsi256_si128(fours), _mm256_extracti128_si256(fours, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(to), bytes);
}

// code + step where v is not at most this; what is no number counts as above.
PEFTKERN_INLINE U step_up(U code, uint32_t step, F v, F threshold) {
  return code + (~U(v <= threshold) & step);
}

}  // namespace peftkern::PEFTKERN_ISA
