// sparse: a matrix of which some entries are there, S[i_k, j_k] = values[k], counted row by row.
//
//   sddmm         values[k] = scale * sum_m grad[m, i_k] x[m, j_k]; `add`: and what was there
//   conv2d_sddmm  the same, where x[m, j] is what output m sees under column j of the weight
//   matmul        y[m, i]   = residual[m, i] + scale * sum_k values[k] x[m, j_k]   over i_k == i
//   matmul_t      dx[m, j]  = residual[m, j] + scale * sum_k values[k] grad[m, i_k]  over j_k == j
//   gather        values[k] = weight[i_k, j_k]; scatter is the way back
//
// A pattern is one of two, both in the order of values:
//   csr      row_start [rows + 1], columns [nnz], rising in each row: uint16 where the matrix has
//            at most 65536 columns, else int32
//   bitmap   bits [rows, ceil(columns / 32)]: bit b of word w is column 32 w + b, zero behind the
//            last one; prefix [rows, ceil(columns / 128)]: the position of the row's first entry at
//            or behind the tile's first column
// row_start and prefix are int32, and int64 where there are 2^31 entries.
//
// Sums are float, and double of double: over the tokens of a block in lanes, and then over blocks
// in order. Threads belong to the caller, who gives each the outputs that it owns: a range of rows,
// or of rows and columns; no split changes a bit.
#pragma once
#include <cstdint>

#include "common/half.h"
#include "common/isa.h"

namespace peftkern::sparse {

inline constexpr int64_t kWord = 32, kTile = 128;  // columns of a bitmap's word, of its prefix

struct Pattern {
  bool is_bitmap;
  int64_t rows, columns, nnz;
  const void* places;     // bits; or the columns of a csr
  const void* positions;  // prefix; or the row_start of a csr
  bool wide;              // positions of 64 bits
};

constexpr int64_t words_of(int64_t columns) { return (columns + kWord - 1) / kWord; }
constexpr int64_t tiles_of(int64_t columns) { return (columns + kTile - 1) / kTile; }
constexpr bool is_small(int64_t columns) { return columns <= 65536; }

// The outputs that one call owns. Columns begin where a tile does.
struct Block {
  int64_t row_begin, row_end, column_begin, column_end;
};

// x [tokens, width] in any layout, strides counted in elements.
template <typename T>
struct Operand {
  const T* data;
  int64_t token_stride, column_stride;
};

// What the outputs of a convolution see of its input: token m is output (image, p, q), column j is
// (channel, r, s), and x[m, j] is there at (image, channel, p * step - before + r * dilation, ...),
// and zero outside. Element strides, so that channels may come last.
template <typename T>
struct Window {
  const T* data;  // of this group's first channel
  int64_t image_stride, channel_stride, row_stride, column_stride;
  int64_t height, width;          // of the input
  int64_t out_height, out_width;  // of the output
  int64_t kernel_height, kernel_width, step_down, step_right, above, left, down, right;
};

// grad [tokens, rows] as the outputs of a convolution lie: image by image.
template <typename T>
struct Images {
  const T* data;
  int64_t image_stride, channel_stride, row_stride, column_stride;
  int64_t out_height, out_width;
};

inline constexpr int64_t kLanes = 16, kStrip = 16, kListedRows = 4096;

// Tokens of a block, and the memory of one call.
template <typename A>
struct Room {
  int64_t length;  // a multiple of kLanes
  A* panel;        // [columns of the block, length]: the operand, turned so that tokens lie in rows
  A* strip;        // [kStrip, length]: some rows of the other operand
  uint32_t* places;  // [columns of the block + kLanes]: the columns of one row's entries
  // Of sddmm and a bitmap: the columns of many rows' entries, and where each row's begin.
  uint16_t* list;    // [most_listed + kLanes], at least the columns of the block
  uint32_t* listed;  // [kListedRows + 1]
  int64_t most_listed;
};

template <typename A>
struct Sampled {
  int64_t tokens;
  A scale;
  bool add;
  A* values;
};

// The matrix of a product beside S: residual and out [tokens, width], dense; no residual, no sum.
template <typename T, typename A>
struct Beside {
  const T* residual;
  T* out;
  const A* values;
  int64_t tokens;
  A scale;
};

// A weight [rows, outer, inner]; dense has inner = columns.
struct Strides {
  int64_t row, outer, inner_size, inner;
};

template <typename T, typename A>
struct TypedKernels {
  void (*sddmm)(const Pattern& pattern, const Block& block, const Operand<T>& x,
                const Operand<T>& grad, const Sampled<A>& io, const Room<A>& room);
  // Rows of one group, whose first channel the window begins with.
  void (*conv2d_sddmm)(const Pattern& pattern, const Block& block, const Window<T>& x,
                       const Images<T>& grad, const Sampled<A>& io, const Room<A>& room);
  // The same by the library's product, where it is faster: to[c * length + m] = x[token + m,
  // first + c] of `tokens` and `count`; and what a pattern takes of the product of a block.
  double dense_from;  // the density
  void (*turn)(const Operand<T>& x, int64_t token, int64_t tokens, int64_t first, int64_t count,
               int64_t length, A* to);
  void (*turn_window)(const Window<T>& x, int64_t token, int64_t tokens, int64_t first,
                      int64_t count, int64_t length, A* to);
  void (*turn_images)(const Images<T>& x, int64_t token, int64_t tokens, int64_t first,
                      int64_t count, int64_t length, A* to);
  void (*collect)(const Pattern& pattern, const Block& block, const A* product,
                  const Sampled<A>& io, uint32_t* places);
  // Rows of the block, for tokens [begin, end); and its columns.
  void (*matmul)(const Pattern& pattern, const Block& block, const Operand<T>& x,
                 const Beside<T, A>& io, int64_t begin, int64_t end, const Room<A>& room);
  void (*matmul_t)(const Pattern& pattern, const Block& block, const Operand<T>& grad,
                   const Beside<T, A>& io, int64_t begin, int64_t end, const Room<A>& room);
  // Rows [begin, end).
  void (*gather)(const Pattern& pattern, const T* weight, const Strides& strides, int64_t begin,
                 int64_t end, A* values);
  void (*scatter)(const Pattern& pattern, T* weight, const Strides& strides, int64_t begin,
                  int64_t end, const A* values);
};

struct Kernels {
  TypedKernels<float, float> f32;
  TypedKernels<double, double> f64;
  TypedKernels<peftkern::bf16, float> bf16;
  TypedKernels<peftkern::fp16, float> fp16;
  // Whether rows [begin, end) hold what the contract says: no entry lies outside of the matrix, and
  // each position is that of one entry.
  bool (*holds)(const Pattern& pattern, int64_t begin, int64_t end);
};

PEFTKERN_DECLARE(Kernels, kernels)

inline const Kernels& kernels() { return PEFTKERN_SELECT(kernels); }

}  // namespace peftkern::sparse
