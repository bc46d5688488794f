// Between the words of a bitmap and what they stand for.
#pragma once
#include "common/simd.h"
#include "sparse/select.h"

namespace peftkern::sparse::PEFTKERN_ISA {
using namespace peftkern::PEFTKERN_ISA;

int64_t count(const uint32_t* bits, int64_t words) {
  int64_t found = 0;
  for (int64_t w = 0; w < words; ++w) found += __builtin_popcount(bits[w]);
  return found;
}

void tile_counts(const uint32_t* bits, int64_t words, int32_t* counts) {
  constexpr int64_t kWords = kTile / kWord;
  for (int64_t w = 0; w < words; w += kWords) {
    *counts++ = static_cast<int32_t>(count(bits + w, min(kWords, words - w)));
  }
}

// Calls f(index) for each bit that is set.
template <typename Function>
PEFTKERN_INLINE void for_each_one(const uint32_t* bits, int64_t words, const Function& f) {
  for (int64_t w = 0; w < words; ++w) {
    for (uint32_t word = bits[w]; word; word &= word - 1) f(w * kWord + __builtin_ctz(word));
  }
}

template <typename Column>
void columns(const uint32_t* bits, int64_t words, Column* columns) {
  for_each_one(bits, words, [&](int64_t i) { *columns++ = static_cast<Column>(i); });
}

template <typename Element>
PEFTKERN_INLINE int64_t compact_of(const void* from, const uint32_t* bits, int64_t words,
                                   void* to) {
  const auto* source = static_cast<const Element*>(from);
  auto* next = static_cast<Element*>(to);
  for_each_one(bits, words, [&](int64_t i) { *next++ = source[i]; });
  return next - static_cast<Element*>(to);
}

int64_t compact(const void* from, int64_t size, const uint32_t* bits, int64_t words, void* to) {
  switch (size) {
    case 1:
      return compact_of<uint8_t>(from, bits, words, to);
    case 2:
      return compact_of<uint16_t>(from, bits, words, to);
    case 4:
      return compact_of<uint32_t>(from, bits, words, to);
    default:
      return compact_of<uint64_t>(from, bits, words, to);
  }
}

}  // namespace peftkern::sparse::PEFTKERN_ISA
