// sparse_adamw_: a step of AdamW on packed values, which then go into the weight they belong to.
//
//   age         = step - born[e], or step where there is no born
//   value      *= 1 - lr * weight_decay
//   exp_avg    += (1 - beta1) * (grad - exp_avg)
//   exp_avg_sq  = beta2 * exp_avg_sq + (1 - beta2) * grad * grad
//   value      -= lr / (1 - beta1^age) * exp_avg / (sqrt(exp_avg_sq) / sqrt(1 - beta2^age) + eps)
//   weight[row of e, column of e] = value, to the nearest in the weight's dtype
//
// An entry whose age is below 1 stays as it is. Entries do not depend on each other: threads, which
// belong to the caller, and instruction sets change no bit.
#pragma once
#include <cstdint>

#include "sparse/sparse.h"

namespace peftkern::sparse {

// By age, from 1 to `known`; who is older has what `known` has.
template <typename A>
struct Corrections {
  const A* rate;    // lr / (1 - beta1^age)
  const A* spread;  // 1 / sqrt(1 - beta2^age)
  int64_t known;
};

template <typename A>
struct Adamw {
  // 1 - lr * weight_decay; beta2; 1 - beta1 and 1 - beta2, of which a float beta would know half
  // the digits.
  A keep, beta2, new_in_1, new_in_2, eps;
  int64_t step;
  Corrections<A> corrections;
};

// T: the weight's type; A: that of values, gradients and moments, [nnz] each.
template <typename T, typename A>
struct Packed {
  T* weight;  // [rows, columns], or null where nothing is to be written
  A* values;
  const A* grad;
  A *exp_avg, *exp_avg_sq;
  const int32_t* born;  // or null: all entries are as old as the optimiser
  Pattern pattern;
};

template <typename T, typename A>
struct OptimizerKernel {
  // Of entries [begin, end).
  void (*adamw)(const Packed<T, A>& io, const Adamw<A>& by, int64_t begin, int64_t end);
};

struct OptimizerKernels {
  OptimizerKernel<float, float> f32;
  OptimizerKernel<double, double> f64;
  OptimizerKernel<peftkern::bf16, float> bf16;
  OptimizerKernel<peftkern::fp16, float> fp16;
};

PEFTKERN_DECLARE(OptimizerKernels, optimizer_kernels)

inline const OptimizerKernels& optimizer_kernels() { return PEFTKERN_SELECT(optimizer_kernels); }

}  // namespace peftkern::sparse
