// Values to codes. Floor: the bytes of weight, codes and scales, at the memory's rate; of a bf16
// weight an H200 can issue some 16 instructions a value in that time, and a value takes about as
// many.
#include "common/launch.h"
#include "qlora/cuda_values.h"

namespace peftkern::qlora {
namespace {

constexpr int kThreads = 256;
constexpr unsigned kAllLanes = 0xFFFFFFFFu;
// Values that a thread takes at a time: a word of codes.
constexpr int kValues = 8;

// Up to kValues values, and zeros for the rest.
template <typename T>
__device__ inline void load_values(const T* from, int64_t count, bool aligned,
                                   float (&out)[kValues]) {
  if (aligned && count >= kValues) {
#pragma unroll
    for (int i = 0; i < kValues; i += kRun<T>) load_run(from + i, out + i);
  } else {
#pragma unroll
    for (int i = 0; i < kValues; ++i) out[i] = i < count ? to_float(from[i]) : 0.0f;
  }
}

// The larger of `most` and the magnitudes. They are compared as integers, where a NaN is above
// everything.
__device__ inline uint32_t larger(uint32_t most, const float (&values)[kValues]) {
#pragma unroll
  for (int i = 0; i < kValues; ++i) {
    const uint32_t bits = __float_as_uint(values[i]) & 0x7FFFFFFFu;
    most = bits > most ? bits : most;
  }
  return most;
}

// How many of the 15 thresholds lie below: a binary search. What is no number lies above all.
__device__ inline int rank_of(float scaled, const float* thresholds) {
  int rank = 0;
#pragma unroll
  for (int step = 8; step; step /= 2) {
    rank += scaled <= thresholds[rank + step - 1] ? 0 : step;
  }
  return rank;
}

// grid (blocks of the weight / (kThreads / lanes)), block (kThreads): neighbouring threads, `lanes`
// of one warp, share a block of the weight. Blocks of more than 256 elements are read twice, from
// memory and from a cache.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    quantize_kernel(const T* __restrict__ weight,          // [count]
                    int64_t count,                         //
                    const float* __restrict__ thresholds,  // [15]
                    const uint8_t* __restrict__ codes,     // [16]
                    int block,                             // elements that share a scale
                    int shift,                             // lanes is 1 << shift
                    bool aligned,                          // weight to 16 bytes and packed to 4
                    uint8_t* __restrict__ packed,          // [ceil(count / 2)]
                    float* __restrict__ absmax) {          // [ceil(count / block)]
  __shared__ float limits[16];
  __shared__ uint32_t code_of[16];
  if (threadIdx.x < 16) {
    limits[threadIdx.x] = threadIdx.x < 15 ? thresholds[threadIdx.x] : 0.0f;
    code_of[threadIdx.x] = codes[threadIdx.x];
  }
  __syncthreads();
  const int64_t b = (int64_t{blockIdx.x} * kThreads + threadIdx.x) >> shift, begin = b * block;
  const int lanes = 1 << shift, stride = lanes * kValues;
  const int start = (threadIdx.x & (lanes - 1)) * kValues;
  float values[kValues];
  uint32_t bits = 0;
  for (int i = start; i < block; i += stride) {
    load_values(weight + begin + i, count - begin - i, aligned, values);
    bits = larger(bits, values);
  }
  for (int offset = lanes / 2; offset; offset /= 2) {
    const uint32_t other = __shfl_xor_sync(kAllLanes, bits, offset);
    bits = other > bits ? other : bits;
  }
  float most = __uint_as_float(bits), inverse = __fdiv_rn(1.0f, most);
  if (inverse > kLargest) most = inverse = 0.0f;  // no finite reciprocal: stored as zeros
  if (start == 0 && begin < count) absmax[b] = most;
  for (int i = start; i < block && begin + i < count; i += stride) {
    if (stride < block) load_values(weight + begin + i, count - begin - i, aligned, values);
    uint32_t word = 0;
#pragma unroll
    for (int j = 0; j < kValues; ++j) {
      const int rank = rank_of(__fmul_rn(values[j], inverse), limits);
      word |= code_of[rank] << (j % 2 ? 4 * j - 4 : 4 * j + 4);
    }
    uint8_t* to = packed + (begin + i) / 2;
    if (aligned && begin + i + kValues <= count) {
      *reinterpret_cast<uint32_t*>(to) = word;
    } else {
      const int64_t bytes = (count - begin - i + 1) / 2;
      for (int j = 0; j < kValues / 2 && j < bytes; ++j)
        to[j] = static_cast<uint8_t>(word >> 8 * j);
    }
  }
}

// The largest among the block's threads, for each of them.
__device__ inline uint32_t largest_of_block(uint32_t bits, uint32_t* of_warp) {
  bits = __reduce_max_sync(kAllLanes, bits);
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = bits;
  __syncthreads();
  for (int w = 0; w < kThreads / 32; ++w) bits = of_warp[w] > bits ? of_warp[w] : bits;
  return bits;
}

// grid (rows), block (kThreads): a row, read twice, from memory and from a cache.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    quantize_rows_kernel(const T* __restrict__ weight,  // [rows, columns]
                         int64_t columns,               //
                         bool aligned,  // the rows of weight to 16 bytes, those of codes to 8
                         int8_t* __restrict__ codes,    // [rows, columns]
                         float* __restrict__ absmax) {  // [rows]
  __shared__ uint32_t of_warp[kThreads / 32];
  const T* from = weight + blockIdx.x * columns;
  int8_t* to = codes + blockIdx.x * columns;
  float values[kValues];
  uint32_t bits = 0;
  for (int64_t i = threadIdx.x * kValues; i < columns; i += kThreads * kValues) {
    load_values(from + i, columns - i, aligned, values);
    bits = larger(bits, values);
  }
  float most = __uint_as_float(largest_of_block(bits, of_warp)),
        inverse = __fmul_rn(127.0f, __fdiv_rn(1.0f, most));
  if (inverse > kLargest) most = inverse = 0.0f;  // no finite reciprocal: stored as zeros
  if (threadIdx.x == 0) absmax[blockIdx.x] = most;
  for (int64_t i = threadIdx.x * kValues; i < columns; i += kThreads * kValues) {
    load_values(from + i, columns - i, aligned, values);
    uint32_t words[2] = {};
#pragma unroll
    for (int j = 0; j < kValues; ++j) {
      const float scaled = __fmul_rn(values[j], inverse);
      // Added to a small number, it leaves the nearest integer in the low bits.
      const uint32_t code =
          scaled == scaled ? __float_as_uint(__fadd_rn(scaled, 0x1.8p23f)) & 0xFFu : 0u;
      words[j / 4] |= code << 8 * (j % 4);
    }
    if (aligned && i + kValues <= columns) {
      *reinterpret_cast<uint2*>(to + i) = {words[0], words[1]};
    } else {
      for (int j = 0; j < kValues && i + j < columns; ++j) {
        to[i + j] = static_cast<int8_t>(words[j / 4] >> 8 * (j % 4));
      }
    }
  }
}

}  // namespace

template <typename T>
cudaError_t quantize_cuda(const T* weight, int64_t count, const float* thresholds,
                          const uint8_t* codes, int64_t block, uint8_t* packed, float* absmax,
                          cudaStream_t stream) {
  if (count == 0) return cudaSuccess;
  const int64_t lanes = block < 32 * kValues ? block / kValues : 32;
  const int64_t blocks = (count + block - 1) / block;
  return launch(quantize_kernel<T>, dim3(ceil_divide(blocks, kThreads / lanes)), dim3(kThreads), 0,
                stream, weight, count, thresholds, codes, static_cast<int>(block), log2_of(lanes),
                is_aligned(weight, 16) && is_aligned(packed, 4), packed, absmax);
}

template <typename T>
cudaError_t quantize_rows_cuda(const T* weight, int64_t rows, int64_t columns, int8_t* codes,
                               float* absmax, cudaStream_t stream) {
  if (rows == 0) return cudaSuccess;
  const bool aligned = columns % kValues == 0 && is_aligned(weight, 16) && is_aligned(codes, 8);
  return launch(quantize_rows_kernel<T>, dim3(static_cast<unsigned>(rows)), dim3(kThreads), 0,
                stream, weight, columns, aligned, codes, absmax);
}

#define INSTANTIATE(T)                                                                         \
  template cudaError_t quantize_cuda(const T*, int64_t, const float*, const uint8_t*, int64_t, \
                                     uint8_t*, float*, cudaStream_t);                          \
  template cudaError_t quantize_rows_cuda(const T*, int64_t, int64_t, int8_t*, float*,         \
                                          cudaStream_t);
INSTANTIATE(float)
INSTANTIATE(double)
INSTANTIATE(bf16)
INSTANTIATE(fp16)

}  // namespace peftkern::qlora
