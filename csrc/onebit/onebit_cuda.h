// onebit's linear on a GPU, for few rows: the kernel in CUDA C++, for sm_80 and later.
//
// Codes are laid out as Triton's kernel has them too: each row's canonical bytes (onebit.h), and
// zeros up to a whole number of 32-bit words; then rows of zeros up to a multiple of 16 rows.
//
// Pointers are the device's. Kernels start on `stream` of the current device, and the status of the
// start is returned; none waits, allocates or reads what lies on the device, so a CUDA graph may
// hold them. An empty output starts nothing. Where rows of codes or of x are no multiple of 16
// bytes, or do not begin at one, the call is served more slowly and sums in another order.
#pragma once
#include <cuda_runtime.h>

#include "onebit/linear.h"

namespace peftkern::onebit {

struct DeviceBits {
  const uint8_t* words;     // laid_out_bytes
  const float* statistics;  // [2], mean and std
  int64_t rows, columns;
  int64_t bits;  // 1, 2 or 4
};

// y[m, n] = std * sum_k x[m, k] level[n, k] + mean * sum_k x[m, k] + bias[n]
//
// T: float, bf16, fp16. Both sums are float, scaled at their end and rounded to T once. Of 16-bit
// x, products are those of the matrix unit: levels of 4 bits are rounded to T (by up to 2^-8 and
// 2^-11 of themselves), those of 1 and 2 bits are not. Of a float x everything is float.
template <typename T>
struct FewRows {
  const T* x;        // [inputs, columns]
  const void* bias;  // [rows], or null
  T* y;              // [inputs, rows]
  int64_t inputs;    // 1 to kMostInputs
  int64_t splits;    // parts of the columns that are summed apart, from decode_splits
  Float bias_type;
};

inline constexpr int64_t kMostInputs = 16;

// Into how many parts to split the columns so that this many multiprocessors are busy. Another
// number gives another order of the sums; the same one gives the same bits. `width`: bytes of a
// number of x.
int64_t decode_splits(const DeviceBits& weight, int64_t inputs, int64_t width,
                      int64_t multiprocessors);

// The floats that decode_cuda needs beside its output: 0 where nothing is split.
int64_t decode_workspace(const DeviceBits& weight, int64_t inputs, int64_t splits);

// `workspace`: decode_workspace floats, in any state.
template <typename T>
cudaError_t decode_cuda(const DeviceBits& weight, const FewRows<T>& io, float* workspace,
                        cudaStream_t stream);

}  // namespace peftkern::onebit
