// Codes to values. Floor: the bytes of codes, scales and out, at the memory's rate; a value costs
// an extraction, a lookup and a product, a third of what an H200 could issue in that time.
#include "common/launch.h"
#include "qlora/cuda_values.h"

namespace peftkern::qlora {
namespace {

constexpr int kThreads = 256;
// Runs of a thread, kThreads apart: their loads are under way together.
constexpr int kRuns = 4;

// Codes of 4 bits from element `i` on, an even one, as many as a run of T has.
template <typename T>
__device__ inline uint32_t load_nibbles(const uint8_t* packed, int64_t i) {
  const uint8_t* from = packed + i / 2;
  if constexpr (kRun<T> == 8) return *reinterpret_cast<const uint32_t*>(from);
  if constexpr (kRun<T> == 4) return *reinterpret_cast<const uint16_t*>(from);
  return *from;
}

// grid (elements / (kThreads * kRuns * kRun)), block (kThreads): a thread writes kRuns runs of the
// flat weight, none of which crosses a block's end.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    dequantize_kernel(DeviceWeight weight,    // 4 bits
                      int64_t count,          // of elements
                      int shift,              // block is 1 << shift
                      bool aligned,           // out to 16 bytes, packed to kRun
                      T* __restrict__ out) {  // [count]
  constexpr int kWidth = kRun<T>;
  __shared__ float codebook[16];
  if (threadIdx.x < 16) codebook[threadIdx.x] = weight.codebook[threadIdx.x];
  __syncthreads();
  const int64_t first = (int64_t{blockIdx.x} * kRuns * kThreads + threadIdx.x) * kWidth;
  uint32_t codes[kRuns];
  float scales[kRuns];
#pragma unroll
  for (int r = 0; r < kRuns; ++r) {
    const int64_t i = first + r * kThreads * kWidth;
    if (!aligned || i + kWidth > count) continue;
    codes[r] = load_nibbles<T>(weight.packed, i);
    scales[r] = block_scale(weight, i >> shift);
  }
#pragma unroll
  for (int r = 0; r < kRuns; ++r) {
    const int64_t i = first + r * kThreads * kWidth;
    if (aligned && i + kWidth <= count) {
      float values[kWidth];
#pragma unroll
      for (int j = 0; j < kWidth; ++j) {
        values[j] = codebook[codes[r] >> (j % 2 ? 4 * j - 4 : 4 * j + 4) & 15] * scales[r];
      }
      *reinterpret_cast<uint4*>(out + i) = run_of(values, T{});
    } else {
#pragma unroll 1  // rare, and unrolled it takes registers from what is not
      for (int64_t j = i; j < i + kWidth && j < count; ++j) {
        const int byte = weight.packed[j / 2];
        const float value = codebook[j % 2 ? byte & 15 : byte >> 4];
        from_float(value * block_scale(weight, j >> shift), out + j);
      }
    }
  }
}

// Codes of 8 bits as they lie, as many as a run of T has.
template <typename T>
struct alignas(kRun<T>) ByteRun {
  int8_t codes[kRun<T>];
};

// grid (rows * pieces), block (kThreads): a piece of a row, which has one scale.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    dequantize_rows_kernel(DeviceWeight weight,    // 8 bits
                           unsigned pieces,        // kThreads * kRuns * kRun columns each
                           bool aligned,           // rows of out to 16 bytes, of codes to kRun
                           T* __restrict__ out) {  // [rows, columns]
  constexpr int kWidth = kRun<T>;
  const auto* codes = reinterpret_cast<const int8_t*>(weight.packed);
  const int64_t row = blockIdx.x / pieces, begin = row * weight.columns,
                end = begin + weight.columns;
  const float scale = row_scale(weight, row);
  const int64_t first =
      begin + (int64_t{blockIdx.x % pieces} * kRuns * kThreads + threadIdx.x) * kWidth;
#pragma unroll
  for (int r = 0; r < kRuns; ++r) {
    const int64_t i = first + r * kThreads * kWidth;
    if (aligned && i + kWidth <= end) {
      const auto run = *reinterpret_cast<const ByteRun<T>*>(codes + i);
      float values[kWidth];
#pragma unroll
      for (int j = 0; j < kWidth; ++j) values[j] = static_cast<float>(run.codes[j]) * scale;
      *reinterpret_cast<uint4*>(out + i) = run_of(values, T{});
    } else {
      for (int64_t j = i; j < i + kWidth && j < end; ++j) {
        from_float(static_cast<float>(codes[j]) * scale, out + j);
      }
    }
  }
}

}  // namespace

template <typename T>
cudaError_t dequantize_cuda(const DeviceWeight& weight, T* out, cudaStream_t stream) {
  const int64_t count = weight.rows * weight.columns;
  if (count == 0) return cudaSuccess;
  constexpr int64_t kPiece = int64_t{kThreads} * kRuns * kRun<T>;
  const bool aligned = is_aligned(out, 16) && is_aligned(weight.packed, kRun<T>);
  if (weight.bits == 4) {
    return launch(dequantize_kernel<T>, dim3(ceil_divide(count, kPiece)), dim3(kThreads), 0, stream,
                  weight, count, log2_of(weight.block), aligned, out);
  }
  const unsigned pieces = ceil_divide(weight.columns, kPiece);
  return launch(dequantize_rows_kernel<T>, dim3(static_cast<unsigned>(weight.rows * pieces)),
                dim3(kThreads), 0, stream, weight, pieces, aligned && weight.columns % kRun<T> == 0,
                out);
}

#define INSTANTIATE(T) template cudaError_t dequantize_cuda(const DeviceWeight&, T*, cudaStream_t);
INSTANTIATE(float)
INSTANTIATE(double)
INSTANTIATE(bf16)
INSTANTIATE(fp16)

}  // namespace peftkern::qlora
