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

// grid (elements / (kThreads * kRuns * kRun)), block (kThreads): a thread writes kRuns runs of out,
// which are runs of the flat weight, so none crosses a block's end.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    dequantize_kernel(DeviceWeight weight,    // 4 bits
                      int64_t begin,          // of the range
                      int64_t end,            //
                      int shift,              // block is 1 << shift
                      bool aligned,           // whether runs of the weight are runs of out
                      T* __restrict__ out) {  // [end - begin]
  constexpr int kWidth = kRun<T>;
  __shared__ float codebook[16];
  if (threadIdx.x < 16) codebook[threadIdx.x] = weight.codebook[threadIdx.x];
  __syncthreads();
  const int64_t first =
      begin / kWidth * kWidth + (int64_t{blockIdx.x} * kRuns * kThreads + threadIdx.x) * kWidth;
  uint32_t codes[kRuns];
  float scales[kRuns];
#pragma unroll
  for (int r = 0; r < kRuns; ++r) {
    const int64_t i = first + r * kThreads * kWidth;
    if (!aligned || i + kWidth > end) continue;
    codes[r] = load_nibbles<T>(weight.packed, i);
    scales[r] = block_scale(weight, i >> shift);
  }
#pragma unroll
  for (int r = 0; r < kRuns; ++r) {
    const int64_t i = first + r * kThreads * kWidth;
    if (aligned && i + kWidth <= end) {
      float values[kWidth];
#pragma unroll
      for (int j = 0; j < kWidth; ++j) {
        values[j] = codebook[codes[r] >> (j % 2 ? 4 * j - 4 : 4 * j + 4) & 15] * scales[r];
      }
      *reinterpret_cast<uint4*>(out + (i - begin)) = run_of(values, T{});
    } else {
      for (int64_t j = i < begin ? begin : i; j < i + kWidth && j < end; ++j) {
        const int byte = weight.packed[j / 2];
        const float value = codebook[j % 2 ? byte & 15 : byte >> 4];
        from_float(value * block_scale(weight, j >> shift), out + (j - begin));
      }
    }
  }
}

// Codes of 8 bits as they lie, as many as a run of T has.
template <typename T>
struct alignas(kRun<T>) ByteRun {
  int8_t codes[kRun<T>];
};

// grid (rows that the range touches * pieces), block (kThreads): a piece of a row, which has one
// scale.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    dequantize_rows_kernel(DeviceWeight weight,    // 8 bits
                           int64_t begin,          // of the range
                           int64_t end,            //
                           unsigned pieces,        // kThreads * kRuns * kRun columns each
                           bool aligned,           // whether runs of a row are runs of out
                           T* __restrict__ out) {  // [end - begin]
  constexpr int kWidth = kRun<T>;
  const auto* codes = reinterpret_cast<const int8_t*>(weight.packed);
  const int64_t row = begin / weight.columns + blockIdx.x / pieces;
  const int64_t row_begin = row * weight.columns, row_end = row_begin + weight.columns;
  const int64_t low = row_begin > begin ? row_begin : begin, high = row_end < end ? row_end : end;
  const float scale = row_scale(weight, row);
  const int64_t first =
      row_begin + (int64_t{blockIdx.x % pieces} * kRuns * kThreads + threadIdx.x) * kWidth;
#pragma unroll
  for (int r = 0; r < kRuns; ++r) {
    const int64_t i = first + r * kThreads * kWidth;
    if (aligned && i >= low && i + kWidth <= high) {
      const auto run = *reinterpret_cast<const ByteRun<T>*>(codes + i);
      float values[kWidth];
#pragma unroll
      for (int j = 0; j < kWidth; ++j) values[j] = static_cast<float>(run.codes[j]) * scale;
      *reinterpret_cast<uint4*>(out + (i - begin)) = run_of(values, T{});
    } else {
      for (int64_t j = i < low ? low : i; j < i + kWidth && j < high; ++j) {
        from_float(static_cast<float>(codes[j]) * scale, out + (j - begin));
      }
    }
  }
}

}  // namespace

template <typename T>
cudaError_t dequantize_cuda(const DeviceWeight& weight, int64_t begin, int64_t end, T* out,
                            cudaStream_t stream) {
  if (begin >= end) return cudaSuccess;
  constexpr int64_t kPiece = int64_t{kThreads} * kRuns * kRun<T>;
  const bool aligned =
      begin % kRun<T> == 0 && is_aligned(out, 16) && is_aligned(weight.packed, kRun<T>);
  if (weight.bits == 4) {
    const int64_t count = end - begin / kRun<T> * kRun<T>;
    return launch(dequantize_kernel<T>, dim3(ceil_divide(count, kPiece)), dim3(kThreads), 0, stream,
                  weight, begin, end, log2_of(weight.block), aligned, out);
  }
  const int64_t rows = (end - 1) / weight.columns - begin / weight.columns + 1;
  const unsigned pieces = ceil_divide(weight.columns, kPiece);
  return launch(dequantize_rows_kernel<T>, dim3(static_cast<unsigned>(rows * pieces)),
                dim3(kThreads), 0, stream, weight, begin, end, pieces,
                aligned && weight.columns % kRun<T> == 0, out);
}

#define INSTANTIATE(T) \
  template cudaError_t dequantize_cuda(const DeviceWeight&, int64_t, int64_t, T*, cudaStream_t);
INSTANTIATE(float)
INSTANTIATE(double)
INSTANTIATE(bf16)
INSTANTIATE(fp16)

}  // namespace peftkern::qlora
