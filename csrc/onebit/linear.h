// onebit's linear for inference: y = x W^T + bias, straight from packed codes.
//
// On the CPU the codes are laid out as 32-bit words, little-endian, in this order:
//   word[block][tile][i][lane]   of row 16 tile + lane, its word 16 block + i
// A row's words are its bytes, four to a word, so each nibble holds 4 / bits codes; only that a
// nibble from 8 on has its three low bits turned over. Levels are odd, so those three bits then
// find a magnitude and the fourth one its sign. The last block has as many words as are left, the
// last tile 16 rows: what is outside of the matrix is zero.
//
// Why: of one row of x, the sums over the columns of a nibble take 16 values. They are computed
// once, and then each nibble of W costs a lookup and an addition, which serve as many rows of W as
// a register has lanes.
//
// Sums are float, over kBlockWords words in order and then over these sums in order, so how rows of
// x and of W are split does not change a bit.
#pragma once
#include "onebit/onebit.h"

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
};

// W = mean + scale * level / unit_of, scale = std * unit_of. Kernels divide the levels by this, so
// that those of one bit are -1 and 1, and products with them exact.
constexpr double unit_of(int64_t bits) { return bits == 1 ? level(1, 1) : 1; }

// y[m, n] = scale * sum_k x[m, k] level[n, k] / unit + mean * sum_k x[m, k] + bias[n]
struct Product {
  const float* x;     // [inputs, columns]
  const float* bias;  // [rows], or null
  float* y;           // [inputs, rows]
  int64_t inputs;
  float mean, scale;
};

// out[k - column_begin, n - row_begin] = level[n, k] / unit for rows [row_begin, row_end) of W and
// the columns of its words [word_begin, word_end)
struct Panel {
  int64_t row_begin, row_end;  // row_begin: a multiple of kTileRows
  int64_t word_begin, word_end;
  int64_t stride;  // between rows of out
};

// How one dtype meets W otherwise: by panels of levels for the library's product.
template <typename T, typename Sums = float>
struct PanelKernels {
  void (*panel)(const LaidOut& weight, const Panel& panel, T* out);
  // One row of x and of y: y = scale * y + mean * sum of x + bias. Sums: float, double for double.
  void (*finish)(const T* x, int64_t columns, double mean, double scale, const Sums* bias,
                 int64_t rows, T* y);
};

// A number for each width of a code.
struct Most {
  int64_t of_one, of_two, of_four;
  constexpr int64_t at(int64_t bits) const {
    return bits == 1 ? of_one : bits == 2 ? of_two : of_four;
  }
};

struct LinearKernels {
  // Tiles [begin, end) of canonical bytes.
  void (*lay_out)(const uint8_t* packed, int64_t rows, int64_t columns, int64_t bits, int64_t begin,
                  int64_t end, uint8_t* words);
  // The rows of W in tiles [begin, end), for all rows of x.
  void (*product)(const LaidOut& weight, const Product& io, int64_t begin, int64_t end);
  // The most rows of x for which that is faster than panels, in float and in bf16 where the library
  // multiplies in it.
  Most most, most_bf16;
  PanelKernels<float> f32;
  PanelKernels<double, double> f64;
  PanelKernels<peftkern::bf16> bf16;
};

PEFTKERN_DECLARE(LinearKernels, linear_kernels)

inline const LinearKernels& linear_kernels() { return PEFTKERN_SELECT(linear_kernels); }

}  // namespace peftkern::onebit
