// Codes in the order of linear.h: into it, and out of it as a panel of values.
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

// A nibble as it is laid out, and back.
PEFTKERN_INLINE uint32_t turned(uint32_t word) { return word ^ (word >> 3 & 0x11111111u) * 7; }

void lay_out(const uint8_t* packed, int64_t rows, int64_t columns, int64_t bits, int64_t begin,
             int64_t end, uint8_t* to) {
  const int64_t words = words_of(columns, bits), tiles = tiles_of(rows);
  const int64_t bytes = (columns * bits + 7) / 8;
  for (int64_t tile = begin; tile < end; ++tile) {
    for (int64_t w = 0; w < words; ++w) {
      const int64_t there = min(4, bytes - 4 * w);
      uint32_t lane[kTileRows] = {};
      for (int64_t i = 0; i < min(kTileRows, rows - tile * kTileRows); ++i) {
        const uint8_t* from = packed + (tile * kTileRows + i) * bytes + 4 * w;
        std::memcpy(&lane[i], from, static_cast<size_t>(there));
        lane[i] = turned(lane[i]);
      }
      const int64_t place = place_of(tiles, words, w / kBlockWords, tile);
      std::memcpy(to + 4 * (place + w % kBlockWords * kTileRows), lane, sizeof lane);
    }
  }
}

// What the laid out nibbles stand for: of each of their codes, the level.
struct Meaning {
  int codes;           // in a nibble
  float level[4][16];  // [code][nibble]

  explicit Meaning(const LaidOut& weight) : codes(static_cast<int>(4 / weight.bits)) {
    for (uint32_t nibble = 0; nibble < 16; ++nibble) {
      const uint32_t plain = turned(nibble), last = (1u << weight.bits) - 1;
      for (int p = 0; p < codes; ++p) {
        level[p][nibble] = weight.levels[plain >> (weight.bits * p) & last];
      }
    }
  }
};

template <typename T>
PEFTKERN_INLINE void store_first(T* to, F v, int64_t n) {
  n >= W ? store(to, v) : n > 0 ? store_some(to, v, n) : void();
}

template <typename T>
void panel(const LaidOut& weight, const Panel& at, int64_t word_begin, int64_t word_end, T* out) {
  const Meaning meaning(weight);
  const int64_t words = words_of(weight.columns, weight.bits), tiles = tiles_of(weight.rows);
  const int64_t per_word = kNibbles * meaning.codes, height = at.row_end - at.row_begin;
  float values[4][16];
  for (int p = 0; p < meaning.codes; ++p) {
    for (int i = 0; i < 16; ++i) values[p][i] = weight.mean + weight.scale * meaning.level[p][i];
  }
  const Table table[4] = {Table(values[0]), Table(values[1]), Table(values[2]), Table(values[3])};
  for (int64_t w = word_begin; w < word_end; ++w) {
    const int64_t columns = min(per_word, weight.columns - w * per_word);
    for (int64_t n = 0; n < height; n += W) {
      const int64_t row = at.row_begin + n;
      const int64_t place = place_of(tiles, words, w / kBlockWords, row / kTileRows) +
                            w % kBlockWords * kTileRows + row % kTileRows;
      const U word = load_bits<U>(weight.words + 4 * place);
      T* to = out + w * per_word * at.stride + n;
      for (int64_t k = 0; k < columns; ++k, to += at.stride) {
        const uint32_t nibble = static_cast<uint32_t>(k / meaning.codes);
        const Table& by = table[k % meaning.codes];
        store_first(to, Table::look_up(by, word >> (4 * nibble)), height - n);
      }
    }
  }
}

}  // namespace peftkern::onebit::PEFTKERN_ISA
