// Between a weight and its codes: quantize and dequantize.
#pragma once
#include "common/simd.h"
#include "qlora/qlora.h"

namespace peftkern::qlora::PEFTKERN_ISA {
using namespace peftkern::PEFTKERN_ISA;

// Scales [begin, begin + count) as floats: where they lie when plain, else decoded into `buffer`.
PEFTKERN_INLINE const float* scales(const Weight& weight, int64_t begin, int64_t count,
                                    float* buffer) {
  begin += weight.first_block;
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

PEFTKERN_INLINE float one_value(const Weight& weight, int64_t i, float scale) {
  const uint8_t byte = weight.packed[i / 2];
  return weight.codebook[i % 2 ? byte & 15 : byte >> 4] * scale;
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

// Two vectors of values at a time from `packed` on, in the order of the elements; how many.
template <typename T>
PEFTKERN_INLINE int64_t dequantize_pairs(const uint8_t* packed, const Table& table, float scale,
                                         int64_t count, bool past_caches, T* out) {
  int64_t i = 0;
  for (; i + 2 * W <= count; i += 2 * W) {
    for (int64_t j = i; j < i + 2 * W; j += W) {
      put(out + j, Table::look_up(table, codes(packed + j / 2)) * scale, past_caches);
    }
  }
  return i;
}

// In bf16 a byte's two values are the halves of one lane, so nothing has to be put in order, and
// what is finite is rounded in three steps.
PEFTKERN_INLINE U rounded_up(F v) { return U(v) + 0x7FFFu + (U(v) >> 16 & 1u); }

PEFTKERN_INLINE int64_t dequantize_pairs(const uint8_t* packed, const Table& table, float scale,
                                         int64_t count, bool, peftkern::bf16* out) {
  if (!(scale * 0.0f == 0.0f)) return 0;  // no number times these values is rounded by adding
  int64_t i = 0;
  for (; i + 2 * W <= count; i += 2 * W) {
    const U byte = load_bytes(packed + i / 2);
    const U first = rounded_up(Table::look_up(table, byte >> 4) * scale);
    const U second = rounded_up(Table::look_up(table, byte) * scale);
    const U both = first >> 16 | (second & 0xFFFF0000u);
    std::memcpy(out + i, &both, sizeof both);
  }
  return i;
}

// Elements [i, end) of one block. W codes start on a whole byte where i is a multiple of W.
template <typename T>
PEFTKERN_INLINE void dequantize_block(const Weight& weight, const Table& table, float scale,
                                      int64_t i, int64_t end, bool past_caches, T* out) {
  for (; i < end && i % W; ++i) store_one(out++, one_value(weight, i, scale));
  const int64_t pairs =
      dequantize_pairs(weight.packed + i / 2, table, scale, end - i, past_caches, out);
  i += pairs;
  out += pairs;
  for (; i + W <= end; i += W, out += W) {
    put(out, Table::look_up(table, codes(weight.packed + i / 2)) * scale, past_caches);
  }
  for (; i < end; ++i) store_one(out++, one_value(weight, i, scale));
}

template <typename T>
void dequantize(const Weight& weight, int64_t begin, int64_t end, bool past_caches, T* out) {
  past_caches = past_caches && begin % W == 0 && reinterpret_cast<uintptr_t>(out) % (4 * W) == 0;
  constexpr int64_t kBatch = 64;
  const Table table(weight.codebook);
  float buffer[kBatch];
  while (begin < end) {
    const int64_t block = begin / weight.block;
    const int64_t count = min(kBatch, (end - 1) / weight.block + 1 - block);
    const float* scale = scales(weight, block, count, buffer);
    for (int64_t b = 0; b < count; ++b) {
      const int64_t stop = min((block + b + 1) * weight.block, end);
      dequantize_block(weight, table, scale[b], begin, stop, past_caches, out);
      out += stop - begin;
      begin = stop;
    }
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
PEFTKERN_INLINE U code_of(F scaled, const Table& thresholds, F middle) {
  U code = step_up(U{}, 8, scaled, middle);
  PEFTKERN_UNROLL
  for (uint32_t step = 4; step; step /= 2) {
    code = step_up(code, step, scaled, Table::look_up(thresholds, code + (step - 1)));
  }
  return code;
}

template <typename T>
void quantize(const T* weight, int64_t count, const float* thresholds, int64_t block,
              int64_t block_begin, int64_t block_end, uint8_t* packed, float* absmax) {
  float limits[16] = {};
  std::memcpy(limits, thresholds, 15 * sizeof(float));
  const Table table(limits);
  const F middle = splat(limits[7]);
  for (int64_t b = block_begin; b < block_end; ++b) {
    const int64_t begin = b * block, size = min(block, count - begin);
    float most = largest(weight + begin, size);
    float inverse = 1.0f / most;
    if (inverse > 3.402823466e38f) most = inverse = 0;  // no finite reciprocal: stored as zeros
    absmax[b] = most;
    for (int64_t i = 0; i < size; i += W) {
      // Lanes past the end are zeros, so an odd count is padded with the code of zero.
      const U code = code_of(load_up_to(weight + begin + i, size - i) * inverse, table, middle);
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

}  // namespace peftkern::qlora::PEFTKERN_ISA
