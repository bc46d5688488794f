// Codes to bytes and back, a row at a time.
#pragma once
#include "common/simd.h"
#include "onebit/onebit.h"

namespace peftkern::onebit::PEFTKERN_ISA {
using namespace peftkern::PEFTKERN_ISA;

// How many codes a step takes, a whole number of bytes of any width of a code.
inline constexpr int64_t kStep = 4 * W;

PEFTKERN_INLINE void pack_bits(const uint8_t* codes, uint8_t* packed) {
#if defined(__AVX512F__)
  const uint64_t bits = _mm512_test_epi8_mask(load_bits<__m512i>(codes), _mm512_set1_epi8(1));
  std::memcpy(packed, &bits, sizeof bits);
#elif defined(__AVX2__)
  const int bits = _mm256_movemask_epi8(_mm256_slli_epi16(load_bits<__m256i>(codes), 7));
  std::memcpy(packed, &bits, sizeof bits);
#else
  for (int i = 0; i < kStep; i += 8) {
    // The product brings bit 0 of byte i to bit 56 + i, and no two of them meet below.
    const uint64_t eight = load_bits<uint64_t>(codes + i) & 0x0101010101010101u;
    packed[i / 8] = static_cast<uint8_t>(eight * 0x0102040810204080u >> 56);
  }
#endif
}

PEFTKERN_INLINE void unpack_bits(const uint8_t* packed, uint8_t* codes) {
#if defined(__AVX512F__)
  const __m512i ones = _mm512_maskz_set1_epi8(load_bits<uint64_t>(packed), 1);
  std::memcpy(codes, &ones, sizeof ones);
#elif defined(__AVX2__)
  const __m256i which =
      _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202, 0x0303030303030303);
  const __m256i bit = _mm256_set1_epi64x(static_cast<long long>(0x8040201008040201));
  const __m256i bytes = _mm256_shuffle_epi8(_mm256_set1_epi32(load_bits<int>(packed)), which);
  const __m256i set = _mm256_cmpeq_epi8(_mm256_and_si256(bytes, bit), bit);
  const __m256i ones = _mm256_and_si256(set, _mm256_set1_epi8(1));
  std::memcpy(codes, &ones, sizeof ones);
#else
  for (int i = 0; i < kStep; i += 8) {
    // Bit i alone is left in byte i, and carries into its byte's highest bit.
    const uint64_t copies = packed[i / 8] * 0x0101010101010101u & 0x8040201008040201u;
    const uint64_t ones = (copies + 0x7F7F7F7F7F7F7F7Fu) >> 7 & 0x0101010101010101u;
    std::memcpy(codes + i, &ones, sizeof ones);
  }
#endif
}

// A lane holds the codes of four bytes, the first in the lowest.
PEFTKERN_INLINE void pack_step(const uint8_t* codes, int64_t bits, uint8_t* packed) {
  if (bits == 1) return pack_bits(codes, packed);
  const U four = load_bits<U>(codes);
  if (bits == 2) {
    // The product brings them to the highest byte side by side; none of its other terms meets them.
    const U byte = (four & 0x03030303u) * 0x01041040u >> 24;
    return narrow(reinterpret_cast<int8_t*>(packed), byte);
  }
  const U pairs = four & 0x0F0F0F0Fu, bytes = pairs | pairs >> 4;
  uint16_t both[W];  // bytes may lie anywhere, and these may not
  narrow(both, (bytes & 0xFFu) | (bytes >> 8 & 0xFF00u));
  std::memcpy(packed, both, sizeof both);
}

PEFTKERN_INLINE void unpack_step(const uint8_t* packed, int64_t bits, uint8_t* codes) {
  if (bits == 1) return unpack_bits(packed, codes);
  U four;
  if (bits == 2) {
    const U byte = load_bytes(packed);
    four = (byte | byte << 6 | byte << 12 | byte << 18) & 0x03030303u;
  } else {
    uint16_t both[W];
    std::memcpy(both, packed, sizeof both);
    const U wide = widen(both), apart = (wide | wide << 8) & 0x00FF00FFu;
    four = (apart | apart << 4) & 0x0F0F0F0Fu;
  }
  std::memcpy(codes, &four, sizeof four);
}

void pack(const uint8_t* codes, int64_t width, int64_t bits, uint8_t* packed) {
  int64_t i = 0;
  for (; i + kStep <= width; i += kStep) pack_step(codes + i, bits, packed + i * bits / 8);
  if (i == width) return;
  uint8_t last[kStep] = {}, bytes[kStep];
  std::memcpy(last, codes + i, static_cast<size_t>(width - i));
  pack_step(last, bits, bytes);
  std::memcpy(packed + i * bits / 8, bytes, static_cast<size_t>(((width - i) * bits + 7) / 8));
}

void unpack(const uint8_t* packed, int64_t width, int64_t bits, uint8_t* codes) {
  int64_t i = 0;
  for (; i + kStep <= width; i += kStep) unpack_step(packed + i * bits / 8, bits, codes + i);
  if (i == width) return;
  uint8_t bytes[kStep] = {}, last[kStep];
  std::memcpy(bytes, packed + i * bits / 8, static_cast<size_t>(((width - i) * bits + 7) / 8));
  unpack_step(bytes, bits, last);
  std::memcpy(codes + i, last, static_cast<size_t>(width - i));
}

}  // namespace peftkern::onebit::PEFTKERN_ISA
