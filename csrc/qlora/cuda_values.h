// What qlora's CUDA kernels have in common: runs of values, and the scales of a weight.
#pragma once
#include "common/cuda_values.h"
#include "qlora/qlora.h"
#include "qlora/qlora_cuda.h"

namespace peftkern::qlora {

// b / kNestedBlock is b >> kNestedShift.
inline constexpr int kNestedShift = 8;
static_assert(kNestedBlock == 1 << kNestedShift);

// The largest finite float: what has no finite reciprocal is above it.
inline constexpr float kLargest = 3.402823466e38f;

// 16 bytes of a tensor: loaded, stored and passed on as one.
template <typename T>
inline constexpr int kRun = 16 / static_cast<int>(sizeof(T));

template <typename T>
__device__ inline void load_run(const T* from, float* out) {
  T values[kRun<T>];
  const uint4 raw = *reinterpret_cast<const uint4*>(from);
  memcpy(values, &raw, sizeof raw);
  for (int i = 0; i < kRun<T>; ++i) out[i] = to_float(values[i]);
}

__device__ inline uint4 run_of(const float (&values)[4], float) {
  return {__float_as_uint(values[0]), __float_as_uint(values[1]), __float_as_uint(values[2]),
          __float_as_uint(values[3])};
}
__device__ inline uint4 run_of(const float (&values)[2], double) {
  const double wide[2] = {values[0], values[1]};
  uint4 raw;
  memcpy(&raw, wide, sizeof raw);
  return raw;
}
template <typename T>
__device__ inline uint4 run_of(const float (&v)[8], T type) {
  return {pack(v[0], v[1], type), pack(v[2], v[3], type), pack(v[4], v[5], type),
          pack(v[6], v[7], type)};
}

// What the codes of a row are multiplied by, of 8 bits; and the values of the codes of block `b`,
// of 4 bits.
__device__ inline float row_scale(const DeviceWeight& weight, int64_t row) {
  return __fdiv_rn(weight.absmax[row], 127.0f);
}
__device__ inline float block_scale(const DeviceWeight& weight, int64_t b) {
  if (weight.absmax) return weight.absmax[b];
  const float nested = weight.nested_absmax[b >> kNestedShift];
  return __fadd_rn(__fmul_rn(weight.map[weight.codes[b]], nested), *weight.offset);
}

inline int log2_of(int64_t power) {
  int shift = 0;
  while ((int64_t{1} << shift) < power) ++shift;
  return shift;
}

}  // namespace peftkern::qlora
