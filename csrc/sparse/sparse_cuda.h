// sparse on a GPU: the kernels in CUDA C++, for sm_80 and later. Equations and patterns are those
// of sparse.h; this says what differs.
//
// Pointers are the device's. sddmm_cuda starts its kernels on `stream` of the current device and
// returns the status of the start; it does not wait, allocate or read what lies on the device, so a
// CUDA graph may hold it. Addresses are 64 bits wide. No number is added by two threads: the same
// call gives the same bits, on every GPU.
#pragma once
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

#include "sparse/sparse.h"

namespace peftkern::sparse {

// Tokens are taken block by block. Of a block both operands lie turned in a workspace, a row of
// tokens for each column, in lines of so many bytes.
inline constexpr int64_t kLine = 128, kMostWorkspace = int64_t{16} << 20;
inline constexpr int64_t kMostRows = kMostWorkspace / kLine;  // rows and columns of a pattern
inline constexpr int64_t kMostLength = int64_t{1} << 16;

// Tokens of a block, whole lines of them, so that the workspace is large enough for the rows and
// columns of a pattern, kMostRows at most in all; `size`: bytes of an element.
inline int64_t sddmm_length(int64_t rows, int64_t tokens, int64_t size) {
  const int64_t line = kLine / size, lines = kMostRows / std::max<int64_t>(1, rows);
  const int64_t most = std::min(kMostLength, lines * line);
  return std::min(most, (tokens + line - 1) / line * line);
}

// The csr is one of at least one entry. T: float, bf16, fp16. `workspace`: length * (rows +
// columns) elements of T, aligned to 16 bytes, in any state; `length` whole lines, and only 0 for
// 0 tokens.
template <typename T>
cudaError_t sddmm_cuda(const Pattern& csr, const Operand<T>& x, const Operand<T>& grad,
                       const Sampled<float>& io, void* workspace, int64_t length,
                       cudaStream_t stream);

}  // namespace peftkern::sparse
