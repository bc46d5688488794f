// qlora: a linear whose weight is quantised to 4 or 8 bits, with a low-rank term.
//
//   4 bits:  W[i] = codebook[code[i]] * absmax[i / block]      over the flat, row-major weight
//   8 bits:  W[n, k] = code[n, k] * (absmax[n] / 127)
//
// Codes of 4 bits, in row-major order, the first of a pair in the high bits of its byte:
//   byte j = code[2j] << 4 | code[2j + 1]; an odd count ends with the code of zero.
// Scales: float, or nested: absmax[b] = map[codes[b]] * nested_absmax[b / 256] + offset, two
// roundings. block: a power of two, 16 to 4096; blocks run on from row to row where columns % block
// != 0.
// Codes of 8 bits are signed, -127 to 127, and a row of them shares a scale: its 127th part,
// rounded once, is what every code of the row is multiplied by.
//
// W is formed in float and rounded at most once, alike in every kernel and on every instruction
// set. Sums are float. Every kernel writes a range of outputs that the caller names; threads belong
// to the caller, and any split gives the same bits.
#pragma once
#include <cstdint>

#include "common/half.h"
#include "common/isa.h"

namespace peftkern::qlora {

inline constexpr int64_t kNestedBlock = 256;
constexpr bool is_block_size(int64_t block) {
  return block >= 16 && block <= 4096 && (block & (block - 1)) == 0;
}

struct Weight {
  const uint8_t* packed;       // [ceil(count / 2)]; int8 [count] for 8 bits
  const float* absmax;         // [ceil(count / block)], or null where the scales are nested
  const uint8_t* codes;        // [ceil(count / block)], nested scales
  const float* nested_absmax;  // [ceil(blocks / 256)]
  const float* map;            // [256]
  float offset;
  const float* codebook;  // [16]; none for 8 bits
  int64_t rows, columns;
  int64_t block;        // for 8 bits a row, columns
  int64_t bits;         // 4 or 8; 0 for a dense weight
  int64_t first_block;  // the scale that belongs to packed[0]; not 0 for one of several experts
};

// How a value becomes a code of 4 bits: the number of thresholds below it, times 1 / absmax, is its
// rank, and each rank has a code. Thresholds rise; a value on one takes the lower rank.
struct Rounding {
  const float* thresholds;  // [15]
  const uint8_t* codes;     // [16], each below 16
};

// y[m, n] = sum_k x[m, k] W[n, k] + sum_j down[m, j] lora_b[n, j] + bias[n]
struct FewRows {
  const void* x;         // what `lay_out` wrote
  const float* down;     // [inputs, rank], the scale included
  const float* lora_b;   // [rows, rank], or null
  const float* bias;     // [rows], or null
  float* y;              // [inputs, rows]
  int64_t inputs, rank;  // inputs: at least 1
};

template <typename T>
struct TypedKernels {
  // Codes and scales of blocks [block_begin, block_end) of `weight` [count].
  void (*quantize)(const T* weight, int64_t count, const Rounding& rounding, int64_t block,
                   int64_t block_begin, int64_t block_end, uint8_t* packed, float* absmax);
  // Codes of 8 bits and scales of rows [begin, end): code = w * (127 * (1 / absmax)), to the
  // nearest, a tie to the even one; what is no number has the code of zero.
  void (*quantize_rows)(const T* weight, int64_t columns, int64_t begin, int64_t end, int8_t* codes,
                        float* absmax);
  // out[i - begin] = W[i], flat, for i in [begin, end). `past_caches`: what nobody reads soon, and
  // so need not be read before it is written either.
  void (*dequantize)(const Weight& weight, int64_t begin, int64_t end, bool past_caches, T* out);
};

// The ways of few rows of x in one dtype to meet W without a panel of it in memory.
struct FewRowsKernels {
  // The most rows of x for which they are faster than panels, as measured; none for a weight that
  // they cannot read: its rows have to be whole blocks, some and not too many.
  int64_t (*most)(const Weight& weight);
  // Row m of x in the order in which it meets this weight's codes; and the elements that `inputs`
  // rows of x take so. Whoever lays out a row writes the zeros that may have to stand behind it.
  void (*lay_out)(const Weight& weight, const void* x, int64_t inputs, int64_t m, void* out);
  int64_t (*laid_out)(int64_t inputs, int64_t columns);
  // Rows [begin, end) of W: decoded in registers, for up to most_few_rows rows of x; or into the
  // first-level cache, a tile at a time.
  void (*few_rows)(const Weight& weight, const FewRows& io, int64_t begin, int64_t end);
  void (*tiles)(const Weight& weight, const FewRows& io, int64_t begin, int64_t end);
  int64_t most_few_rows;
};

struct Kernels {
  TypedKernels<float> f32;
  TypedKernels<double> f64;
  TypedKernels<peftkern::bf16> bf16;
  TypedKernels<peftkern::fp16> fp16;
  FewRowsKernels rows_f32;
  FewRowsKernels rows_bf16;  // none, but where the CPU has a matrix unit; no few_rows then either
};

PEFTKERN_DECLARE(Kernels, kernels)

inline const Kernels& kernels() { return PEFTKERN_SELECT(kernels); }

}  // namespace peftkern::qlora
