// What CUDA kernels of several families have in common: values in and out of memory, and pairs of
// them as the matrix unit takes them.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "common/ptx.h"

namespace peftkern {

__device__ inline float to_float(float value) { return value; }
__device__ inline float to_float(double value) { return static_cast<float>(value); }
__device__ inline float to_float(bf16 value) { return __uint_as_float(uint32_t{value.bits} << 16); }
__device__ inline float to_float(fp16 value) { return ptx::to_float(value); }

// Element i of a tensor.
__device__ inline float element(const void* tensor, Float type, int64_t i) {
  switch (type) {
    case Float::f32:
      return static_cast<const float*>(tensor)[i];
    case Float::f64:
      return to_float(static_cast<const double*>(tensor)[i]);
    case Float::bf16:
      return to_float(static_cast<const bf16*>(tensor)[i]);
    default:
      return to_float(static_cast<const fp16*>(tensor)[i]);
  }
}

__device__ inline uint32_t pack(float low, float high, bf16) { return ptx::pack_bf16x2(low, high); }
__device__ inline uint32_t pack(float low, float high, fp16) { return ptx::pack_fp16x2(low, high); }

__device__ inline void from_float(float value, float* to) { *to = value; }
__device__ inline void from_float(float value, double* to) { *to = value; }
template <typename T>
__device__ inline void from_float(float value, T* to) {
  to->bits = static_cast<uint16_t>(pack(value, 0.0f, T{}));
}

// Two values that follow one another: in a register for 16-bit T, in two for float.
template <typename T>
struct Pair {
  using Type = uint32_t;
  __device__ static Type of(float first, float second) { return pack(first, second, T{}); }
};
template <>
struct Pair<float> {
  using Type = uint2;
  __device__ static Type of(float first, float second) {
    return {__float_as_uint(first), __float_as_uint(second)};
  }
};

inline bool is_aligned(const void* pointer, size_t bytes) {
  return reinterpret_cast<uintptr_t>(pointer) % bytes == 0;
}

inline unsigned ceil_divide(int64_t count, int64_t by) {
  return static_cast<unsigned>((count + by - 1) / by);
}

}  // namespace peftkern
