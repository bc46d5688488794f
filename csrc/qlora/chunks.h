// Rows of codes as vectors, a chunk at a time, and x in the order in which they meet it.
#pragma once
#include "qlora/codes.h"

namespace peftkern::qlora::PEFTKERN_ISA {

// Of 4-bit codes, a chunk is one vector of packed bytes; lane l of its vector k is element
// kPlace[k] + lane_place(l). 8-bit codes come in their own order.
inline constexpr int64_t kChunk = 8 * W;

#if defined(__AVX2__) && !defined(__AVX512F__)

// Without a lookup among 16 floats, the bytes of a float are looked up by themselves, 32 codes at a
// time, and put together: 15 instructions for 32 weights, where two half tables and a blend
// take 28.
struct Decoder {
  __m256i bytes[4];

  explicit Decoder(const float* codebook) {
    uint8_t plane[16];
    for (int b = 0; b < 4; ++b) {
      for (int i = 0; i < 16; ++i) {
        uint32_t bits;
        std::memcpy(&bits, codebook + i, sizeof bits);
        plane[i] = static_cast<uint8_t>(bits >> (8 * b));
      }
      bytes[b] = _mm256_broadcastsi128_si256(load_bits<__m128i>(plane));
    }
  }
};
inline constexpr int64_t kLeastBlock = 32;  // a lane's elements share a scale
inline constexpr int kPlace[8] = {0, 8, 16, 24, 1, 9, 17, 25};
PEFTKERN_INLINE uint32_t lane_place(uint32_t l) { return l / 4 * 32 + l % 4 * 2; }

PEFTKERN_INLINE void decode_half(const Decoder& d, __m256i codes, F* values) {
  const __m256i b0 = _mm256_shuffle_epi8(d.bytes[0], codes);
  const __m256i b1 = _mm256_shuffle_epi8(d.bytes[1], codes);
  const __m256i b2 = _mm256_shuffle_epi8(d.bytes[2], codes);
  const __m256i b3 = _mm256_shuffle_epi8(d.bytes[3], codes);
  const __m256i low0 = _mm256_unpacklo_epi8(b0, b1), high0 = _mm256_unpacklo_epi8(b2, b3);
  const __m256i low1 = _mm256_unpackhi_epi8(b0, b1), high1 = _mm256_unpackhi_epi8(b2, b3);
  values[0] = F(_mm256_unpacklo_epi16(low0, high0));
  values[1] = F(_mm256_unpackhi_epi16(low0, high0));
  values[2] = F(_mm256_unpacklo_epi16(low1, high1));
  values[3] = F(_mm256_unpackhi_epi16(low1, high1));
}

PEFTKERN_INLINE void decode(const Decoder& d, U word, F* values) {
  const __m256i nibble = _mm256_set1_epi8(15);
  decode_half(d, _mm256_and_si256(__m256i(word >> 4), nibble), values);
  decode_half(d, _mm256_and_si256(__m256i(word), nibble), values + 4);
}

#else

struct Decoder {
  Table table;
  explicit Decoder(const float* codebook) : table(codebook) {}
};
inline constexpr int64_t kLeastBlock = 8;
inline constexpr int kPlace[8] = {0, 1, 2, 3, 4, 5, 6, 7};
PEFTKERN_INLINE uint32_t lane_place(uint32_t l) { return 8 * l; }

PEFTKERN_INLINE void decode(const Decoder& d, U word, F* values) {
  constexpr int kShift[8] = {4, 0, 12, 8, 20, 16, 28, 24};
  PEFTKERN_UNROLL
  for (int k = 0; k < 8; ++k) values[k] = Table::look_up(d.table, word >> kShift[k]);
}

#endif

int64_t laid_out_width(int64_t columns) { return (columns + kChunk - 1) / kChunk * kChunk; }

// Rows of x that meet a decoded weight together; their vectors lie in turn.
inline constexpr int64_t kGroup = 4;

int64_t laid_out(int64_t inputs, int64_t columns) { return inputs * laid_out_width(columns); }

// 4 bits: out[group][chunk][k][m][l] = x[m, chunk * kChunk + kPlace[k] + lane_place(l)], with m
// within its group; 8 bits: x[m, chunk * kChunk + k * W + l]. Zeros behind the end of a row.
void lay_out(const Weight& weight, const void* x, int64_t inputs, int64_t m, void* out) {
  const int64_t columns = weight.columns, first = m / kGroup * kGroup;
  const int64_t group = min(kGroup, inputs - first);
  const float* from = static_cast<const float*>(x) + m * columns;
  float* to = static_cast<float*>(out) + first * laid_out_width(columns) + (m - first) * W;
  for (int64_t begin = 0; begin < columns; begin += kChunk) {
    for (int k = 0; k < 8; ++k, to += group * W) {
      for (uint32_t l = 0; l < W; ++l) {
        const int64_t i = begin + (weight.bits == 8 ? k * W + l : kPlace[k] + lane_place(l));
        to[l] = i < columns ? from[i] : 0.0f;
      }
    }
  }
}

inline constexpr int64_t kTileScales = 4096;  // of the rows that a kernel decodes the scales of

bool serves_few_rows(const Weight& weight) {
  if (weight.columns == 0 || weight.bits == 8) return weight.columns > 0;
  return weight.columns % weight.block == 0 && weight.block >= kLeastBlock &&
         weight.columns / weight.block <= kTileScales;
}

// What all rows of 4-bit codes have in common.
struct NibblePlan {
  Decoder decoder;
  int64_t row_bytes;
  int64_t words;             // of 8 codes, in a row
  int64_t blocks;            // in a row
  int64_t per_chunk;         // scales in a chunk; 0 where a block is longer than a chunk
  int64_t chunks_per_block;  // 0 where it is shorter
  U index;                   // which of a chunk's scales a lane takes

  explicit NibblePlan(const Weight& weight)
      : decoder(weight.codebook),
        row_bytes(weight.columns / 2),
        words(weight.columns / 8),
        blocks(weight.columns / weight.block),
        per_chunk(kChunk / weight.block),
        chunks_per_block(weight.block / kChunk),
        index{} {
    for (uint32_t l = 0; l < W; ++l) index[l] = lane_place(l) / static_cast<uint32_t>(weight.block);
  }
};

// A chunk of a row, without its scales; and asks for the memory `ahead` bytes further on.
PEFTKERN_INLINE void decode(const NibblePlan& plan, const uint8_t* row, int64_t chunk,
                            int64_t ahead, F* values) {
  const uint32_t* packed = reinterpret_cast<const uint32_t*>(row) + chunk * W;
  const U word = load_first(packed, plan.words - chunk * W);
  __builtin_prefetch(reinterpret_cast<const char*>(packed) + ahead);
  decode(plan.decoder, word, values);
}

// The scale of each lane. Lanes behind the row's end get zero: a row is whole blocks.
PEFTKERN_INLINE F chunk_scale(const NibblePlan& plan, const float* scales, int64_t chunk) {
  if (plan.per_chunk == 0) return splat(scales[chunk / plan.chunks_per_block]);
  const int64_t first = chunk * plan.per_chunk;
  if (plan.per_chunk == 1) return splat(scales[first]);
  const int64_t count = min(plan.per_chunk, plan.blocks - first);
  return permute(load_first(scales + first, count), plan.index);
}

// Of 8-bit codes.
struct BytePlan {
  int64_t row_bytes;
  int64_t blocks;  // in a row: one

  explicit BytePlan(const Weight& weight) : row_bytes(weight.columns), blocks(1) {}
};

PEFTKERN_INLINE void decode(const BytePlan& plan, const uint8_t* row, int64_t chunk, int64_t ahead,
                            F* values) {
  const int8_t* from = reinterpret_cast<const int8_t*>(row) + chunk * kChunk;
  const int64_t there = plan.row_bytes - chunk * kChunk;
  int8_t last[kChunk];
  if (there < kChunk) {
    std::memset(last, 0, sizeof last);
    std::memcpy(last, from, static_cast<size_t>(there));
    from = last;
  } else {
    for (int64_t i = 0; i < kChunk; i += 64) __builtin_prefetch(from + i + ahead);
  }
  PEFTKERN_UNROLL
  for (int k = 0; k < 8; ++k) values[k] = load(from + k * W);
}

PEFTKERN_INLINE F chunk_scale(const BytePlan&, const float* scales, int64_t) {
  return splat(scales[0]);
}

}  // namespace peftkern::qlora::PEFTKERN_ISA
