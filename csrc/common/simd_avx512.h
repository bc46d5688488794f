// Sixteen lanes in AVX-512 (F, BW, DQ, VL). Part of simd.h.
#pragma once
#include <immintrin.h>

namespace peftkern::PEFTKERN_ISA {

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
// W bytes, one to a lane.
PEFTKERN_INLINE U load_bytes(const uint8_t* from) {
  return U(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
}
// table[byte] for W bytes.
PEFTKERN_INLINE F gather(const float* table, const uint8_t* bytes) {
  return _mm512_i32gather_ps(__m512i(load_bytes(bytes)), table, 4);
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
PEFTKERN_INLINE F load(const int8_t* from) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes));
}
PEFTKERN_INLINE void narrow(int8_t* to, U v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtepi32_epi8(__m512i(v)));
}

}  // namespace peftkern::PEFTKERN_ISA
