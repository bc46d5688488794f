// The small products of the low-rank term, blocked in registers. Each output is one sum in one
// order.
#pragma once
#include "common/kernels.h"
#include "common/simd.h"

namespace peftkern::PEFTKERN_ISA {

#if defined(__AVX512F__)
inline constexpr int kRegisters = 16;  // accumulators; as many again hold operands
#else
inline constexpr int kRegisters = 8;
#endif

PEFTKERN_INLINE void store_first(float* to, F v, int64_t n) {
  n >= W ? store(to, v) : store_some(to, v, n);
}

// R rows, V vectors of columns from column c on; the last vector may be cut short to `rest` lanes.
template <int R, int V>
PEFTKERN_INLINE void product_block(const Product<float>& io, int64_t row, int64_t c) {
  F total[R][V] = {};
  const float *x = io.x + row * io.x_row, *p = io.p + c;
  const int64_t x_row = io.x_row, depth = io.depth, rest = min(io.columns - c - (V - 1) * W, W);
  for (int64_t j = 0; j < depth; ++j, x += io.x_column, p += io.p_row) {
    F by[V];
    PEFTKERN_UNROLL
    for (int v = 0; v < V; ++v) by[v] = v + 1 < V ? load(p + v * W) : load_first(p + v * W, rest);
    PEFTKERN_UNROLL
    for (int r = 0; r < R; ++r) {
      const F one = splat(x[r * x_row]);
      PEFTKERN_UNROLL
      for (int v = 0; v < V; ++v) total[r][v] = fma(one, by[v], total[r][v]);
    }
  }
  PEFTKERN_UNROLL
  for (int r = 0; r < R; ++r) {
    PEFTKERN_UNROLL
    for (int v = 0; v < V; ++v) {
      float* to = io.out + (row + r) * io.out_row + c + v * W;
      const int64_t n = v + 1 < V ? W : rest;
      const F sum = total[r][v] * io.scale;
      store_first(to, io.add ? load_first(to, n) + sum : sum, n);
    }
  }
}

template <int V>
PEFTKERN_INLINE void product_columns(const Product<float>& io, int64_t c) {
  constexpr int R = kRegisters / V;
  int64_t row = 0;
  for (; row + R <= io.rows; row += R) product_block<R, V>(io, row, c);
  for (; row < io.rows; ++row) product_block<1, V>(io, row, c);
}

// A long sum is a sum of short ones: an error that grows with the length of each alone.
void product(const Product<float>& io) {
  constexpr int64_t kLength = 256;
  int64_t j = 0;
  do {
    Product<float> part = io;
    part.x += j * io.x_column;
    part.p += j * io.p_row;
    part.depth = min(io.depth - j, kLength);
    part.add = io.add || j > 0;
    int64_t c = 0;
    for (; c + 3 * W < io.columns; c += 4 * W) product_columns<4>(part, c);
    for (; c + W < io.columns; c += 2 * W) product_columns<2>(part, c);
    for (; c < io.columns; c += W) product_columns<1>(part, c);
    j += kLength;
  } while (j < io.depth);
}

template <int R, int C>
PEFTKERN_INLINE void dots_step(const float* x, int64_t x_row, const float* a, int64_t a_row,
                               int64_t n, F (&total)[R][C]) {
  F left[R];
  PEFTKERN_UNROLL
  for (int r = 0; r < R; ++r) left[r] = load_first(x + r * x_row, n);
  PEFTKERN_UNROLL
  for (int c = 0; c < C; ++c) {
    const F right = load_first(a + c * a_row, n);
    PEFTKERN_UNROLL
    for (int r = 0; r < R; ++r) total[r][c] = fma(left[r], right, total[r][c]);
  }
}

template <int R, int C>
PEFTKERN_INLINE void dots_block(const Dots<float>& io, int64_t row, int64_t j) {
  F total[R][C] = {};
  const float *x = io.x + row * io.x_row, *a = io.a + j * io.columns;
  const int64_t columns = io.columns, whole = columns / W * W;
  for (int64_t k = 0; k < whole; k += W) {
    dots_step<R, C>(x + k, io.x_row, a + k, columns, W, total);
  }
  if (whole < columns) {
    dots_step<R, C>(x + whole, io.x_row, a + whole, columns, columns - whole, total);
  }
  PEFTKERN_UNROLL
  for (int r = 0; r < R; ++r) {
    PEFTKERN_UNROLL
    for (int c = 0; c < C; ++c) io.out[(row + r) * io.out_row + j + c] = sum(total[r][c]);
  }
}

template <int R>
PEFTKERN_INLINE void dots_rows(const Dots<float>& io, int64_t row) {
  constexpr int C = kRegisters / 4;
  int64_t j = 0;
  for (; j + C <= io.rank; j += C) dots_block<R, C>(io, row, j);
  for (; j < io.rank; ++j) dots_block<R, 1>(io, row, j);
}

void dots(const Dots<float>& io) {
  int64_t row = 0;
  for (; row + 4 <= io.rows; row += 4) dots_rows<4>(io, row);
  for (; row < io.rows; ++row) dots_rows<1>(io, row);
}

void product(const Product<double>& io) {
  for (int64_t i = 0; i < io.rows; ++i) {
    for (int64_t c = 0; c < io.columns; ++c) {
      double sum = 0;
      for (int64_t j = 0; j < io.depth; ++j) {
        sum += io.x[i * io.x_row + j * io.x_column] * io.p[j * io.p_row + c];
      }
      double& to = io.out[i * io.out_row + c];
      to = io.scale * sum + (io.add ? to : 0.0);
    }
  }
}

void dots(const Dots<double>& io) {
  for (int64_t i = 0; i < io.rows; ++i) {
    for (int64_t j = 0; j < io.rank; ++j) {
      double sum = 0;
      for (int64_t k = 0; k < io.columns; ++k) {
        sum += io.x[i * io.x_row + k] * io.a[j * io.columns + k];
      }
      io.out[i * io.out_row + j] = sum;
    }
  }
}

}  // namespace peftkern::PEFTKERN_ISA
