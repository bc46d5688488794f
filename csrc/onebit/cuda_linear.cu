// Few rows of x, up to 16, times codes of 1, 2 or 4 bits.
//
// Floor: the weight's bytes, rows * columns * bits / 8, at the memory's rate; x, y and the partial
// sums are small beside them once rows are many tiles. In the time of a weight of 1 bit an H200 has
// 0.8 issue slots a weight and lane, of 2 and 4 bits 1.6 and 3.3, an A100 about twice as many. The
// main loop takes 1.2 of them for up to 8 rows of x and 1.6 for up to 16, of 2 bits 2.6, of 4 bits
// 2.5 and 2.9, as counted in what is compiled for sm_90a (tests/test_gates_cuda.py holds them
// there). So of 1 and 2 bits it is instructions that bound an H200, at two thirds of the memory's
// rate: 0.5 slots of 1 bit make signs, 0.2 shift, 1/8 for each 8 rows is in the matrix unit, the
// rest brings in codes and x, whose columns have to be paired anew. Tiles are tall since x passes
// through the second-level cache once for each: 8 rows of 16 bits are as many bytes as the codes of
// 128 rows of 1 bit. A float x takes some 7 to 10 slots.
#include "common/launch.h"
#include "onebit/cuda_linear_sums.h"

namespace peftkern::onebit {
namespace {

// What codes stand for, over `unit`.
struct Levels {
  float of[16];
  float unit;

  explicit Levels(int64_t bits) : of{}, unit(static_cast<float>(unit_of(bits))) {
    for (int64_t code = 0; code < int64_t{1} << bits; ++code) {
      of[code] = static_cast<float>(level(bits, code) / unit_of(bits));
    }
  }
};

template <int kBits>
inline constexpr float kUnit = static_cast<float>(unit_of(kBits));

template <int kBits, int kCode>
inline constexpr float kLevel = static_cast<float>(level(kBits, kCode) / unit_of(kBits));

// Chosen among constants: an array indexed by a thread's number would lie in memory.
template <int kBits, int kCode = 0>
__device__ inline float level_of(unsigned code) {
  if constexpr (kCode + 1 == 1 << kBits) {
    return kLevel<kBits, kCode>;
  } else {
    return code == kCode ? kLevel<kBits, kCode> : level_of<kBits, kCode + 1>(code);
  }
}

// y, or a split's share of it, from sums of x times levels and of x alone.
__device__ inline float scaled(const DeviceBits& weight, float unit, float sum, float of_x) {
  const float mean = weight.statistics[0], std = weight.statistics[1];
  return fmaf(std * unit, sum, mean * of_x);
}

template <typename T>
__device__ inline void finish(const FewRows<T>& io, int64_t rows, int64_t row, int input,
                              float sum) {
  if (io.bias) sum += element(io.bias, io.bias_type, row);
  from_float(sum, io.y + input * rows + row);
}

// Number (row, input) of the parts' sums.
template <typename Where>
__device__ inline float sum_of_parts(const float* parts, int row, int input) {
  float sum = 0;
#pragma unroll
  for (int p = 0; p < kParts; ++p) {
    sum += parts[(p * Where::kSumsRows + row) * Where::kSumsPitch + input];
  }
  return sum;
}

// grid (rows / kTileRows, splits, inputs / kMost), block (kFewRowsThreads), shared Plan::bytes:
// sums of a tile's rows over a split's stages, for up to kMost rows of x. With one split they
// become y.
template <typename T, int kBits, int kMost>
__global__ void __launch_bounds__(kFewRowsThreads, 2)
    bits_kernel(DeviceBits weight,                //
                FewRows<T> io,                    //
                int64_t row_bytes,                //
                float* __restrict__ workspace) {  // [splits, inputs, rows], or null for one split
  using Where = Plan<T, kBits, kMost>;
  char* shared = static_cast<char*>(ptx::dynamic_shared());
  const Share share = Share::of<Where>(weight.columns, io.inputs);
  Ring<T, Where> ring(shared + Where::kRing, weight.words, row_bytes, weight.rows, io.x,
                      weight.columns, share);
#pragma unroll
  for (int t = 0; t < ring.kStages - 1; ++t) ring.fill(t);
  if constexpr (kBits == 4) {
    PairTable<T>::write(shared, -level_of<4>(threadIdx.x % 16), -level_of<4>(threadIdx.x / 16));
  }
  const PairTable<T> table(shared);
  Sums<T, kBits, kMost> sums(share.inputs);
  for (int t = 0; t < share.stages; ++t) {
    ptx::cp_async_wait<ring.kStages - 2>();
    __syncthreads();  // stage t is there, and nobody reads the one before it any more
    ring.fill(t + ring.kStages - 1);
    sums.add(ring.codes(t), ring.x(t), table);
  }
  __syncthreads();
  auto* parts = reinterpret_cast<float*>(shared + Where::kRing);
  sums.write(parts);
  __syncthreads();
  for (int i = threadIdx.x; i < Where::kTileRows * share.inputs; i += kFewRowsThreads) {
    const int in_tile = i % Where::kTileRows, input = i / Where::kTileRows;
    const int64_t row = share.row + in_tile;
    if (row >= weight.rows) continue;
    float sum = -sum_of_parts<Where>(parts, in_tile, input);
    const float of_x = sum_of_parts<Where>(parts, Where::kTileRows, input);
    if constexpr (sizeof(T) == 2 && kBits == 1) {
      sum -= sum_of_parts<Where>(parts, Where::kTileRows + 1, input);
    } else if constexpr (sizeof(T) == 2 && kBits == 2) {
      sum = fmaf(-kLow, of_x, sum);
    }
    sum = scaled(weight, kUnit<kBits>, sum, of_x);
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
    bits_join_kernel(FewRows<T> io,                          //
                     int64_t rows,                           //
                     const float* __restrict__ workspace) {  // [splits, inputs, rows]
  const int64_t row = int64_t{blockIdx.x} * kFewRowsThreads + threadIdx.x;
  if (row >= rows) return;
  const int input = static_cast<int>(blockIdx.y);
  const float sum = sum_of_splits(workspace, io.splits, io.inputs, rows, input, row);
  finish(io, rows, row, input, sum);
}

// grid (rows / warps), block (kFewRowsThreads): any weight, a warp a row. Levels are exact, and
// every 32nd column is summed in turn.
template <typename T>
__global__ void __launch_bounds__(kFewRowsThreads) bits_any_kernel(DeviceBits weight,    //
                                                                   Levels levels,        //
                                                                   FewRows<T> io,        //
                                                                   int64_t row_bytes) {  //
  const int64_t row = int64_t{blockIdx.x} * (kFewRowsThreads / 32) + threadIdx.x / 32;
  const int lane = threadIdx.x % 32, bits = static_cast<int>(weight.bits);
  if (row >= weight.rows) return;
  float sums[kMostInputs] = {}, of_x[kMostInputs] = {};
  for (int64_t k = lane; k < weight.columns; k += 32) {
    const int byte = weight.words[row * row_bytes + k * bits / 8];
    const float value = levels.of[byte >> (k * bits % 8) & ((1 << bits) - 1)];
#pragma unroll
    for (int m = 0; m < kMostInputs; ++m) {
      if (m >= io.inputs) break;
      const float x = to_float(io.x[m * weight.columns + k]);
      sums[m] = fmaf(value, x, sums[m]);
      of_x[m] += x;
    }
  }
  float own = 0;
#pragma unroll
  for (int m = 0; m < kMostInputs; ++m) {
    for (int offset = 16; offset; offset /= 2) {
      sums[m] += __shfl_xor_sync(0xFFFFFFFFu, sums[m], offset);
      of_x[m] += __shfl_xor_sync(0xFFFFFFFFu, of_x[m], offset);
    }
    if (lane == m) own = scaled(weight, levels.unit, sums[m], of_x[m]);
  }
  if (lane < io.inputs) finish(io, weight.rows, row, lane, own);
}

int64_t row_bytes_of(const DeviceBits& weight) { return 4 * words_of(weight.columns, weight.bits); }

// Whether rows of codes and of x, whose numbers have so many bytes, can be copied 16 at a time.
bool lies_in_runs(const DeviceBits& weight, int64_t width) {
  return weight.columns > 0 && weight.columns * width % 16 == 0 && row_bytes_of(weight) % 16 == 0;
}

template <typename T, int kBits, int kMost>
cudaError_t decode_tiles(const DeviceBits& weight, const FewRows<T>& io, float* workspace,
                         cudaStream_t stream) {
  using Where = Plan<T, kBits, kMost>;
  static_assert(size_t(Where::bytes(kMost)) <= kMostShared);
  const dim3 grid(ceil_divide(weight.rows, Where::kTileRows), static_cast<unsigned>(io.splits),
                  ceil_divide(io.inputs, kMost));
  const int inputs = io.inputs < kMost ? static_cast<int>(io.inputs) : kMost;
  const cudaError_t status =
      launch(bits_kernel<T, kBits, kMost>, grid, dim3(kFewRowsThreads),
             size_t(Where::bytes(inputs)), stream, weight, io, row_bytes_of(weight), workspace);
  if (status != cudaSuccess || io.splits == 1) return status;
  return launch(bits_join_kernel<T>,
                dim3(ceil_divide(weight.rows, kFewRowsThreads), static_cast<unsigned>(io.inputs)),
                dim3(kFewRowsThreads), 0, stream, io, weight.rows, workspace);
}

template <typename T, int kBits>
cudaError_t decode_bits(const DeviceBits& weight, const FewRows<T>& io, float* workspace,
                        cudaStream_t stream) {
  if constexpr (sizeof(T) == 4) {
    return decode_tiles<T, kBits, 4>(weight, io, workspace, stream);
  } else {
    if constexpr (kBits != 2) {  // the sums of two planes and 16 rows are more than registers hold
      if (io.inputs > 8) return decode_tiles<T, kBits, 16>(weight, io, workspace, stream);
    }
    return decode_tiles<T, kBits, 8>(weight, io, workspace, stream);
  }
}

}  // namespace

int64_t decode_splits(const DeviceBits& weight, int64_t inputs, int64_t width,
                      int64_t multiprocessors) {
  if (!lies_in_runs(weight, width)) return 1;
  // Alike for every dtype and number of bits, but for the columns of a stage.
  using Where = Plan<float, 1, 4>;
  const double stage = static_cast<double>(Where::kTileRows * Where::kRowBytes) +
                       static_cast<double>(inputs * Where::kTileColumns / weight.bits * width);
  const double sums = 8.0 * static_cast<double>(inputs) * Where::kTileRows;
  return splits_of(ceil_divide(weight.rows, Where::kTileRows),
                   ceil_divide(row_bytes_of(weight), Where::kRowBytes), multiprocessors,
                   sums / stage);
}

int64_t decode_workspace(const DeviceBits& weight, int64_t inputs, int64_t splits) {
  return splits > 1 ? splits * inputs * weight.rows : 0;
}

template <typename T>
cudaError_t decode_cuda(const DeviceBits& weight, const FewRows<T>& io, float* workspace,
                        cudaStream_t stream) {
  if (weight.rows == 0 || io.inputs == 0) return cudaSuccess;
  if (!lies_in_runs(weight, sizeof(T)) || !is_aligned(weight.words, 16) || !is_aligned(io.x, 16)) {
    return launch(bits_any_kernel<T>, dim3(ceil_divide(weight.rows, kFewRowsThreads / 32)),
                  dim3(kFewRowsThreads), 0, stream, weight, Levels(weight.bits), io,
                  row_bytes_of(weight));
  }
  switch (weight.bits) {
    case 1:
      return decode_bits<T, 1>(weight, io, workspace, stream);
    case 2:
      return decode_bits<T, 2>(weight, io, workspace, stream);
    default:
      return decode_bits<T, 4>(weight, io, workspace, stream);
  }
}

#define INSTANTIATE(T) \
  template cudaError_t decode_cuda(const DeviceBits&, const FewRows<T>&, float*, cudaStream_t);
INSTANTIATE(float)
INSTANTIATE(bf16)
INSTANTIATE(fp16)

}  // namespace peftkern::onebit
