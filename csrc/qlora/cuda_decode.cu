// Few rows of x, up to 16, times a quantised weight.
//
// Floor: the weight's bytes, rows * columns * (bits / 8 + the scales' share), at the memory's rate;
// x, y and the partial sums are small beside them. In the time of a weight of 4 bits in blocks of
// 64 (0.5625 bytes) an H200 has some 3.7 issue slots a weight and lane, 3.4 where scales are
// nested. The main loop takes 2.9 and 3.2 of them for up to 8 rows of x, 3.4 and 3.7 for up to 16,
// as counted in what is compiled for sm_90a (tests/test_gates_cuda.py holds them there): 1.5 for
// the lookup of a pair of values, 1/8 for each 8 rows in the matrix unit, the rest for a turn's
// copies and scales. Shared memory moves 128 bytes a cycle and multiprocessor, or 3.5 a weight in
// that time: 2 are for lookups, 1 for codes on their way in and out, up to 1/2 for each 8 rows of
// x. That is why a lane has four rows of the weight for each of its columns, and why lookups have
// no conflicts. Codes of 8 bits (1 byte, 6.6 slots) take 4.1 and 4.2.
#include "common/launch.h"
#include "qlora/cuda_decode_finish.h"
#include "qlora/cuda_decode_sums.h"

namespace peftkern::qlora {
namespace {

// grid (rows / kTileRows, splits, inputs / kMost), block (kFewRowsThreads), shared Plan::bytes:
// sums of a tile's rows over a split's stages, for up to kMost rows of x. With one split they
// become y.
template <typename T, typename Layout, int kMost>
__global__ void __launch_bounds__(kFewRowsThreads, 2)
    decode_kernel(DeviceWeight weight,              //
                  Decode<T> io,                     //
                  int shift,                        // block is 1 << shift
                  float* __restrict__ workspace) {  // [splits, inputs, rows], or null for one split
  using Where = Plan<T, Layout, kMost>;
  char* shared = static_cast<char*>(ptx::dynamic_shared());
  const Share share = Share::of<Where>(weight.columns, io.inputs);
  DecodeRing<T, Layout, kMost> ring(shared + Where::kRing, weight.packed,
                                    weight.columns * Layout::kBits / 8, weight.rows, io.x,
                                    weight.columns, share);
#pragma unroll
  for (int t = 0; t < ring.kStages - 1; ++t) ring.fill(t);
  Values<T, Layout>::write(shared, weight.codebook);
  Scales<Layout> scales(shared, Where::kScales, Where::kMap, weight, shift, share);
  if constexpr (Layout::kBits == 4) {
    if constexpr (Layout::kNested) {
      reinterpret_cast<float*>(shared + Where::kMap)[threadIdx.x] = weight.map[threadIdx.x];
      __syncthreads();
    }
    scales.start();
  }
  const Values<T, Layout> values(shared);
  Sums<T, Layout, kMost> sums;
  for (int t = 0; t < share.stages; ++t) {
    ptx::cp_async_wait<ring.kStages - 2>();
    __syncthreads();  // stage t is there, and nobody reads the one before it any more
    ring.fill(t + ring.kStages - 1);
    if constexpr (Layout::kBits == 4) scales.step(t);
    sums.add(ring, scales, values, share.inputs, t);
  }
  __syncthreads();
  auto* parts = reinterpret_cast<float*>(shared + Where::kRing);
  sums.write(parts);
  __syncthreads();
  for (int i = threadIdx.x; i < kTileRows * share.inputs; i += kFewRowsThreads) {
    const int64_t row = share.row + i % kTileRows;
    const int input = i / kTileRows;
    if (row >= weight.rows) continue;
    float sum = 0;
#pragma unroll
    for (int p = 0; p < kParts; ++p) {
      sum += parts[(p * kTileRows + i % kTileRows) * (kMost + 1) + input];
    }
    if constexpr (Layout::kBits == 8) sum *= row_scale(weight, row);
    if (gridDim.y == 1) {
      finish(io, weight.rows, row, share.input + input, sum);
    } else {
      workspace[(blockIdx.y * io.inputs + share.input + input) * weight.rows + row] = sum;
    }
  }
}

// grid (rows / kFewRowsThreads, inputs), block (kFewRowsThreads): y from the sums of the splits,
// added in their order.
template <typename T>
__global__ void __launch_bounds__(kFewRowsThreads)
    join_kernel(Decode<T> io,                           //
                int64_t rows,                           //
                const float* __restrict__ workspace) {  // [splits, inputs, rows]
  const int64_t row = int64_t{blockIdx.x} * kFewRowsThreads + threadIdx.x;
  if (row >= rows) return;
  const int input = static_cast<int>(blockIdx.y);
  const float sum = sum_of_splits(workspace, io.splits, io.inputs, rows, input, row);
  finish(io, rows, row, input, sum);
}

// grid (rows / warps), block (kFewRowsThreads): any weight, a warp a row. The values are exact, and
// every 32nd column is summed in turn.
template <typename T>
__global__ void __launch_bounds__(kFewRowsThreads)
    decode_any_kernel(DeviceWeight weight,  //
                      Decode<T> io,         //
                      int shift) {          // block is 1 << shift
  const int64_t row = int64_t{blockIdx.x} * (kFewRowsThreads / 32) + threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  if (row >= weight.rows) return;
  float sums[kMostInputs] = {};
  for (int64_t k = lane; k < weight.columns; k += 32) {
    const int64_t i = row * weight.columns + k;
    float value;
    if (weight.bits == 8) {
      value = reinterpret_cast<const int8_t*>(weight.packed)[i];
    } else {
      const int byte = weight.packed[i / 2];
      value = weight.codebook[i % 2 ? byte & 15 : byte >> 4] * block_scale(weight, i >> shift);
    }
#pragma unroll
    for (int m = 0; m < kMostInputs; ++m) {
      if (m < io.inputs) sums[m] = fmaf(value, to_float(io.x[m * weight.columns + k]), sums[m]);
    }
  }
  float own = 0;
#pragma unroll
  for (int m = 0; m < kMostInputs; ++m) {
    for (int offset = 16; offset; offset /= 2) {
      sums[m] += __shfl_xor_sync(0xFFFFFFFFu, sums[m], offset);
    }
    if (lane == m) own = sums[m];
  }
  if (lane >= io.inputs) return;
  if (weight.bits == 8) own *= row_scale(weight, row);
  finish(io, weight.rows, row, lane, own);
}

// Whether rows lie so that they can be copied 16 bytes at a time.
bool lies_in_runs(const DeviceWeight& weight) {
  return weight.columns > 0 && weight.columns * weight.bits % 128 == 0;
}

template <typename T, typename Layout, int kMost>
cudaError_t decode_tiles(const DeviceWeight& weight, const Decode<T>& io, float* workspace,
                         cudaStream_t stream) {
  static_assert(size_t(Plan<T, Layout, kMost>::bytes(kMost)) <= kMostShared);
  const dim3 grid(ceil_divide(weight.rows, kTileRows), static_cast<unsigned>(io.splits),
                  ceil_divide(io.inputs, kMost));
  const int inputs = io.inputs < kMost ? static_cast<int>(io.inputs) : kMost;
  const cudaError_t status = launch(decode_kernel<T, Layout, kMost>, grid, dim3(kFewRowsThreads),
                                    size_t(Plan<T, Layout, kMost>::bytes(inputs)), stream, weight,
                                    io, weight.bits == 4 ? log2_of(weight.block) : 0, workspace);
  if (status != cudaSuccess || io.splits == 1) return status;
  return launch(join_kernel<T>,
                dim3(ceil_divide(weight.rows, kFewRowsThreads), static_cast<unsigned>(io.inputs)),
                dim3(kFewRowsThreads), 0, stream, io, weight.rows, workspace);
}

template <typename T, typename Layout>
cudaError_t decode_layout(const DeviceWeight& weight, const Decode<T>& io, float* workspace,
                          cudaStream_t stream) {
  if constexpr (sizeof(T) == 4) {
    return decode_tiles<T, Layout, 4>(weight, io, workspace, stream);
  } else if (io.inputs > 8) {
    return decode_tiles<T, Layout, 16>(weight, io, workspace, stream);
  } else {
    return decode_tiles<T, Layout, 8>(weight, io, workspace, stream);
  }
}

template <typename T, int kSegment>
cudaError_t decode_nibbles(const DeviceWeight& weight, const Decode<T>& io, float* workspace,
                           cudaStream_t stream) {
  return weight.absmax ? decode_layout<T, Layout<4, kSegment, false>>(weight, io, workspace, stream)
                       : decode_layout<T, Layout<4, kSegment, true>>(weight, io, workspace, stream);
}

}  // namespace

int64_t decode_splits(const DeviceWeight& weight, int64_t inputs, int64_t multiprocessors) {
  if (!lies_in_runs(weight)) return 1;
  const double join = 8.0 * static_cast<double>(inputs) * kTileRows /
                      static_cast<double>(kTileRows * kTileColumns * weight.bits / 8);
  return splits_of(ceil_divide(weight.rows, kTileRows), ceil_divide(weight.columns, kTileColumns),
                   multiprocessors, join);
}

int64_t decode_workspace(const DeviceWeight& weight, int64_t inputs, int64_t splits) {
  return splits > 1 ? splits * inputs * weight.rows : 0;
}

template <typename T>
cudaError_t decode_cuda(const DeviceWeight& weight, const Decode<T>& io, float* workspace,
                        cudaStream_t stream) {
  if (weight.rows == 0 || io.inputs == 0) return cudaSuccess;
  if (!lies_in_runs(weight) || !is_aligned(weight.packed, 16) || !is_aligned(io.x, 16)) {
    return launch(decode_any_kernel<T>, dim3(ceil_divide(weight.rows, kFewRowsThreads / 32)),
                  dim3(kFewRowsThreads), 0, stream, weight, io,
                  weight.bits == 4 ? log2_of(weight.block) : 0);
  }
  if (weight.bits == 8) {
    return decode_layout<T, Layout<8, 64, false>>(weight, io, workspace, stream);
  }
  if (weight.block >= 64 && weight.columns % 64 == 0) {
    return decode_nibbles<T, 64>(weight, io, workspace, stream);
  }
  return weight.block >= 32 ? decode_nibbles<T, 32>(weight, io, workspace, stream)
                            : decode_nibbles<T, 16>(weight, io, workspace, stream);
}

#define INSTANTIATE(T) \
  template cudaError_t decode_cuda(const DeviceWeight&, const Decode<T>&, float*, cudaStream_t);
INSTANTIATE(float)
INSTANTIATE(bf16)
INSTANTIATE(fp16)

}  // namespace peftkern::qlora
