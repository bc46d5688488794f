// Some rows of x in bf16, 64 at a time, times W^T in the CPU's matrix unit: W is decoded 128
// columns at a time into tiles of 16 rows by 32 columns, each of which meets 16 rows of x in one
// instruction, while the next are decoded. W is rounded to bf16 as a panel of it is; sums are
// float.
#pragma once
#include "qlora/few_rows.h"

namespace peftkern::qlora::PEFTKERN_ISA {

#if !defined(__AMX_BF16__)

inline constexpr FewRowsKernels kRowsBf16{};

#else

inline constexpr int64_t kSide = 16;           // of a square of sums: rows of W, rows of x
inline constexpr int64_t kSquare = 16 * 16;    // lanes of 32 bits in a tile
inline constexpr int kPerLane = 4;             // codes in 16 bits; tiles in 16 rows of a chunk
inline constexpr int64_t kAmxScales = 512;     // of a row
inline constexpr int64_t kMostTogether = 64;   // rows of x: four squares are all that there are
inline constexpr int64_t kMostFewRowsAmx = 1;  // for one, few_rows takes as long

// Panels are ahead from so many rows of x on: the shorter a row of W is, the more weighs what comes
// before and after its product. 256 rows of x take 5.0 ms at 4096 x 4096, panels 5.1; 128 rows 0.79
// at 2048 x 2048, panels 0.93; and 192 rows 1.19 and 1.08.
int64_t most_amx(const Weight& weight) {
  // A lookup takes five bits of its index: two blocks' values, and no more, fit into its table.
  const bool readable = weight.bits == 4 && weight.block >= kChunk / 2 && serves_few_rows(weight);
  if (!readable || weight.columns / weight.block > kAmxScales) return 0;
  return min(4 * kMostTogether, max(kMostTogether, weight.columns / 16));
}

// Rows of x pass in turns, all in as many squares of the same width; what the last square of a turn
// lacks is zeros.
struct Turns {
  int64_t inputs, count, each, squares, width;

  explicit Turns(int64_t inputs)
      : inputs(inputs),
        count((inputs + kMostTogether - 1) / kMostTogether),
        each((inputs + count - 1) / count),
        squares((each + kSide - 1) / kSide),
        width((each + squares - 1) / squares) {}
  int64_t rows() const { return squares * width; }
};

int64_t laid_out_amx(int64_t inputs, int64_t columns) {
  const Turns turns(inputs);
  return turns.count * turns.rows() * laid_out_width(columns);
}

// out[turn][chunk][square][k][p][m][i] = x[m, chunk * kChunk + kPerLane * (2 p + i) + k], i < 2,
// with m within its square; zeros behind the end of a row.
void lay_out_amx(const Weight& weight, const void* x, int64_t inputs, int64_t m, void* out) {
  const Turns turns(inputs);
  const int64_t columns = weight.columns, turn = m / turns.each, i = m % turns.each;
  const uint16_t* from = static_cast<const uint16_t*>(x) + m * columns;
  uint32_t* to = static_cast<uint32_t*>(out) + turn * turns.rows() * laid_out_width(columns) / 2;
  const auto put = [&](int64_t begin, int64_t there, int64_t place) {
    uint16_t row[kChunk] = {};
    std::memcpy(row, from + begin, static_cast<size_t>(2 * there));
    uint32_t* at =
        to + (begin / kChunk * turns.rows() + place / turns.width * turns.width) * kChunk / 2;
    at += place % turns.width;
    for (int k = 0; k < kPerLane; ++k) {
      for (int p = 0; p < kSide; ++p, at += turns.width) {
        *at = row[8 * p + k] | static_cast<uint32_t>(row[8 * p + kPerLane + k]) << 16;
      }
    }
  };
  const bool last = i + 1 == turns.each || m + 1 == inputs;
  for (int64_t begin = 0; begin < columns; begin += kChunk) {
    put(begin, min(kChunk, columns - begin), i);
    for (int64_t missing = i + 1; last && missing < turns.rows(); ++missing) put(begin, 0, missing);
  }
}

// Tiles have numbers, as registers do. 0 to 3: sums, of each square of x one for each 16 rows of W;
// 4 and 5: W; 6 and 7: x.
struct TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};

  explicit TileConfig(int64_t width) {
    for (int t = 0; t < 8; ++t) {
      rows[t] = kSide;
      row_bytes[t] = static_cast<uint16_t>(t == 4 || t == 5 ? 4 * kSide : 4 * width);
    }
  }
};
template <int T>
PEFTKERN_INLINE void load_tile(const void* from, int64_t row_bytes) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(row_bytes), "i"(T) : "memory");
}
template <int T>
PEFTKERN_INLINE void clear_tile() {
  asm volatile("tilezero %%tmm%c0" ::"i"(T));
}
template <int T>
PEFTKERN_INLINE void store_tile(void* to, int64_t row_bytes) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(row_bytes), "i"(T) : "memory");
}
template <int Sums, int Left, int Right>
PEFTKERN_INLINE void multiply_tiles() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(Sums), "i"(Left), "i"(Right));
}

// A chunk of a row of W, times its scales, into its row of each of four tiles.
PEFTKERN_INLINE void decode_amx(const NibblePlan& plan, F codebook, const uint8_t* row,
                                const float* scales, int64_t chunk, int64_t ahead, uint32_t* to) {
  const int64_t first = plan.per_chunk ? chunk * plan.per_chunk : chunk / plan.chunks_per_block;
  const int64_t second = plan.per_chunk == 2 ? min(first + 1, plan.blocks - 1) : first;
  const __m512i table = __m512i(
      _mm512_cvtne2ps_pbh(codebook * splat(scales[second]), codebook * splat(scales[first])));
  const __m512i nibble = _mm512_set1_epi16(15);
  const __m512i upper = _mm512_inserti64x4(_mm512_setzero_si512(), _mm256_set1_epi16(16), 1);
  const uint32_t* packed = reinterpret_cast<const uint32_t*>(row) + chunk * W;
  const __m512i word = __m512i(load_first(packed, plan.words - chunk * W));
  __builtin_prefetch(reinterpret_cast<const char*>(packed) + ahead);
  const __m512i codes[kPerLane] = {_mm512_srli_epi16(word, 4), word, _mm512_srli_epi16(word, 12),
                                   _mm512_srli_epi16(word, 8)};
  PEFTKERN_UNROLL
  for (int k = 0; k < kPerLane; ++k) {
    const __m512i index = _mm512_ternarylogic_epi32(codes[k], nibble, upper, 0xEA);  // and, or
    _mm512_store_si512(to + k * kSquare, _mm512_permutexvar_epi16(index, table));
  }
}

// Up to 16 rows of W from n on, of `all`, times `inputs` rows of x from `first` on.
struct Rows {
  int64_t all, n, count, first, inputs;
};

// y of these rows: their sums, which lie as sums[square][n][m]; the bias; and the low-rank term,
// for which B is turned, so that its sums run in lanes too.
PEFTKERN_INLINE void finish_rows(const FewRows& io, const Rows& rows, const float* sums,
                                 int64_t width, int64_t square) {
  constexpr int64_t kRanks = 64;
  const __mmask16 some = first(rows.count);
  const __m512i lane = __m512i(lanes());
  const __m512i in_sums = _mm512_mullo_epi32(lane, _mm512_set1_epi32(static_cast<int>(width)));
  const __m512i in_b = _mm512_mullo_epi32(lane, _mm512_set1_epi32(static_cast<int>(io.rank)));
  const F bias = io.bias ? load_first(io.bias + rows.n, rows.count) : F{};
  const int64_t rank = io.lora_b ? io.rank : 0;
  for (int64_t begin = 0; begin == 0 || begin < rank; begin += kRanks) {
    F b[kRanks];
    const int64_t ranks = min(kRanks, rank - begin);
    for (int64_t j = 0; j < ranks; ++j) {
      const float* from = io.lora_b + rows.n * rank + begin + j;
      b[j] = F(_mm512_mask_i32gather_ps(__m512(F{}), some, in_b, from, 4));
    }
    for (int64_t m = 0, place = 0; m < rows.inputs; ++m) {
      float* y = io.y + (rows.first + m) * rows.all + rows.n;
      F sum = begin == 0 ? F(_mm512_i32gather_ps(in_sums, sums + place, 4)) + bias
                         : load_first(y, rows.count);
      const float* down = io.down + (rows.first + m) * rank + begin;
      for (int64_t j = 0; j < ranks; ++j) sum = fma(splat(down[j]), b[j], sum);
      _mm512_mask_storeu_ps(y, some, __m512(sum));
      if (++place % width == 0) place += square - width;
    }
  }
}

// 16 H rows of W times G squares of x.
template <int H, int G>
struct Amx {
  static constexpr int64_t kStrip = H * kSide;
  static constexpr int64_t kDecoded = H * kPerLane * kSquare;

  template <int S = 0>
  PEFTKERN_INLINE void clear() {
    clear_tile<S>();
    if constexpr (S + 1 < H * G) clear<S + 1>();
  }
  template <int S = 0>
  PEFTKERN_INLINE void store(float* sums, int64_t width) {
    store_tile<S>(sums + S * kSide * width, 4 * width);
    if constexpr (S + 1 < H * G) store<S + 1>(sums, width);
  }
  // Squares g and on.
  template <int g = 0>
  PEFTKERN_INLINE void multiply(const uint32_t* x, int64_t width) {
    constexpr int kX = 6 + g % 2;
    load_tile<kX>(x, 4 * width);
    multiply_tiles<g * H, 4, kX>();
    if constexpr (H == 2) multiply_tiles<g * H + 1, 5, kX>();
    if constexpr (g + 1 < G) multiply<g + 1>(x + kPerLane * kSide * width, width);
  }

  // sums[g][h][n][m] = W x^T; decode(chunk, to) is a chunk of the strip.
  template <typename Decode>
  PEFTKERN_INLINE void strip(int64_t chunks, const Decode& decode, const uint32_t* x, int64_t width,
                             float* sums) {
    alignas(64) uint32_t decoded[2][kDecoded];
    clear();
    decode(0, decoded[0]);
    for (int64_t chunk = 0; chunk < chunks; ++chunk, x += G * kPerLane * kSide * width) {
      if (chunk + 1 < chunks) decode(chunk + 1, decoded[(chunk + 1) % 2]);
      const uint32_t* w = decoded[chunk % 2];
      for (int k = 0; k < kPerLane; ++k, w += kSquare) {
        load_tile<4>(w, 4 * kSide);
        if constexpr (H == 2) load_tile<5>(w + kPerLane * kSquare, 4 * kSide);
        multiply(x + k * kSide * width, width);
      }
    }
    store(sums, width);
  }

  // Rows [begin, end) of W times turn t of x.
  static void products(const Weight& weight, const FewRows& io, const Turns& turns, int64_t t,
                       int64_t begin, int64_t end) {
    float buffer[kStrip * kAmxScales], sums[kMostTogether * kStrip];
    const NibblePlan plan(weight);
    const F codebook = load_bits<F>(weight.codebook);
    const int64_t width = turns.width, chunks = laid_out_width(weight.columns) / kChunk;
    const int64_t first = t * turns.each, inputs = min(turns.each, io.inputs - first);
    const uint32_t* x = static_cast<const uint32_t*>(io.x) + t * turns.rows() * chunks * kChunk / 2;
    for (int64_t n = begin; n < end; n += kStrip) {
      const int64_t height = min(kStrip, end - n);
      const float* by = scales(weight, n * plan.blocks, height * plan.blocks, buffer);
      const uint8_t* codes = weight.packed + n * plan.row_bytes;
      const auto decode = [&](int64_t chunk, uint32_t* to) __attribute__((always_inline)) {
        for (int64_t i = 0; i < height; ++i) {
          decode_amx(plan, codebook, codes + i * plan.row_bytes, by + i * plan.blocks, chunk,
                     kStrip * plan.row_bytes,
                     to + i / kSide * kPerLane * kSquare + i % kSide * kSide);
        }
      };
      strip(chunks, decode, x, width, sums);
      for (int64_t i = 0; i < height; i += kSide) {
        const Rows rows{weight.rows, n + i, min(kSide, height - i), first, inputs};
        finish_rows(io, rows, sums + i * width, width, kStrip * width);
      }
    }
  }
};

void amx_products(const Weight& weight, const FewRows& io, int64_t begin, int64_t end) {
  const Turns turns(io.inputs);
  const auto kernel = turns.squares == 1   ? Amx<2, 1>::products
                      : turns.squares == 2 ? Amx<2, 2>::products
                      : turns.squares == 3 ? Amx<1, 3>::products
                                           : Amx<1, 4>::products;
  const TileConfig config(turns.width);
  asm volatile("ldtilecfg %0" ::"m"(config));
  for (int64_t t = 0; t < turns.count; ++t) kernel(weight, io, turns, t, begin, end);
  asm volatile("tilerelease");
}

inline constexpr FewRowsKernels kRowsBf16{most_amx, lay_out_amx,  laid_out_amx,
                                          nullptr,  amx_products, kMostFewRowsAmx};

#endif

}  // namespace peftkern::qlora::PEFTKERN_ISA
