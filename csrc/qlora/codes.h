// Between a weight and its codes: quantize and dequantize.
#pragma once
#include "common/simd.h"
#include "qlora/qlora.h"

namespace peftkern::qlora::PEFTKERN_ISA {
using namespace peftkern::PEFTKERN_ISA;

// What the codes of blocks [begin, begin + count) are multiplied by: the scales where they lie, or
// what is made of them in `buffer`.
PEFTKERN_INLINE const float* scales(const Weight& weight, int64_t begin, int64_t count,
                                    float* buffer) {
  begin += weight.first_block;
  if (weight.bits == 8) {
    for (int64_t b = 0; b < count; ++b) buffer[b] = weight.absmax[begin + b] / 127.0f;
    return buffer;
  }
  if (weight.absmax) return weight.absmax + begin;
  for (int64_t b = 0; b < count;) {
    // Up to W scales under one scale of theirs.
    const int64_t i = begin + b, n = min(W, min(count - b, kNestedBlock - i % kNestedBlock));
    const float nested = weight.nested_absmax[i / kNestedBlock];
    if (n == W) {
      store(buffer + b, gather(weight.map, weight.codes + i) * nested + weight.offset);
    } else {
      for (int64_t j = 0; j < n; ++j) {
        const float product = weight.map[weight.codes[i + j]] * nested;
        buffer[b + j] = product + weight.offset;
      }
    }
    b += n;
  }
  return buffer;
}

// What the codes mean: one at a time; from a multiple of W on, W at a time, and 2 W, those at even
// places first.
struct Nibbles {
  const Weight& weight;
  Table table;
  explicit Nibbles(const Weight& w) : weight(w), table(w.codebook) {}
};
PEFTKERN_INLINE float one(const Nibbles& n, int64_t i) {
  const uint8_t byte = n.weight.packed[i / 2];
  return n.weight.codebook[i % 2 ? byte & 15 : byte >> 4];
}
PEFTKERN_INLINE F vector(const Nibbles& n, int64_t i) {
  return Table::look_up(n.table, codes(n.weight.packed + i / 2));
}

PEFTKERN_INLINE void pairs(const Nibbles& n, int64_t i, F& first, F& second) {
  const U byte = load_bytes(n.weight.packed + i / 2);
  first = Table::look_up(n.table, byte >> 4);
  second = Table::look_up(n.table, byte);
}

struct Bytes {
  const int8_t* codes;
  explicit Bytes(const Weight& w) : codes(reinterpret_cast<const int8_t*>(w.packed)) {}
};
PEFTKERN_INLINE float one(const Bytes& b, int64_t i) { return b.codes[i]; }
PEFTKERN_INLINE F vector(const Bytes& b, int64_t i) { return load(b.codes + i); }
PEFTKERN_INLINE void pairs(const Bytes& b, int64_t i, F& first, F& second) {
  const U two = widen(reinterpret_cast<const uint16_t*>(b.codes + i));
  first = __builtin_convertvector(I(two << 24) >> 24, F);
  second = __builtin_convertvector(I(two << 16) >> 24, F);
}

template <typename T>
PEFTKERN_INLINE void store_one(T* to, float value) {
  store_some(to, splat(value), 1);
}

template <typename T>
PEFTKERN_INLINE void put(T* to, F v, bool) {
  store(to, v);
}
PEFTKERN_INLINE void put(float* to, F v, bool past_caches) {
  past_caches ? stream(to, v) : store(to, v);
}

// Values from i on, as many as there is a faster way for; how many.
template <typename Codes, typename T>
PEFTKERN_INLINE int64_t dequantize_pairs(const Codes&, float, int64_t, int64_t, T*) {
  return 0;
}

// In bf16 two values that follow one another are the halves of a lane, so nothing has to be put in
// order, and what is finite is rounded in three steps.
PEFTKERN_INLINE U rounded_up(F v) { return U(v) + 0x7FFFu + (U(v) >> 16 & 1u); }

template <typename Codes>
PEFTKERN_INLINE int64_t dequantize_pairs(const Codes& codes, float scale, int64_t begin,
                                         int64_t end, peftkern::bf16* out) {
  if (!(scale * 0.0f == 0.0f)) return 0;  // what is no number is not rounded by adding
  int64_t i = begin;
  for (; i + 2 * W <= end; i += 2 * W, out += 2 * W) {
    F first, second;
    pairs(codes, i, first, second);
    const U both = rounded_up(first * scale) >> 16 | (rounded_up(second * scale) & 0xFFFF0000u);
    std::memcpy(out, &both, sizeof both);
  }
  return i - begin;
}

// Elements [i, end) of one block.
template <typename Codes, typename T>
PEFTKERN_INLINE void dequantize_block(const Codes& codes, float scale, int64_t i, int64_t end,
                                      bool past_caches, T* out) {
  for (; i < end && i % W; ++i) store_one(out++, one(codes, i) * scale);
  const int64_t pairs = dequantize_pairs(codes, scale, i, end, out);
  i += pairs;
  out += pairs;
  for (; i + W <= end; i += W, out += W) put(out, vector(codes, i) * scale, past_caches);
  for (; i < end; ++i) store_one(out++, one(codes, i) * scale);
}

template <typename Codes, typename T>
PEFTKERN_INLINE void dequantize_blocks(const Weight& weight, int64_t begin, int64_t end,
                                       bool past_caches, T* out) {
  constexpr int64_t kBatch = 64;
  const Codes codes(weight);
  float buffer[kBatch];
  while (begin < end) {
    const int64_t block = begin / weight.block;
    const int64_t count = min(kBatch, (end - 1) / weight.block + 1 - block);
    const float* scale = scales(weight, block, count, buffer);
    for (int64_t b = 0; b < count; ++b) {
      const int64_t stop = min((block + b + 1) * weight.block, end);
      dequantize_block(codes, scale[b], begin, stop, past_caches, out);
      out += stop - begin;
      begin = stop;
    }
  }
}

template <typename T>
void dequantize(const Weight& weight, int64_t begin, int64_t end, bool past_caches, T* out) {
  past_caches = past_caches && begin % W == 0 && reinterpret_cast<uintptr_t>(out) % (4 * W) == 0;
  if (weight.bits == 8) {
    dequantize_blocks<Bytes>(weight, begin, end, past_caches, out);
  } else {
    dequantize_blocks<Nibbles>(weight, begin, end, past_caches, out);
  }
  if (past_caches) end_stream();
}

template <typename T>
PEFTKERN_INLINE F load_up_to(const T* from, int64_t n) {
  return n >= W ? load(from) : load_some(from, n);
}

// The largest magnitude. Magnitudes are compared as integers, where a NaN is above everything.
template <typename T>
PEFTKERN_INLINE float largest(const T* weight, int64_t count) {
  U most{};
  for (int64_t i = 0; i < count; i += W) {
    const U bits = U(load_up_to(weight + i, count - i)) & 0x7FFFFFFFu;
    most = bits > most ? bits : most;
  }
  uint32_t bits = 0;
  for (int i = 0; i < W; ++i) bits = most[i] > bits ? most[i] : bits;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// How many of the 15 thresholds lie below each lane: a binary search, three of its four steps
// looked up. What is no number lies above all.
PEFTKERN_INLINE U rank_of(F scaled, const Table& thresholds, F middle) {
  U rank = step_up(U{}, 8, scaled, middle);
  PEFTKERN_UNROLL
  for (uint32_t step = 4; step; step /= 2) {
    rank = step_up(rank, step, scaled, Table::look_up(thresholds, rank + (step - 1)));
  }
  return rank;
}

template <typename T>
void quantize(const T* weight, int64_t count, const Rounding& rounding, int64_t block,
              int64_t block_begin, int64_t block_end, uint8_t* packed, float* absmax) {
  float limits[16] = {}, code_bits[16];
  uint32_t integers[16];
  std::memcpy(limits, rounding.thresholds, 15 * sizeof(float));
  for (int i = 0; i < 16; ++i) integers[i] = rounding.codes[i];
  std::memcpy(code_bits, integers, sizeof integers);  // a lookup moves bits, whatever they mean
  const Table thresholds(limits), codes(code_bits);
  const F middle = splat(limits[7]);
  for (int64_t b = block_begin; b < block_end; ++b) {
    const int64_t begin = b * block, size = min(block, count - begin);
    float most = largest(weight + begin, size);
    float inverse = 1.0f / most;
    if (inverse > 3.402823466e38f) most = inverse = 0;  // no finite reciprocal: stored as zeros
    absmax[b] = most;
    for (int64_t i = 0; i < size; i += W) {
      // Lanes past the end are zeros, so an odd count is padded with the code of zero.
      const F scaled = load_up_to(weight + begin + i, size - i) * inverse;
      const U code = U(Table::look_up(codes, rank_of(scaled, thresholds, middle)));
      uint8_t* to = packed + (begin + i) / 2;
      if (size - i >= W) {
        pack(to, code);
      } else {
        uint8_t bytes[W / 2];
        pack(bytes, code);
        std::memcpy(to, bytes, static_cast<size_t>(size - i + 1) / 2);
      }
    }
  }
}

template <typename T>
void quantize_rows(const T* weight, int64_t columns, int64_t begin, int64_t end, int8_t* codes,
                   float* absmax) {
  // Added to a small number, it leaves the nearest integer in the low bits.
  const F round = splat(0x1.8p23f);
  for (int64_t row = begin; row < end; ++row) {
    const T* from = weight + row * columns;
    float most = largest(from, columns);
    float inverse = 127.0f * (1.0f / most);
    if (inverse > 3.402823466e38f) most = inverse = 0;  // no finite reciprocal: stored as zeros
    absmax[row] = most;
    for (int64_t i = 0; i < columns; i += W) {
      const F scaled = load_up_to(from + i, columns - i) * inverse;
      const U code = U(scaled + round) & U(scaled == scaled);
      int8_t* to = codes + row * columns + i;
      if (columns - i >= W) {
        narrow(to, code);
      } else {
        int8_t bytes[W];
        narrow(bytes, code);
        std::memcpy(to, bytes, static_cast<size_t>(columns - i));
      }
    }
  }
}

}  // namespace peftkern::qlora::PEFTKERN_ISA
