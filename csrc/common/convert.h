// Tensors of any float dtype as the kernels want them; part of the binding.
#pragma once
#include <cstring>

#include "common/binding.h"
#include "common/kernels.h"

namespace peftkern {

// Calls f with a table's kernels of a dtype and a pointer of its type, null.
template <typename Table, typename Function>
auto with_kernels(const Table& table, ScalarType dtype, const Function& f) {
  switch (dtype) {
    case ScalarType::Double:
      return f(table.f64, static_cast<double*>(nullptr));
    case ScalarType::BFloat16:
      return f(table.bf16, static_cast<bf16*>(nullptr));
    case ScalarType::Half:
      return f(table.fp16, static_cast<fp16*>(nullptr));
    default:
      STD_TORCH_CHECK(dtype == ScalarType::Float, "a tensor must be of a float dtype");
      return f(table.f32, static_cast<float*>(nullptr));
  }
}

// One row of `count`, by way of float.
inline void convert_row(const void* from, ScalarType from_dtype, void* to, ScalarType to_dtype,
                        int64_t count) {
  if (count == 0) return;
  if (from_dtype == to_dtype) {
    std::memcpy(to, from, static_cast<size_t>(count * size_of(to_dtype)));
    return;
  }
  constexpr int64_t kBatch = 512;
  float buffer[kBatch];
  for (int64_t i = 0; i < count; i += kBatch) {
    const int64_t n = std::min(kBatch, count - i);
    with_kernels(shared_kernels(), from_dtype, [&](const auto& source, auto* s) {
      source.to_float(static_cast<decltype(s)>(const_cast<void*>(from)) + i, n, buffer);
    });
    with_kernels(shared_kernels(), to_dtype, [&](const auto& target, auto* t) {
      target.from_float(buffer, n, static_cast<decltype(t)>(to) + i);
    });
  }
}

// Rows of whole memory: column_stride 1 in both.
inline void convert(const Matrix& from, const Matrix& to) {
  parallel(from.rows, from.columns, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      convert_row(from.at(row, 0), from.dtype, to.at(row, 0), to.dtype, from.columns);
    }
  });
}

inline void clear(const Matrix& matrix) {
  if (matrix.columns == 0) return;  // and perhaps no memory
  for (int64_t row = 0; row < matrix.rows; ++row) {
    std::memset(matrix.at(row, 0), 0, static_cast<size_t>(matrix.columns * size_of(matrix.dtype)));
  }
}

// The matrix itself where it has this dtype, else a copy that lives as long as `scratch`.
inline Matrix as_dtype(const Matrix& from, ScalarType dtype, Scratch& scratch) {
  if (from.dtype == dtype) return from;
  void* memory = scratch.take_bytes(from.rows * from.columns * size_of(dtype));
  const Matrix to = Matrix::dense(memory, dtype, from.rows, from.columns);
  convert(from, to);
  return to;
}

}  // namespace peftkern
