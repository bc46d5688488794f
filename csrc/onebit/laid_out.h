// Codes in the order of linear.h, and what they stand for.
#pragma once
#include "common/simd.h"
#include "onebit/linear.h"

namespace peftkern::onebit::PEFTKERN_ISA {
using namespace peftkern::PEFTKERN_ISA;

inline constexpr int kVectors = static_cast<int>(kTileRows) / W;  // that a tile's lanes take

// Where the words of a tile lie, of a block.
PEFTKERN_INLINE int64_t place_of(int64_t tiles, int64_t words, int64_t block, int64_t tile) {
  const int64_t first = block * kBlockWords;
  return (first * tiles + tile * min(kBlockWords, words - first)) * kTileRows;
}

// A word's nibbles as they are laid out, and the way back.
PEFTKERN_INLINE uint32_t turned(uint32_t word) { return word ^ (word >> 3 & 0x11111111u) * 7; }

void lay_out(const uint8_t* packed, int64_t rows, int64_t columns, int64_t bits, int64_t begin,
             int64_t end, uint8_t* to) {
  const int64_t words = words_of(columns, bits), tiles = tiles_of(rows);
  const int64_t bytes = (columns * bits + 7) / 8;
  for (int64_t tile = begin; tile < end; ++tile) {
    const int64_t first = tile * kTileRows, height = min(kTileRows, rows - first);
    for (int64_t w = 0; w < words; ++w) {
      const size_t there = static_cast<size_t>(min(4, bytes - 4 * w));
      uint32_t lane[kTileRows] = {};
      for (int64_t i = 0; i < height; ++i) {
        std::memcpy(&lane[i], packed + (first + i) * bytes + 4 * w, there);
        lane[i] = turned(lane[i]);
      }
      const int64_t place = place_of(tiles, words, w / kBlockWords, tile);
      std::memcpy(to + 4 * (place + w % kBlockWords * kTileRows), lane, sizeof lane);
    }
  }
}

// What a laid out nibble stands for: the level of each of its codes, over unit_of.
struct Meaning {
  int64_t codes;
  double level[4][16] = {};  // [code][nibble]

  explicit Meaning(int64_t bits) : codes(4 / bits) {
    for (uint32_t nibble = 0; nibble < 16; ++nibble) {
      const uint32_t plain = turned(nibble), last = (1u << bits) - 1;
      for (int64_t p = 0; p < codes; ++p) {
        level[p][nibble] = onebit::level(bits, plain >> (bits * p) & last) / unit_of(bits);
      }
    }
  }
};

template <typename T>
PEFTKERN_INLINE void store_first(T* to, F v, int64_t n) {
  n >= W ? store(to, v) : store_some(to, v, n);
}

}  // namespace peftkern::onebit::PEFTKERN_ISA
