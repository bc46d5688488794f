// Few rows of x times W^T, straight from the packed bytes: each weight is decoded in registers,
// once for a group of rows.
#pragma once
#include "qlora/chunks.h"

namespace peftkern::qlora::PEFTKERN_ISA {

// How far ahead of the codes in use memory is asked for: rows follow one another, but the hardware
// asks for a new page only once it is touched.
inline constexpr int64_t kAhead = 2048;
// A tile of rows stays in the cache while every row of x passes, and its scales are decoded once.
inline constexpr int64_t kTile = 16;

// The low-rank term, one more stretch of the same sum; and the bias.
PEFTKERN_INLINE float finish(const FewRows& io, F total, int64_t input, int64_t n) {
  for (int64_t j = 0; io.lora_b && j < io.rank; j += W) {
    total = fma(load_first(io.lora_b + n * io.rank + j, io.rank - j),
                load_first(io.down + input * io.rank + j, io.rank - j), total);
  }
  return sum(total) + (io.bias ? io.bias[n] : 0.0f);
}

// Row n of W, whose codes and scales are given, times M rows of x.
template <int M, typename Plan>
PEFTKERN_INLINE void one_row(const Plan& plan, const uint8_t* codes, const float* scales,
                             const FewRows& io, int64_t width, int64_t input, int64_t n,
                             int64_t rows) {
  const float* x = static_cast<const float*>(io.x) + input * width;  // a group of M rows
  F total[M] = {};
  for (int64_t chunk = 0; chunk * kChunk < width; ++chunk, x += M * kChunk) {
    F value[8], part[M] = {};
    decode(plan, codes, chunk, kAhead, value);
    PEFTKERN_UNROLL
    for (int k = 0; k < 8; ++k) {
      PEFTKERN_UNROLL
      for (int m = 0; m < M; ++m) {
        part[m] = fma(value[k], load(x + (k * M + m) * W), part[m]);
      }
    }
    const F by = chunk_scale(plan, scales, chunk);
    PEFTKERN_UNROLL
    for (int m = 0; m < M; ++m) total[m] = fma(by, part[m], total[m]);
  }
  PEFTKERN_UNROLL
  for (int m = 0; m < M; ++m) io.y[(input + m) * rows + n] = finish(io, total[m], input + m, n);
}

template <int M, typename Plan>
PEFTKERN_INLINE void tile_of(const Plan& plan, const Weight& weight, const float* scales,
                             const FewRows& io, int64_t input, int64_t begin, int64_t end) {
  const int64_t width = laid_out_width(weight.columns);
  const uint8_t* codes = weight.packed + begin * plan.row_bytes;
  for (int64_t n = begin; n < end; ++n, codes += plan.row_bytes, scales += plan.blocks) {
    one_row<M>(plan, codes, scales, io, width, input, n, weight.rows);
  }
}

template <typename Plan>
PEFTKERN_INLINE void few_rows_by(const Plan& plan, const Weight& weight, const FewRows& io,
                                 int64_t begin, int64_t end) {
  const int64_t tile = min(kTile, kTileScales / plan.blocks);
  float buffer[kTileScales];
  for (int64_t n = begin; n < end; n += tile) {
    const int64_t stop = min(n + tile, end);
    const float* by = scales(weight, n * plan.blocks, (stop - n) * plan.blocks, buffer);
    for (int64_t input = 0; input < io.inputs; input += kGroup) {
      switch (io.inputs - input) {
        case 1:
          tile_of<1>(plan, weight, by, io, input, n, stop);
          break;
        case 2:
          tile_of<2>(plan, weight, by, io, input, n, stop);
          break;
        case 3:
          tile_of<3>(plan, weight, by, io, input, n, stop);
          break;
        default:
          tile_of<kGroup>(plan, weight, by, io, input, n, stop);
      }
    }
  }
}

void few_rows(const Weight& weight, const FewRows& io, int64_t begin, int64_t end) {
  if (weight.bits == 8) return few_rows_by(BytePlan(weight), weight, io, begin, end);
  few_rows_by(NibblePlan(weight), weight, io, begin, end);
}

}  // namespace peftkern::qlora::PEFTKERN_ISA
