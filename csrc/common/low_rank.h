// The small products of the low-rank term, blocked in registers. Each output is one sum in one
// order.
#pragma once
#include "common/blocks.h"
#include "common/kernels.h"
#include "common/simd.h"

namespace peftkern::PEFTKERN_ISA {

// R rows, V vectors of columns from column c on; the last vector has `rest` lanes.
template <int R, int V, typename T>
PEFTKERN_INLINE void product_block(const Product<T>& io, int64_t row, int64_t c) {
  constexpr int64_t kLanes = Vector<T>::lanes;
  typename Vector<T>::type total[R][V] = {};
  const int64_t rest = min(io.columns - c - (V - 1) * kLanes, kLanes);
  add_products<R, V>(io.x + row * io.x_row, io.x_row, io.x_column, io.p + c, io.p_row, io.depth,
                     rest, total);
  PEFTKERN_UNROLL
  for (int r = 0; r < R; ++r) {
    PEFTKERN_UNROLL
    for (int v = 0; v < V; ++v) {
      T* to = io.out + (row + r) * io.out_row + c + v * kLanes;
      const int64_t n = v + 1 < V ? kLanes : rest;
      const auto sum = total[r][v] * io.scale;
      write(to, io.add ? read(to, n) + sum : sum, n);
    }
  }
}

// Rows from `row` on in blocks of R, what is left in smaller ones.
template <int R, int V, typename T>
PEFTKERN_INLINE void product_rows(const Product<T>& io, int64_t row, int64_t c) {
  for (; row + R <= io.rows; row += R) product_block<R, V>(io, row, c);
  if constexpr (R > 1) {
    if (row < io.rows) product_rows<R / 2, V>(io, row, c);
  }
}

// A long sum is a sum of short ones: an error that grows with the length of each alone.
template <typename T>
void product(const Product<T>& io) {
  constexpr int64_t kLanes = Vector<T>::lanes;
  int64_t j = 0;
  do {
    Product<T> part = io;
    part.x += j * io.x_column;
    part.p += j * io.p_row;
    part.depth = min(io.depth - j, kSumLength);
    part.add = io.add || j > 0;
    int64_t c = 0;
    if constexpr (kVectors > 1) {
      for (; c + kLanes < io.columns; c += 2 * kLanes) {
        product_rows<kRegisters / 2, 2>(part, 0, c);
      }
    }
    for (; c < io.columns; c += kLanes) product_rows<kRegisters, 1>(part, 0, c);
    j += kSumLength;
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

#if defined(__AVX512F__)
inline constexpr int kDotsWidth = 4;
#else
inline constexpr int kDotsWidth = 2;
#endif

template <int R>
PEFTKERN_INLINE void dots_rows(const Dots<float>& io, int64_t row) {
  constexpr int C = kDotsWidth;
  int64_t j = 0;
  for (; j + C <= io.rank; j += C) dots_block<R, C>(io, row, j);
  for (; j < io.rank; ++j) dots_block<R, 1>(io, row, j);
}

void dots(const Dots<float>& io) {
  int64_t row = 0;
  for (; row + 4 <= io.rows; row += 4) dots_rows<4>(io, row);
  for (; row < io.rows; ++row) dots_rows<1>(io, row);
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
