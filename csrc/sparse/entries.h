// The entries of one row, within a range of columns.
#pragma once
#include "common/simd.h"
#include "sparse/sparse.h"

namespace peftkern::sparse::PEFTKERN_ISA {

using namespace peftkern::PEFTKERN_ISA;

PEFTKERN_INLINE int64_t position(const Pattern& pattern, int64_t index) {
  return pattern.wide ? static_cast<const int64_t*>(pattern.positions)[index]
                      : static_cast<const int32_t*>(pattern.positions)[index];
}

// The first of [begin, end) whose column is not below this one.
template <typename Column>
PEFTKERN_INLINE int64_t first_from(const Column* columns, int64_t begin, int64_t end,
                                   int64_t column) {
  while (begin < end) {
    const int64_t middle = begin + (end - begin) / 2;
    if (static_cast<int64_t>(columns[middle]) < column) {
      begin = middle + 1;
    } else {
      end = middle;
    }
  }
  return begin;
}

// Columns of set bits, counted from the first word's; `to` has room for kLanes more.
template <typename Column>
PEFTKERN_INLINE int64_t unpack(const uint32_t* words, int64_t begin, int64_t end, Column* to) {
  int64_t count = 0;
#if defined(__AVX512F__)
  for (int64_t w = begin; w < end; ++w) {
    for (int64_t half = 0; half < 2; ++half) {
      const uint32_t set = words[w] >> 16 * half & 0xFFFFu;
      const U at = lanes() + splat(static_cast<uint32_t>((w - begin) * kWord + 16 * half));
      const __m512i found = _mm512_maskz_compress_epi32(static_cast<__mmask16>(set), __m512i(at));
      if constexpr (sizeof(Column) == 2) {
        narrow(to + count, U(found));
      } else {
        _mm512_storeu_si512(to + count, found);
      }
      count += __builtin_popcount(set);
    }
  }
#else
  for (int64_t w = begin; w < end; ++w) {
    const int64_t base = (w - begin) * kWord;
    for (uint32_t word = words[w]; word; word &= word - 1) {
      to[count++] = static_cast<Column>(base + __builtin_ctz(word));
    }
  }
#endif
  return count;
}

// Calls f(their columns, the column from which those count, how many, position of the first).
template <typename Function>
PEFTKERN_INLINE void with_entries(const Pattern& pattern, int64_t row, int64_t column_begin,
                                  int64_t column_end, uint32_t* room, const Function& f) {
  if (pattern.is_bitmap) {
    const auto* words = static_cast<const uint32_t*>(pattern.places);
    const int64_t count = unpack(words + row * words_of(pattern.columns), column_begin / kWord,
                                 words_of(column_end), room);
    const int64_t tile = row * tiles_of(pattern.columns) + column_begin / kTile;
    f(static_cast<const uint32_t*>(room), column_begin, count, position(pattern, tile));
    return;
  }
  int64_t begin = position(pattern, row), end = position(pattern, row + 1);
  const auto within = [&](const auto* columns) {
    if (column_begin > 0) begin = first_from(columns, begin, end, column_begin);
    if (column_end < pattern.columns) end = first_from(columns, begin, end, column_end);
    f(columns + begin, int64_t{0}, end - begin, begin);
  };
  if (is_small(pattern.columns)) return within(static_cast<const uint16_t*>(pattern.places));
  within(static_cast<const uint32_t*>(pattern.places));
}

// Bitmaps are read once for all blocks of tokens: the columns of as many rows as there is room for.
// The row behind the last of them.
template <typename A>
inline int64_t list_rows(const Pattern& pattern, const Block& block, int64_t row,
                         const Room<A>& room) {
  const auto* words = static_cast<const uint32_t*>(pattern.places);
  const int64_t width = block.column_end - block.column_begin;
  const int64_t end = min(block.row_end, row + kListedRows);
  uint32_t count = 0;
  int64_t i = 0;
  for (room.listed[0] = 0; row + i < end && count + width <= room.most_listed; ++i) {
    count += static_cast<uint32_t>(unpack(words + (row + i) * words_of(pattern.columns),
                                          block.column_begin / kWord, words_of(block.column_end),
                                          room.list + count));
    room.listed[i + 1] = count;
  }
  return row + i;
}

template <typename Column>
PEFTKERN_INLINE bool rise_below(const Column* columns, int64_t count, int64_t limit) {
  uint32_t falls = 0;
  for (int64_t k = 1; k < count; ++k) falls |= columns[k] <= columns[k - 1];
  return !falls && (count == 0 || static_cast<int64_t>(columns[count - 1]) < limit);
}

inline bool holds(const Pattern& pattern, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    if (!pattern.is_bitmap) {
      const int64_t first = position(pattern, row), last = position(pattern, row + 1);
      if (first < 0 || last < first || last > pattern.nnz) return false;
      const bool rises = is_small(pattern.columns)
                             ? rise_below(static_cast<const uint16_t*>(pattern.places) + first,
                                          last - first, pattern.columns)
                             : rise_below(static_cast<const uint32_t*>(pattern.places) + first,
                                          last - first, pattern.columns);
      if (!rises) return false;
      continue;
    }
    const int64_t words = words_of(pattern.columns), tiles = tiles_of(pattern.columns);
    const auto* bits = static_cast<const uint32_t*>(pattern.places) + row * words;
    int64_t next = tiles ? position(pattern, row * tiles) : 0;
    if (next < 0) return false;
    for (int64_t t = 0; t < tiles; ++t) {
      if (position(pattern, row * tiles + t) != next) return false;
      for (int64_t w = t * (kTile / kWord); w < min(words, (t + 1) * (kTile / kWord)); ++w) {
        next += __builtin_popcount(bits[w]);
      }
    }
    const int64_t tail = pattern.columns % kWord;
    if (next > pattern.nnz || (tail && bits[words - 1] >> tail)) return false;
  }
  return true;
}

}  // namespace peftkern::sparse::PEFTKERN_ISA
