// The gradient of packed values where they are few: only the products that are asked for. Block by
// block of tokens, one launch turns both operands so that tokens lie side by side, and another sums
// up the entries.
//
// Floor: 2 tokens nnz operations; the bytes of a row of the workspace for each entry, from the L2
// cache, where a block's workspace stays: tokens nnz size bytes at its rate, beside which those of
// the pattern and of the values are few. Turning reads and writes both operands once.
#include "common/launch.h"
#include "common/ptx.h"
#include "sparse/sparse_cuda.h"

namespace peftkern::sparse {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr unsigned kAllLanes = 0xFFFFFFFFu;

// Turning: columns of a tile, whose tokens are a line of kWords words.
constexpr int kColumns = 64, kWords = kLine / 4;
constexpr int kPlaces = kColumns * kWords / kThreads;  // words of a thread
// Summing: entries of a row that a warp sums up together, so that their loads are under way
// together and share the row's; and entries of a warp in all, of one row or of several.
constexpr int kEntries = 4, kShare = 8;

// A word holds so many tokens, of which the first is in the low bits.
template <typename T>
inline constexpr int kTokens = 4 / static_cast<int>(sizeof(T));

__device__ inline uint32_t bits_of(float value) { return __float_as_uint(value); }
__device__ inline uint32_t bits_of(bf16 value) { return value.bits; }
__device__ inline uint32_t bits_of(fp16 value) { return value.bits; }

__device__ inline void unpack(uint32_t word, float* out, float) { out[0] = __uint_as_float(word); }
__device__ inline void unpack(uint32_t word, float* out, bf16) {
  out[0] = __uint_as_float(word << 16);
  out[1] = __uint_as_float(word & 0xFFFF0000u);
}
__device__ inline void unpack(uint32_t word, float* out, fp16) {
  out[0] = ptx::to_float(fp16{static_cast<uint16_t>(word)});
  out[1] = ptx::to_float(fp16{static_cast<uint16_t>(word >> 16)});
}

template <typename T>
__device__ inline void unpack(uint4 run, float (&out)[4 * kTokens<T>]) {
  unpack(run.x, out, T{});
  unpack(run.y, out + kTokens<T>, T{});
  unpack(run.z, out + 2 * kTokens<T>, T{});
  unpack(run.w, out + 3 * kTokens<T>, T{});
}

// Tokens of a column from `token` on, as a word; zeros behind the last.
template <typename T>
__device__ inline uint32_t load_word(const Operand<T>& from, int64_t token, int64_t tokens,
                                     int64_t column) {
  uint32_t word = 0;
#pragma unroll
  for (int i = 0; i < kTokens<T>; ++i) {
    if (token + i < tokens) {
      const T value = from.data[(token + i) * from.token_stride + column * from.column_stride];
      word |= bits_of(value) << 16 * i;
    }
  }
  return word;
}

// grid (tiles of x's columns and then of grad's, lines), block (kThreads): a tile is kColumns by a
// line, read along whichever lies side by side and written along the tokens.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    turn_kernel(Operand<T> x, Operand<T> grad,        //
                int64_t columns, int64_t rows,        // of the pattern: x's width and grad's
                unsigned tiles,                       // of x
                int64_t begin, int64_t tokens,        // where the block begins; of all blocks
                int64_t pitch,                        // words of a row of the workspace
                uint32_t* __restrict__ workspace) {   // [columns + rows, pitch]
  __shared__ uint32_t tile[kColumns * (kWords + 1)];  // one more: no two columns in one bank
  const bool second = blockIdx.x >= tiles;
  const Operand<T> from = second ? grad : x;
  const int64_t width = second ? rows : columns;
  const int64_t left = int64_t{second ? blockIdx.x - tiles : blockIdx.x} * kColumns;
  const int64_t word = int64_t{blockIdx.y} * kWords;
  const bool along_tokens = from.token_stride == 1;
  const auto place_of = [=](int i, int& c, int& w) {
    const int place = i * kThreads + static_cast<int>(threadIdx.x);
    c = along_tokens ? place / kWords : place % kColumns;
    w = along_tokens ? place % kWords : place / kColumns;
  };
  uint32_t words[kPlaces];
#pragma unroll
  for (int i = 0; i < kPlaces; ++i) {  // all under way together
    int c, w;
    place_of(i, c, w);
    words[i] =
        load_word(from, begin + (word + w) * kTokens<T>, left + c < width ? tokens : 0, left + c);
  }
#pragma unroll
  for (int i = 0; i < kPlaces; ++i) {
    int c, w;
    place_of(i, c, w);
    tile[c * (kWords + 1) + w] = words[i];
  }
  __syncthreads();
  uint32_t* to = workspace + ((second ? columns : 0) + left) * pitch + word;
#pragma unroll
  for (int i = 0; i < kPlaces; ++i) {
    const int place = i * kThreads + static_cast<int>(threadIdx.x);
    const int c = place / kWords, w = place % kWords;
    if (left + c < width) to[c * pitch + w] = tile[c * (kWords + 1) + w];
  }
}

__device__ inline int64_t row_start(const Pattern& csr, int64_t row) {
  return csr.wide ? static_cast<const int64_t*>(csr.positions)[row]
                  : static_cast<const int32_t*>(csr.positions)[row];
}

__device__ inline int64_t column_of(const Pattern& csr, bool small, int64_t entry) {
  return small ? static_cast<const uint16_t*>(csr.places)[entry]
               : static_cast<const int32_t*>(csr.places)[entry];
}

// The row of an entry, which is this one or a later one. The warp searches together, 32 rows a
// step; of rows that begin alike all but the last are empty.
__device__ inline int64_t row_of(const Pattern& csr, int64_t row, int64_t entry, int lane) {
  int64_t end = csr.rows;
  while (end - row > 1) {
    const int64_t step = (end - row + 31) / 32, probe = row + (lane + 1) * step;
    const bool begun = probe < end && row_start(csr, probe) <= entry;
    row += __popc(__ballot_sync(kAllLanes, begun)) * step;
    end = min(end, row + step);
  }
  return row;
}

// grid (entries / (kWarps * kShare)), block (kThreads): a warp has kShare entries, and of each lane
// the tokens of every 32nd run. A long row has many warps.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    sample_kernel(Pattern csr,                     //
                  bool small,                      // columns of 16 bits
                  const uint4* __restrict__ x,     // [columns, pitch], turned
                  const uint4* __restrict__ grad,  // [rows, pitch]
                  int64_t pitch,                   // in runs of 16 bytes
                  int runs,                        // that there are
                  float scale,                     //
                  bool add,                        //
                  float* __restrict__ values) {    // [nnz]
  constexpr int kRun = 4 * kTokens<T>;
  const int lane = threadIdx.x % 32;
  int64_t entry = (int64_t{blockIdx.x} * kWarps + threadIdx.x / 32) * kShare;
  const int64_t last = min(entry + kShare, csr.nnz);
  int64_t row = 0;
  while (entry < last) {
    row = row_of(csr, row, entry, lane);
    const int64_t end = min(last, row_start(csr, row + 1));
    for (; entry < end; entry += kEntries) {
      const int count = static_cast<int>(min(end - entry, int64_t{kEntries}));
      const uint4* from[kEntries];
      float sum[kEntries] = {};
#pragma unroll
      for (int e = 0; e < kEntries; ++e) {  // beyond the last, what is read anyway
        from[e] = x + column_of(csr, small, entry + (e < count ? e : 0)) * pitch;
      }
      for (int run = lane; run < runs; run += 32) {
        const uint4 side = grad[row * pitch + run];
        uint4 raw[kEntries];
#pragma unroll
        for (int e = 0; e < kEntries; ++e) raw[e] = from[e][run];
        float of_grad[kRun], of_x[kRun];
        unpack<T>(side, of_grad);
#pragma unroll
        for (int e = 0; e < kEntries; ++e) {
          unpack<T>(raw[e], of_x);
#pragma unroll
          for (int i = 0; i < kRun; ++i) sum[e] = fmaf(of_grad[i], of_x[i], sum[e]);
        }
      }
#pragma unroll
      for (int e = 0; e < kEntries; ++e) {
#pragma unroll
        for (int offset = 16; offset; offset /= 2) {
          sum[e] += __shfl_xor_sync(kAllLanes, sum[e], offset);
        }
        if (lane == e && e < count) {
          values[entry + e] = (add ? values[entry + e] : 0.0f) + scale * sum[e];
        }
      }
    }
    entry = end;
  }
}

unsigned ceil_divide(int64_t count, int64_t by) {
  return static_cast<unsigned>((count + by - 1) / by);
}

}  // namespace

template <typename T>
cudaError_t sddmm_cuda(const Pattern& csr, const Operand<T>& x, const Operand<T>& grad,
                       const Sampled<float>& io, void* workspace, int64_t length,
                       cudaStream_t stream) {
  constexpr int64_t kSize = sizeof(T);
  auto* turned = static_cast<uint4*>(workspace);
  const int64_t pitch = length * kSize / 16;
  const unsigned tiles = ceil_divide(csr.columns, kColumns);
  bool add = io.add;
  int64_t begin = 0;
  do {
    const unsigned lines = ceil_divide(std::min(length, io.tokens - begin) * kSize, kLine);
    if (lines) {
      const dim3 grid(tiles + ceil_divide(csr.rows, kColumns), lines);
      const cudaError_t status =
          launch(turn_kernel<T>, grid, dim3(kThreads), 0, stream, x, grad, csr.columns, csr.rows,
                 tiles, begin, io.tokens, pitch * 4, static_cast<uint32_t*>(workspace));
      if (status != cudaSuccess) return status;
    }
    const cudaError_t status =
        launch(sample_kernel<T>, dim3(ceil_divide(csr.nnz, kWarps * kShare)), dim3(kThreads), 0,
               stream, csr, is_small(csr.columns), turned, turned + csr.columns * pitch, pitch,
               static_cast<int>(lines * (kLine / 16)), io.scale, add, io.values);
    if (status != cudaSuccess) return status;
    add = true;
    begin += length;
  } while (begin < io.tokens);
  return cudaSuccess;
}

#define INSTANTIATE(T)                                                                  \
  template cudaError_t sddmm_cuda(const Pattern&, const Operand<T>&, const Operand<T>&, \
                                  const Sampled<float>&, void*, int64_t, cudaStream_t);
INSTANTIATE(float)
INSTANTIATE(bf16)
INSTANTIATE(fp16)

}  // namespace peftkern::sparse
