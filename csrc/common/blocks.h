// Sums of products in registers: what every small product is made of. Sums of doubles are made one
// by one, those of floats W at a time.
#pragma once
#include "common/simd.h"

namespace peftkern::PEFTKERN_ISA {

template <typename Acc>
struct Vector;
template <>
struct Vector<float> {
  typedef F type;
  static constexpr int64_t lanes = W;
};
template <>
struct Vector<double> {
  typedef double type;
  static constexpr int64_t lanes = 1;
};

PEFTKERN_INLINE double splat(double x) { return x; }
PEFTKERN_INLINE double sum(double v) { return v; }
PEFTKERN_INLINE double fma(double a, double b, double c) { return a * b + c; }

// The first n lanes of what lies there in any dtype, and the way back.
template <typename T>
PEFTKERN_INLINE F read(const T* from, int64_t n) {
  return n >= W ? load(from) : load_some(from, n);
}
PEFTKERN_INLINE F read(const float* from, int64_t n) { return load_first(from, n); }
PEFTKERN_INLINE double read(const double* from, int64_t) { return *from; }
template <typename T>
PEFTKERN_INLINE void write(T* to, F v, int64_t n) {
  n >= W ? store(to, v) : store_some(to, v, n);
}
PEFTKERN_INLINE void write(double* to, double v, int64_t) { *to = v; }

// Accumulators that fit beside their operands, and how many of them lie side by side in a row: more
// of them reread a panel of the right operand less often than the first-level cache holds it.
#if defined(__AVX512F__)
inline constexpr int kRegisters = 16, kVectors = 2;
#elif defined(__AVX2__)
inline constexpr int kRegisters = 12, kVectors = 2;
#else
inline constexpr int kRegisters = 6, kVectors = 1;
#endif
// How many products are added up before their sum is added to others.
inline constexpr int64_t kSumLength = 256;

template <int R, int V, bool kWhole, typename Acc, typename X>
PEFTKERN_INLINE void add_products_of(const Acc* x, int64_t x_row, int64_t x_column, const Acc* p,
                                     int64_t p_row, int64_t depth, int64_t rest, X (&total)[R][V]) {
  constexpr int64_t kLanes = Vector<Acc>::lanes;
  for (int64_t j = 0; j < depth; ++j, x += x_column, p += p_row) {
    X by[V];
    PEFTKERN_UNROLL
    for (int v = 0; v < V; ++v) {
      by[v] = read(p + v * kLanes, kWhole || v + 1 < V ? kLanes : rest);
    }
    PEFTKERN_UNROLL
    for (int r = 0; r < R; ++r) {
      const X one = splat(x[r * x_row]);
      PEFTKERN_UNROLL
      for (int v = 0; v < V; ++v) total[r][v] = fma(one, by[v], total[r][v]);
    }
  }
}

// total[r][v] += x(r, j) p[j, v], in order of j; the last vector has `rest` lanes. The ways of x
// that occur are spelled out, so that addresses need no registers of their own.
template <int R, int V, typename Acc, typename X>
PEFTKERN_INLINE void add_products(const Acc* x, int64_t x_row, int64_t x_column, const Acc* p,
                                  int64_t p_row, int64_t depth, int64_t rest, X (&total)[R][V]) {
  if (rest < Vector<Acc>::lanes) {
    return add_products_of<R, V, false>(x, x_row, x_column, p, p_row, depth, rest, total);
  }
  if (x_row == 1) return add_products_of<R, V, true>(x, 1, x_column, p, p_row, depth, rest, total);
  if (x_column == 1) return add_products_of<R, V, true>(x, x_row, 1, p, p_row, depth, rest, total);
  add_products_of<R, V, true>(x, x_row, x_column, p, p_row, depth, rest, total);
}

}  // namespace peftkern::PEFTKERN_ISA
