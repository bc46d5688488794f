// onebit's linear for inference: y = x W^T + bias straight from packed codes, W = mean + scale *
// levels[code]. 1, 2 or 4 bits a code; canonical bytes as in onebit.h: each row begins with a byte
// of its own, and its first code stands in the byte's lowest bits.
//
// On the CPU the codes are laid out as 32-bit words, little-endian, in this order:
//   word[block][tile][i][lane]   of row 16 tile + lane, its word 16 block + i
// A row's words are its bytes, four to a word, so each nibble holds 4 / bits codes; only that a
// nibble from 8 on has its three low bits turned over. Levels are odd, levels[i] = -levels[last -
// i], so those three bits then find a magnitude and the fourth one its sign. The last block has as
// many words as are left, the last tile 16 rows: what is outside of the matrix is zero.
//
// Why: of one row of x, the sums over the columns of a nibble take 16 values. They are computed
// once, and then each nibble of W costs a lookup and an addition, which serve as many rows of W as
// a register has lanes.
//
// Sums are float, over kBlockWords words in order and then over these sums in order, so how rows of
// x and of W are split does not change a bit.
#pragma once
#include <cstdint>

#include "common/half.h"
#include "common/isa.h"

namespace peftkern::onebit {

inline constexpr int64_t kTileRows = 16, kBlockWords = 16, kNibbles = 8;

// A row's 32-bit words; and tiles of rows.
constexpr int64_t words_of(int64_t columns, int64_t bits) { return (columns * bits + 31) / 32; }
constexpr int64_t tiles_of(int64_t rows) { return (rows + kTileRows - 1) / kTileRows; }
constexpr int64_t laid_out_bytes(int64_t rows, int64_t columns, int64_t bits) {
  return tiles_of(rows) * kTileRows * words_of(columns, bits) * 4;
}

struct LaidOut {
  const uint8_t* words;  // laid_out_bytes
  int64_t rows, columns, bits;
  const float* levels;  // [2^bits], rising and odd
  float mean, scale;
};

// y[m, n] = sum_k x[m, k] W[n, k] + bias[n]
struct Product {
  const float* x;     // [inputs, columns]
  const float* bias;  // [rows], or null
  float* y;           // [inputs, rows]
  int64_t inputs;
};

// out[k, n - row_begin] = W[n, k]
struct Panel {
  int64_t row_begin, row_end;  // row_begin: a multiple of kTileRows
  int64_t stride;              // between rows of out
};

template <typename T>
using PanelKernel = void (*)(const LaidOut& weight, const Panel& panel, int64_t word_begin,
                             int64_t word_end, T* out);

struct LinearKernels {
  // Tiles [begin, end) of canonical bytes.
  void (*lay_out)(const uint8_t* packed, int64_t rows, int64_t columns, int64_t bits,
                  int64_t begin, int64_t end, uint8_t* words);
  // The rows of W in tiles [begin, end), for all rows of x.
  void (*product)(const LaidOut& weight, const Product& io, int64_t begin, int64_t end);
  // The rows of out that belong to words [word_begin, word_end), of a transposed panel of W.
  PanelKernel<float> panel_f32;
  PanelKernel<double> panel_f64;
  PanelKernel<peftkern::bf16> panel_bf16;
};

PEFTKERN_DECLARE(LinearKernels, linear_kernels)

inline const LinearKernels& linear_kernels() { return PEFTKERN_SELECT(linear_kernels); }

}  // namespace peftkern::onebit
