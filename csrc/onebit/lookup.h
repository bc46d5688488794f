// Rows of x times W^T by lookup: no code is ever turned into its value.
#pragma once
#include "onebit/laid_out.h"

namespace peftkern::onebit::PEFTKERN_ISA {

// kEntries: of a nibble's table, half of it where the sign is put on afterwards. kSums: sums of a
// step, of some rows of x times some tiles of W, which have to fit the registers.
//
// kMost: where panels get faster at 4096 x 4096 on two cores, the library with the same
// instructions. For one bit that is nowhere: on AVX-512, 256 rows take 15 ms by lookup and 26 by
// panels, on AVX2 31 and 42; a code of more bits takes as many times as long to look up. In bf16
// the library has the matrix unit: for one bit, 32 rows take 1.9 ms and 2.5, 64 rows 3.8 and 3.2.
inline constexpr int64_t kAny = INT64_MAX;
inline constexpr Most kMostBf16{48, 20, 10};
#if defined(__AVX512F__)
inline constexpr int kEntries = 16, kSums = 16;
inline constexpr Most kMost{kAny, 96, 20};
#elif defined(__AVX2__)
inline constexpr int kEntries = 8, kSums = 8;
inline constexpr Most kMost{kAny, 32, 8};
#else
inline constexpr int kEntries = 16, kSums = 8;
inline constexpr Most kMost{128, 16, 4};
#endif

// One nibble of W rows of W, and what a table has for it.
struct Nibble {
  U index;
#if defined(__AVX2__) && !defined(__AVX512F__)
  U sign;
  explicit Nibble(U word) : index(word), sign(word << 28 & 0x80000000u) {}
  PEFTKERN_INLINE F look_up(const float* table, const Nibble& n) {
    return F(U(permute(load(table), n.index)) ^ n.sign);
  }
#elif defined(__AVX512F__)
  explicit Nibble(U word) : index(word) {}
  PEFTKERN_INLINE F look_up(const float* table, const Nibble& n) {
    return permute(load(table), n.index);
  }
#else
  explicit Nibble(U word) : index(word & 15u) {}
  PEFTKERN_INLINE F look_up(const float* table, const Nibble& n) {
    F out;
    for (int i = 0; i < W; ++i) out[i] = table[n.index[i]];
    return out;
  }
#endif
};

// The levels of each code of a nibble, as entries of a table.
template <int kCodes>
struct Entries {
  F level[kCodes][kEntries / W];

  Entries() {
    const Meaning meaning(4 / kCodes);
    for (int p = 0; p < kCodes; ++p) {
      for (int e = 0; e < kEntries; ++e) {
        level[p][e / W][e % W] = static_cast<float>(meaning.level[p][e]);
      }
    }
  }
};

// The tables of a block for M rows of x, [nibble][row][kEntries]: sums over the nibble's codes of
// level * x. Adds what of x was read to `sums`.
template <int M, int kCodes>
void build(const float* x, int64_t stride, int64_t columns, int64_t words, float* tables, F* sums) {
  const Entries<kCodes> entries;
  const int64_t width = words * kNibbles * kCodes;
  alignas(64) float row[kBlockWords * kNibbles * kCodes];
  for (int m = 0; m < M; ++m, x += stride) {
    F total = sums[m];
    for (int64_t k = 0; k < width; k += W) {
      const F v = k < columns ? load_first(x + k, columns - k) : F{};
      store(row + k, v);
      total += v;
    }
    sums[m] = total;
    float* table = tables + m * kEntries;
    for (int64_t k = 0; k < width; k += kCodes, table += M * kEntries) {
      PEFTKERN_UNROLL
      for (int e = 0; e < kEntries / W; ++e) {
        F entry = entries.level[0][e] * splat(row[k]);
        PEFTKERN_UNROLL
        for (int p = 1; p < kCodes; ++p) {
          entry = fma(entries.level[p][e], splat(row[k + p]), entry);
        }
        store(table + e * W, entry);
      }
    }
  }
}

// What a step adds to, and where its sums go: rows [input, input + M) of y.
struct Step {
  const LaidOut& weight;
  const Product& io;
  int64_t input, block, words;  // words: of the block
  bool first, last;             // of the blocks
  const float* tables;
  const float* means;  // of each row of x: mean * sum of x
};

// Tiles [tile, tile + T) for M rows of x.
template <int M, int T>
PEFTKERN_INLINE void step(const Step& s, int64_t tile) {
  constexpr int kWide = T * kVectors;
  const LaidOut& weight = s.weight;
  const int64_t words = words_of(weight.columns, weight.bits), tiles = tiles_of(weight.rows);
  const uint8_t* from = weight.words + 4 * place_of(tiles, words, s.block, tile);
  const int64_t apart = 4 * kTileRows * s.words;  // of tiles
  F part[M][kWide] = {};
  const float* table = s.tables;
  for (int64_t w = 0; w < s.words; ++w, from += 4 * kTileRows) {
    U word[kWide];
    PEFTKERN_UNROLL
    for (int v = 0; v < kWide; ++v) {
      word[v] = load_bits<U>(from + v / kVectors * apart + v % kVectors * 4 * W);
    }
    PEFTKERN_UNROLL
    for (int j = 0; j < kNibbles; ++j, table += M * kEntries) {
      PEFTKERN_UNROLL
      for (int v = 0; v < kWide; ++v) {
        const Nibble nibble(word[v]);
        PEFTKERN_UNROLL
        for (int m = 0; m < M; ++m) part[m][v] += Nibble::look_up(table + m * kEntries, nibble);
        word[v] >>= 4;
      }
    }
  }
  PEFTKERN_UNROLL
  for (int v = 0; v < kWide; ++v) {
    const int64_t n = tile * kTileRows + v * W, left = weight.rows - n;
    if (left <= 0) break;
    PEFTKERN_UNROLL
    for (int m = 0; m < M; ++m) {
      float* at = s.io.y + (s.input + m) * weight.rows + n;
      F total = s.first ? part[m][v] : load_first(at, left) + part[m][v];
      if (s.last) {
        total = fma(splat(s.io.scale), total, splat(s.means[m]));
        if (s.io.bias) total += load_first(s.io.bias + n, left);
      }
      store_first(at, total, left);
    }
  }
}

template <int M, int kCodes>
void rows_of(const LaidOut& weight, const Product& io, int64_t input, int64_t begin, int64_t end) {
  constexpr int kFit = kSums / (M * kVectors), kTiles = kFit < 8 ? kFit : 8;
  alignas(64) float tables[kBlockWords * kNibbles * M * kEntries];
  const int64_t words = words_of(weight.columns, weight.bits);
  const float* x = io.x + input * weight.columns;
  F sums[M] = {};
  float means[M] = {};
  for (int64_t block = 0; block == 0 || block * kBlockWords < words; ++block) {
    const int64_t first = block * kBlockWords, column = first * kNibbles * kCodes;
    const bool last = first + kBlockWords >= words;
    const Step s{weight,     io,   input,  block, min(kBlockWords, words - first),
                 block == 0, last, tables, means};
    build<M, kCodes>(x + column, weight.columns, weight.columns - column, s.words, tables, sums);
    for (int m = 0; last && m < M; ++m) means[m] = io.mean * sum(sums[m]);
    int64_t tile = begin;
    for (; tile + kTiles <= end; tile += kTiles) step<M, kTiles>(s, tile);
    if constexpr (kTiles > 2) {
      for (; tile + 2 <= end; tile += 2) step<M, 2>(s, tile);
    }
    for (; tile < end; ++tile) step<M, 1>(s, tile);
  }
}

template <int kCodes>
PEFTKERN_INLINE void product_of(const LaidOut& weight, const Product& io, int64_t begin,
                                int64_t end) {
  int64_t input = 0;
  for (; input + 4 <= io.inputs; input += 4) rows_of<4, kCodes>(weight, io, input, begin, end);
  if (io.inputs - input >= 2) {
    rows_of<2, kCodes>(weight, io, input, begin, end);
    input += 2;
  }
  if (io.inputs > input) rows_of<1, kCodes>(weight, io, input, begin, end);
}

void product(const LaidOut& weight, const Product& io, int64_t begin, int64_t end) {
  switch (weight.bits) {
    case 1:
      return product_of<4>(weight, io, begin, end);
    case 2:
      return product_of<2>(weight, io, begin, end);
    default:
      return product_of<1>(weight, io, begin, end);
  }
}

}  // namespace peftkern::onebit::PEFTKERN_ISA
