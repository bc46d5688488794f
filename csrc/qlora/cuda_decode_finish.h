// What decode adds to a sum before it is rounded: the low-rank term and the bias.
#pragma once
#include "qlora/cuda_values.h"

namespace peftkern::qlora {

// sum_j down[j] row[j], in order.
template <typename T>
__device__ inline float dot(const float* down, const T* row, int64_t rank) {
  float sum = 0;
#pragma unroll 4
  for (int64_t j = 0; j < rank; ++j) sum = fmaf(down[j], to_float(row[j]), sum);
  return sum;
}

__device__ inline float dot(const float* down, const void* matrix, Float type, int64_t row,
                            int64_t rank) {
  switch (type) {
    case Float::f32:
      return dot(down, static_cast<const float*>(matrix) + row * rank, rank);
    case Float::f64:
      return dot(down, static_cast<const double*>(matrix) + row * rank, rank);
    case Float::bf16:
      return dot(down, static_cast<const bf16*>(matrix) + row * rank, rank);
    default:
      return dot(down, static_cast<const fp16*>(matrix) + row * rank, rank);
  }
}

// y[input, row] from the sum over the columns.
template <typename T>
__device__ inline void finish(const Decode<T>& io, int64_t rows, int64_t row, int input,
                              float sum) {
  if (io.rank) {
    sum = fmaf(io.scale, dot(io.down + input * io.rank, io.lora_b, io.lora_b_type, row, io.rank),
               sum);
  }
  if (io.bias) sum += element(io.bias, io.bias_type, row);
  from_float(sum, io.y + input * rows + row);
}

}  // namespace peftkern::qlora
