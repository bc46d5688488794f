// Tiles of rows in the sums' dtype, and the norm.
#pragma once
#include <math.h>

#include "bottleneck/bottleneck.h"
#include "common/blocks.h"
#include "common/elementwise.h"

namespace peftkern::bottleneck::PEFTKERN_ISA {
using namespace peftkern::PEFTKERN_ISA;

// The rows themselves where they have the sums' dtype, else a copy in `buffer`.
template <typename T>
PEFTKERN_INLINE const float* as_sums(const T* from, int64_t count, float* buffer) {
  to_float(from, count, buffer);
  return buffer;
}
PEFTKERN_INLINE const float* as_sums(const float* from, int64_t, float*) { return from; }
PEFTKERN_INLINE const double* as_sums(const double* from, int64_t, double*) { return from; }

PEFTKERN_INLINE float square_root(float x) { return ::sqrtf(x); }
PEFTKERN_INLINE double square_root(double x) { return ::sqrt(x); }

// The sum of f(i, lanes) over a row.
template <typename Acc, typename Function>
PEFTKERN_INLINE Acc sum_of(int64_t count, const Function& f) {
  typename Vector<Acc>::type total{};
  for (int64_t i = 0; i < count; i += Vector<Acc>::lanes) {
    total += f(i, min(count - i, Vector<Acc>::lanes));
  }
  return sum(total);
}

// The first n lanes, zeros behind them.
PEFTKERN_INLINE F first_lanes(F v, int64_t n) {
  return n >= W ? v : F(U(v) & U(lanes() < splat(static_cast<uint32_t>(n))));
}
PEFTKERN_INLINE double first_lanes(double v, int64_t) { return v; }

// centred[i] = (x[i] - mean) / deviation; returns 1 / deviation.
template <typename Acc>
Acc centre(const Acc* x, int64_t count, Acc eps, Acc* centred) {
  const Acc length = static_cast<Acc>(count);
  const Acc mean =
      sum_of<Acc>(count, [&](int64_t i, int64_t n) { return read(x + i, n); }) / length;
  const Acc variance = sum_of<Acc>(count,
                                   [&](int64_t i, int64_t n) {
                                     const auto apart = first_lanes(read(x + i, n) - mean, n);
                                     return apart * apart;
                                   }) /
                       length;
  const Acc by = 1 / square_root(variance + eps);
  for (int64_t i = 0; i < count; i += Vector<Acc>::lanes) {
    const int64_t n = min(count - i, Vector<Acc>::lanes);
    write(centred + i, (read(x + i, n) - mean) * by, n);
  }
  return by;
}

// z = centred * weight + bias
template <typename Acc>
void stretch(const Norm<Acc>& norm, const Acc* centred, int64_t count, Acc* z) {
  for (int64_t i = 0; i < count; i += Vector<Acc>::lanes) {
    const int64_t n = min(count - i, Vector<Acc>::lanes);
    auto v = read(centred + i, n);
    if (norm.weight) v *= read(norm.weight + i, n);
    if (norm.bias) v += read(norm.bias + i, n);
    write(z + i, v, n);
  }
}

// D, in place, over rows of [rows, rank] from `row` on.
template <typename Acc>
void drop_rows(const Drop& drop, Acc* values, int64_t row, int64_t rows, int64_t rank) {
  if (!drop.threshold) return;
  dropout(values, rows * rank, drop.seed, drop.threshold, drop.factor, row * rank, values);
}

}  // namespace peftkern::bottleneck::PEFTKERN_ISA
