// What several families' kernels have in common: dropout, the ways between float and the other
// dtypes, and small matrix products. Every kernel writes a range of outputs that the caller names;
// threads belong to the caller, and any split gives the same bits.
#pragma once
#include <cstdint>

#include "common/half.h"
#include "common/isa.h"

namespace peftkern {

// out[i, c] = scale * sum_j x(i, j) p[j, c], on top of what is there where `add`; x in any layout,
// in order of j. The small products of the low-rank term: ours, since the library splits their sums
// among its threads, and their bits with them.
template <typename T>
struct Product {
  const T* x;
  int64_t x_row, x_column;
  const T* p;
  int64_t p_row;
  T* out;
  int64_t out_row;
  int64_t rows, depth, columns;
  T scale;
  bool add;
};

// out[i, j] = sum_k x[i, k] a[j, k]
template <typename T>
struct Dots {
  const T* x;
  int64_t x_row;
  const T* a;
  T* out;
  int64_t out_row;
  int64_t rows, rank, columns;
};

// x a^T by dots where x has fewer rows than this; else by a product with a^T, for which a is
// copied.
inline constexpr int64_t kFewRows = 32;

template <typename T>
struct SumKernels {
  void (*product)(const Product<T>& io);
  void (*dots)(const Dots<T>& io);
};

template <typename T>
struct ValueKernels {
  // out[i] = keep(seed, begin + i) ? x[i] * factor : 0; keeps where the element's Philox word is at
  // least `threshold`, so 2^32 keeps nothing. In place where out is x.
  void (*dropout)(const T* x, int64_t count, uint64_t seed, uint64_t threshold, double factor,
                  int64_t begin, T* out);
  void (*to_float)(const T* from, int64_t count, float* to);
  void (*from_float)(const float* from, int64_t count, T* to);
};

struct SharedKernels {
  ValueKernels<float> f32;
  ValueKernels<double> f64;
  ValueKernels<peftkern::bf16> bf16;
  ValueKernels<peftkern::fp16> fp16;
  SumKernels<float> sums_f32;
  SumKernels<double> sums_f64;
};

PEFTKERN_DECLARE(SharedKernels, shared_kernels)

inline const SharedKernels& shared_kernels() { return PEFTKERN_SELECT(shared_kernels); }

}  // namespace peftkern
