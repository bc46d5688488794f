// What every torch.cpp stands on: checks, scratch memory, and the library's matrix product.
// LibTorch's stable ABI only, so one binary serves every torch from 2.11 on.
#pragma once
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <optional>
#include <vector>

// The ops' namespace; spelled once more, in peftkern/_native.py.
#define PEFTKERN_OPS(key, m) STABLE_TORCH_LIBRARY_IMPL(peftkern, key, m)

namespace peftkern {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

// The safety net under Python's checks: what keeps a raw op from touching memory that is not its
// own.
inline void check_dense(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(tensor.is_cpu(), name, " must be on the CPU");
  STD_TORCH_CHECK(tensor.is_contiguous(), name, " must be contiguous");
}

inline void check_count(const Tensor& tensor, const char* name, int64_t count) {
  check_dense(tensor, name);
  STD_TORCH_CHECK(tensor.numel() == count, name, " must have ", count, " elements, got ",
                  tensor.numel());
}

inline void check_dtype(const Tensor& tensor, const char* name, ScalarType dtype) {
  STD_TORCH_CHECK(tensor.scalar_type() == dtype, name, " has the wrong dtype");
}

inline int64_t size_of(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Double:
      return 8;
    case ScalarType::Float:
      return 4;
    case ScalarType::BFloat16:
    case ScalarType::Half:
      return 2;
    default:
      STD_TORCH_CHECK(false, "a tensor must be float32, bfloat16, float16 or float64");
  }
  return 0;
}

// Whether fresh memory is filled with NaN before anyone may write it. Tests turn it on, so that
// what a kernel forgets to write cannot pass for a result.
inline bool& poison() {
  static bool on = false;
  return on;
}

inline void* fresh(void* memory, int64_t bytes) {
  if (poison() && bytes) std::memset(memory, 0xFF, static_cast<size_t>(bytes));
  return memory;
}

// Asks for large pages for fresh memory that will be read in long streams or in strides: with small
// ones, each 4 KB cost a walk of the page table, a sixth of the time where no cache holds the data.
inline constexpr int64_t kHugePage = int64_t{2} << 20;
inline void ask_for_huge_pages(void* memory, int64_t bytes) {
#if defined(__linux__)
  const auto begin = (reinterpret_cast<uintptr_t>(memory) + kHugePage - 1) / kHugePage * kHugePage;
  const auto end = (reinterpret_cast<uintptr_t>(memory) + bytes) / kHugePage * kHugePage;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

// An uninitialised tensor. Through the shim: the dispatcher would take three times as long.
inline Tensor allocate(const std::vector<int64_t>& shape, ScalarType dtype, int32_t device_type,
                       int32_t device_index) {
  std::vector<int64_t> strides(shape.size(), 1);
  for (size_t d = shape.size(); d > 1; --d) {
    strides[d - 2] = strides[d - 1] * std::max<int64_t>(1, shape[d - 1]);
  }
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      static_cast<int64_t>(shape.size()), shape.data(), strides.data(),
      torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)), device_type,
      device_index, &handle));
  return Tensor(handle);
}

inline Tensor empty(const std::vector<int64_t>& shape, ScalarType dtype) {
  Tensor tensor = allocate(shape, dtype, aoti_torch_device_type_cpu(), 0);
  if (tensor.numel()) {
    fresh(tensor.mutable_data_ptr(), tensor.numel() * static_cast<int64_t>(tensor.element_size()));
  }
  return tensor;
}

inline Tensor empty_as(const Tensor& tensor) {
  return empty({tensor.sizes().begin(), tensor.sizes().end()}, tensor.scalar_type());
}

// Memory for the length of one op. Up to a size, the thread keeps it from call to call, since fresh
// pages cost more than the work that is done in them. Scratches nest, and only the innermost may
// take: what an outer one took after it would be given out again.
class Scratch {
 public:
  Scratch() : first_(next()), depth_(++depth()) {}
  ~Scratch() {
    --depth();
    for (size_t i = first_; i < next(); ++i) {
      if (blocks()[i].bytes > kKept) blocks()[i] = {};
    }
    next() = first_;
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  template <typename T>
  T* take(int64_t count) {
    return static_cast<T*>(take_bytes(count * static_cast<int64_t>(sizeof(T))));
  }

  void* take_bytes(int64_t bytes) {
    STD_TORCH_CHECK(depth_ == depth(), "only the innermost Scratch may take memory");
    if (next() == blocks().size()) blocks().emplace_back();
    Block& block = blocks()[next()++];
    if (block.bytes < bytes) {
      block = {};  // before the new one is there, so that both never are
      const int64_t page = bytes >= kHugePage ? kHugePage : 64,
                    size = (bytes + page - 1) / page * page;
      block.memory.reset(std::aligned_alloc(static_cast<size_t>(page), static_cast<size_t>(size)));
      STD_TORCH_CHECK(block.memory, "out of memory for ", size, " bytes");
      block.bytes = size;
      ask_for_huge_pages(block.memory.get(), size);
    }
    return fresh(block.memory.get(), bytes);
  }

 private:
  static constexpr int64_t kKept = int64_t{64} << 20;

  struct Free {
    void operator()(void* memory) const { std::free(memory); }
  };
  struct Block {
    std::unique_ptr<void, Free> memory;
    int64_t bytes = 0;
  };
  static std::vector<Block>& blocks() {
    static thread_local std::vector<Block> all;
    return all;
  }
  static size_t& next() {
    static thread_local size_t index = 0;
    return index;
  }
  static int64_t& depth() {
    static thread_local int64_t innermost = 0;
    return innermost;
  }
  size_t first_;
  int64_t depth_;
};

// A matrix in somebody's memory.
struct Matrix {
  char* data;
  ScalarType dtype;
  int64_t rows, columns, row_stride, column_stride = 1;

  static Matrix dense(void* data, ScalarType dtype, int64_t rows, int64_t columns) {
    return {static_cast<char*>(data), dtype, rows, columns, columns, 1};
  }
  static Matrix of(const Tensor& tensor, int64_t rows, int64_t columns) {
    return dense(const_cast<void*>(tensor.const_data_ptr()), tensor.scalar_type(), rows, columns);
  }
  void* at(int64_t row, int64_t column) const {
    return data + (row * row_stride + column * column_stride) * size_of(dtype);
  }
  Matrix part(int64_t row_begin, int64_t row_end, int64_t column_begin, int64_t column_end) const {
    return {static_cast<char*>(at(row_begin, column_begin)),
            dtype,
            row_end - row_begin,
            column_end - column_begin,
            row_stride,
            column_stride};
  }
  Matrix part_rows(int64_t begin, int64_t end) const { return part(begin, end, 0, columns); }
  Matrix transposed() const { return {data, dtype, columns, rows, column_stride, row_stride}; }
  Tensor tensor() const {
    const torch::stable::Device cpu(torch::headeronly::DeviceType::CPU);
    return torch::stable::from_blob(data, {rows, columns}, {row_stride, column_stride}, cpu, dtype);
  }
};

// A product so small that calling the library costs more than the work.
template <typename T>
void multiply_small(const Matrix& out, const Matrix& a, const Matrix& b, double beta,
                    double alpha) {
  const auto at = [](const Matrix& m, int64_t row, int64_t column) {
    return static_cast<T*>(m.at(row, column));
  };
  for (int64_t i = 0; i < out.rows; ++i) {
    for (int64_t j = 0; j < out.columns; ++j) {
      T sum = 0;
      for (int64_t k = 0; k < a.columns; ++k) sum += *at(a, i, k) * *at(b, k, j);
      T& target = *at(out, i, j);
      target = static_cast<T>(alpha) * sum + (beta == 0 ? T(0) : static_cast<T>(beta) * target);
    }
  }
}

// out = beta * out + alpha * a b, by the library. Through the shim and not the dispatcher: an outer
// autocast must not cast the operands, nor an outer dispatch mode see them.
inline void multiply(const Matrix& out, const Matrix& a, const Matrix& b, double beta,
                     double alpha = 1.0) {
  constexpr int64_t kSmall = 2048;
  if (out.rows == 0 || out.columns == 0) return;
  if (out.rows * out.columns * a.columns <= kSmall) {
    if (out.dtype == ScalarType::Float) return multiply_small<float>(out, a, b, beta, alpha);
    if (out.dtype == ScalarType::Double) return multiply_small<double>(out, a, b, beta, alpha);
  }
  const Tensor target = out.tensor(), left = a.tensor(), right = b.tensor();
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_cpu_addmm_out(target.get(), target.get(), left.get(), right.get(), beta, alpha));
}

// Calls f(begin, end) over [0, count), in parallel where each thread gets work for some
// microseconds.
template <typename Function>
void parallel(int64_t count, int64_t work_per_item, const Function& f) {
  constexpr int64_t kWorth = 1 << 15;
  if (count == 0) return;
  if (count * work_per_item < 2 * kWorth) return f(int64_t{0}, count);
  const int64_t grain = std::max<int64_t>(1, kWorth / std::max<int64_t>(1, work_per_item));
  torch::stable::parallel_for(0, count, grain, f);
}

}  // namespace peftkern
