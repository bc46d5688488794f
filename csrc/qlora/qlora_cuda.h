// qlora on a GPU: the kernels in CUDA C++, for sm_80 and later. Equations, formats and the order of
// codes are those of qlora.h; this says what differs.
//
// Pointers are the device's. Each function starts its kernels on `stream` of the current device and
// returns the status of the start; none waits, allocates or reads what lies on the device, so a
// CUDA graph may hold them. An empty output starts nothing. Addresses are 64 bits wide. What is not
// aligned to 16 bytes, or has an odd size, is served more slowly; decode then sums in another order
// and has the codebook's values exact, everything else gives the same bits.
//
// quantize, quantize_rows and dequantize write the bytes that the CPU kernels write; only which NaN
// stands for one is the device's choice. T: float, double, bf16, fp16.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

#include "common/half.h"

namespace peftkern::qlora {

struct DeviceWeight {
  const uint8_t* packed;       // [ceil(count / 2)]; int8 [count] for 8 bits
  const float* absmax;         // [ceil(count / block)], or null where the scales are nested
  const uint8_t* codes;        // [ceil(count / block)], nested scales
  const float* nested_absmax;  // [ceil(blocks / 256)]
  const float* map;            // [256]
  const float* offset;         // [1]
  const float* codebook;       // [16]; none for 8 bits
  int64_t rows, columns;       // of all experts, one above the other
  int64_t block;               // for 8 bits a row, columns
  int64_t bits;                // 4 or 8
};

// y[m, n] = sum_k x[m, k] W[n, k] + scale * sum_j down[m, j] lora_b[n, j] + bias[n]
//
// T: float, bf16, fp16. Sums are float, over a block of codes before its scale comes in, and
// rounded to T once. Of a bf16 or fp16 x, products are those of the matrix unit: the codebook's
// values are rounded to T (by up to 2^-8 and 2^-11 of themselves), the scales are not, nor are
// codes of 8 bits, which T holds. Of a float x everything is float.
template <typename T>
struct Decode {
  const T* x;          // [inputs, columns]
  const float* down;   // [inputs, rank]; not read for rank 0
  const void* lora_b;  // [rows, rank]
  const void* bias;    // [rows], or null
  T* y;                // [inputs, rows]
  int64_t inputs;      // 1 to kMostInputs
  int64_t rank;
  int64_t splits;  // parts of the columns that are summed apart, from decode_splits
  float scale;
  Float lora_b_type, bias_type;
};

inline constexpr int64_t kMostInputs = 16;

// Codes and scales of `weight` [count]: packed [ceil(count / 2)], absmax [ceil(count / block)]; an
// odd count ends with the code of zero. `thresholds` [15] and `codes` [16] as in qlora.h's
// Rounding. block: a power of two, 16 to 4096.
template <typename T>
cudaError_t quantize_cuda(const T* weight, int64_t count, const float* thresholds,
                          const uint8_t* codes, int64_t block, uint8_t* packed, float* absmax,
                          cudaStream_t stream);

// Codes of 8 bits [rows, columns] and scales [rows].
template <typename T>
cudaError_t quantize_rows_cuda(const T* weight, int64_t rows, int64_t columns, int8_t* codes,
                               float* absmax, cudaStream_t stream);

// out [rows, columns] = W
template <typename T>
cudaError_t dequantize_cuda(const DeviceWeight& weight, T* out, cudaStream_t stream);

// Into how many parts to split the columns so that this many multiprocessors are busy. Another
// number gives another order of the sums; the same one gives the same bits.
int64_t decode_splits(const DeviceWeight& weight, int64_t inputs, int64_t multiprocessors);

// The floats that decode_cuda needs beside its output: 0 where nothing is split.
int64_t decode_workspace(const DeviceWeight& weight, int64_t inputs, int64_t splits);

// `weight` is that of one expert. `workspace`: decode_workspace floats, in any state.
template <typename T>
cudaError_t decode_cuda(const DeviceWeight& weight, const Decode<T>& io, float* workspace,
                        cudaStream_t stream);

}  // namespace peftkern::qlora
