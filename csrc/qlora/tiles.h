// Some rows of x times W^T, by tiles of W that are decoded once into the first-level cache. Between
// few_rows, which decodes in registers for up to four rows of x, and the library's product on
// panels, which takes its time to begin.
#pragma once
#include "qlora/few_rows.h"

namespace peftkern::qlora::PEFTKERN_ISA {

// kTileHeight: rows of W in a tile; times a group of x, the accumulators. The crossovers are where
// the next way is faster at 4096 x 4096 in float: on AVX-512 tiles take 7.5 ms for 64 rows and
// panels 10.2, for 96 rows 12.6 and 12.9. Without FMA the library is ahead from the start.
#if defined(__AVX512F__)
inline constexpr int kTileHeight = 6;
inline constexpr int64_t kMostFewRows = 2, kMostTiles = 64;
#elif defined(__AVX2__)
inline constexpr int kTileHeight = 3;
inline constexpr int64_t kMostFewRows = 3, kMostTiles = 32;
#else
inline constexpr int kTileHeight = 3;
inline constexpr int64_t kMostFewRows = 4, kMostTiles = 4;
#endif
inline constexpr int64_t kTileDepth = 1024;
// Rows whose distance is a power of two would fall into the same few places of the cache.
inline constexpr int64_t kTileStride = kTileDepth + W;
inline constexpr int64_t kTileMost = 64;  // rows of x that pass one tile

// sums[m][n] += x[m, :] tile[n, :] for M rows of x and all rows of the tile.
template <int M>
PEFTKERN_INLINE void tile_step(const float* x, const float* tile, int64_t depth, F* sums) {
  constexpr int H = kTileHeight;
  F total[M][H];
  PEFTKERN_UNROLL
  for (int m = 0; m < M; ++m) {
    PEFTKERN_UNROLL
    for (int n = 0; n < H; ++n) total[m][n] = sums[m * H + n];
  }
  for (int64_t k = 0; k < depth; k += W, x += M * W) {
    F right[H];
    PEFTKERN_UNROLL
    for (int n = 0; n < H; ++n) right[n] = load(tile + n * kTileStride + k);
    PEFTKERN_UNROLL
    for (int m = 0; m < M; ++m) {
      const F left = load(x + m * W);
      PEFTKERN_UNROLL
      for (int n = 0; n < H; ++n) total[m][n] = fma(left, right[n], total[m][n]);
    }
  }
  PEFTKERN_UNROLL
  for (int m = 0; m < M; ++m) {
    PEFTKERN_UNROLL
    for (int n = 0; n < H; ++n) sums[m * H + n] = total[m][n];
  }
}

PEFTKERN_INLINE void tile_group(int64_t rows, const float* x, const float* tile, int64_t depth,
                                F* sums) {
  switch (rows) {
    case 1:
      return tile_step<1>(x, tile, depth, sums);
    case 2:
      return tile_step<2>(x, tile, depth, sums);
    case 3:
      return tile_step<3>(x, tile, depth, sums);
    default:
      return tile_step<kGroup>(x, tile, depth, sums);
  }
}

// Chunks [begin, end) of a row of W, times their scales.
template <typename Plan>
PEFTKERN_INLINE void decode_row(const Plan& plan, const uint8_t* row, const float* scales,
                                int64_t begin, int64_t end, float* out) {
  const int64_t ahead = kTileHeight * plan.row_bytes;  // the same part of the next tile
  for (int64_t chunk = begin; chunk < end; ++chunk, out += kChunk) {
    F value[8];
    decode(plan, row, chunk, ahead, value);
    const F by = chunk_scale(plan, scales, chunk);
    PEFTKERN_UNROLL
    for (int k = 0; k < 8; ++k) store(out + k * W, value[k] * by);
  }
}

template <typename Plan>
PEFTKERN_INLINE void tiles_by(const Plan& plan, const Weight& weight, const FewRows& io,
                              int64_t begin, int64_t end) {
  constexpr int64_t kChunks = kTileDepth / kChunk;
  alignas(64) float tile[kTileHeight * kTileStride] = {};
  float buffer[kTileHeight * kTileScales];
  const int64_t width = laid_out_width(weight.columns), chunks = width / kChunk;
  for (int64_t n = begin; n < end; n += kTileHeight) {
    const int64_t height = min(kTileHeight, end - n);
    const float* by = scales(weight, n * plan.blocks, height * plan.blocks, buffer);
    for (int64_t first = 0; first < io.inputs; first += kTileMost) {
      const int64_t inputs = min(kTileMost, io.inputs - first);
      F sums[kTileMost * kTileHeight] = {};
      for (int64_t chunk = 0; chunk < chunks; chunk += kChunks) {
        const int64_t stop = min(chunk + kChunks, chunks), depth = (stop - chunk) * kChunk;
        for (int64_t i = 0; i < height; ++i) {
          decode_row(plan, weight.packed + (n + i) * plan.row_bytes, by + i * plan.blocks, chunk,
                     stop, tile + i * kTileStride);
        }
        for (int64_t m = 0; m < inputs; m += kGroup) {
          const int64_t rows = min(kGroup, inputs - m);
          const float* x =
              static_cast<const float*>(io.x) + (first + m) * width + rows * chunk * kChunk;
          tile_group(rows, x, tile, depth, sums + m * kTileHeight);
        }
      }
      for (int64_t m = 0; m < inputs; ++m) {
        for (int64_t i = 0; i < height; ++i) {
          io.y[(first + m) * weight.rows + n + i] =
              finish(io, sums[m * kTileHeight + i], first + m, n + i);
        }
      }
    }
  }
}

int64_t most_rows(const Weight& weight) { return serves_few_rows(weight) ? kMostTiles : 0; }

void tiles(const Weight& weight, const FewRows& io, int64_t begin, int64_t end) {
  if (weight.bits == 8) return tiles_by(BytePlan(weight), weight, io, begin, end);
  tiles_by(NibblePlan(weight), weight, io, begin, end);
}

}  // namespace peftkern::qlora::PEFTKERN_ISA
