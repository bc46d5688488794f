// Stands in for the toolkit's header where kernels are compiled for the emulator: what our kernels
// use of CUDA, and nothing that they do not.
#pragma once
#include <cstddef>
#include <cstdint>

#include "emulator/atomics.h"
#include "emulator/block.h"
#include "emulator/intrinsics.h"
#include "emulator/vectors.h"
#include "emulator/warp.h"

#define __global__
#define __device__
#define __host__
#define __constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __align__(n) __attribute__((aligned(n)))
#define __launch_bounds__(...)
// One block runs at a time, so one copy serves; the emulator finds it by its name (symbols.h).
#define __shared__ static

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
};
using cudaStream_t = struct CUstream_st*;

inline const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorInvalidValue:
      return "invalid argument";
    case cudaErrorInvalidConfiguration:
      return "invalid configuration argument";
  }
  return "unrecognized error code";
}
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
