// The frozen weight as the binding meets it: its tensors, checked, and panels of it to multiply by.
#pragma once
#include "common/convert.h"
#include "qlora/qlora.h"

namespace peftkern::qlora {

// A panel of decoded weights stays in the last-level cache while the library reads it again.
// Smaller ones make its products thin: 1 MB costs 1.16 of the time of the whole, 8 MB and more
// nothing.
inline constexpr int64_t kPanelBytes = int64_t{16} << 20;

// Of W, what is cut into panels.
enum class Side { rows, columns };

class Base {
 public:
  int64_t experts, rows, columns;
  Weight codes{};  // of all experts, one above the other

  // `weight` as in peftkern/qlora/ops.py: one dense tensor, or the buffers of a QuantizedWeight.
  Base(const std::vector<Tensor>& weight, const std::vector<int64_t>& layout)
      : experts(at(layout, 0)), rows(at(layout, 1)), columns(at(layout, 2)), weight_(weight) {
    STD_TORCH_CHECK(layout.size() == 5 && std::min({experts, rows, columns}) >= 0,
                    "layout must be experts, rows, columns, block size, bits");
    const int64_t block = layout[3], bits = layout[4];
    const size_t tensors = weight.size();
    STD_TORCH_CHECK(bits == 0   ? tensors == 1
                    : bits == 4 ? tensors == 3 || tensors == 6
                                : bits == 8 && tensors == 2,
                    "weight must be one dense tensor or the buffers of a quantised one");
    codes.rows = experts * rows;
    codes.columns = columns;
    codes.bits = bits;
    if (bits == 0) check_count(weight[0], "weight", codes.rows * columns);
    if (bits == 4) take_nibbles(block, codes.rows * columns);
    if (bits == 8) take_bytes();
  }

  bool is_dense() const { return codes.bits == 0; }

  // One expert's rows as a weight of their own, for few_rows. It must be made of whole blocks.
  Weight of_expert(int64_t expert) const {
    Weight w = codes;
    const int64_t first = expert * rows * columns;
    w.packed += first * w.bits / 8;
    w.first_block = first / w.block;
    w.rows = rows;
    return w;
  }

  // The product's dtype: bf16 where the CPU multiplies in it and x came in it, else the sums' own.
  ScalarType product_dtype(ScalarType x, ScalarType sums) const {
    const bool bf16 = x == ScalarType::BFloat16 && current_isa() >= Isa::avx512bf16;
    return bf16 ? ScalarType::BFloat16 : sums;
  }

  // How wide the panels are that W is cut into, in this dtype: the whole of it where nothing has to
  // be decoded or converted.
  int64_t panel_width(Side side, ScalarType dtype) const {
    const int64_t width = side == Side::rows ? rows : columns;
    const int64_t length = side == Side::rows ? columns : rows;
    if (lies_as(dtype)) return width;
    const int64_t fits = kPanelBytes / std::max<int64_t>(1, length * size_of(dtype)) / 64 * 64;
    return std::min(width, std::max<int64_t>(64, fits));
  }

  // Panel [begin, end) as the right operand of a product that sums over the other side: W^T where
  // rows are cut, W where columns are.
  Matrix panel(int64_t expert, Side side, int64_t begin, int64_t end, ScalarType dtype,
               Scratch& scratch) const {
    if (side == Side::columns) return part(expert, 0, rows, begin, end, dtype, scratch);
    return part(expert, begin, end, 0, columns, dtype, scratch).transposed();
  }

 private:
  bool lies_as(ScalarType dtype) const { return is_dense() && weight_[0].scalar_type() == dtype; }

  Matrix part(int64_t expert, int64_t row_begin, int64_t row_end, int64_t column_begin,
              int64_t column_end, ScalarType dtype, Scratch& scratch) const {
    const int64_t height = row_end - row_begin, width = column_end - column_begin;
    if (lies_as(dtype)) return dense_part(expert, row_begin, row_end, column_begin, column_end);
    // Parts of rows are narrow, and often a power of two: so far apart, they would fall into the
    // same few places of a cache.
    const int64_t stride = width == columns ? width : width + 16;
    void* memory = scratch.take_bytes(height * stride * size_of(dtype));
    const Matrix out{static_cast<char*>(memory), dtype, height, width, stride};
    if (is_dense()) {
      convert(dense_part(expert, row_begin, row_end, column_begin, column_end), out);
      return out;
    }
    with_kernels(kernels(), dtype, [&](const auto& typed, auto* type) {
      auto* to = static_cast<decltype(type)>(memory);
      parallel(height, width, [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) {
          const int64_t first = (expert * rows + row_begin + row) * columns;
          typed.dequantize(codes, first + column_begin, first + column_end, false,
                           to + row * stride);
        }
      });
    });
    return out;
  }

  Matrix dense_part(int64_t expert, int64_t row_begin, int64_t row_end, int64_t column_begin,
                    int64_t column_end) const {
    return Matrix::of(weight_[0], experts * rows, columns)
        .part(expert * rows + row_begin, expert * rows + row_end, column_begin, column_end);
  }

  void take_nibbles(int64_t block, int64_t count) {
    STD_TORCH_CHECK(is_block_size(block), "block_size must be a power of two");
    const int64_t blocks = (count + block - 1) / block;
    codes.packed = buffer<uint8_t>(0, "packed", (count + 1) / 2, ScalarType::Byte);
    codes.codebook = buffer<float>(2, "codebook", 16, ScalarType::Float);
    codes.block = block;
    if (weight_.size() == 3) {
      codes.absmax = buffer<float>(1, "absmax", blocks, ScalarType::Float);
      return;
    }
    const int64_t nested = (blocks + kNestedBlock - 1) / kNestedBlock;
    codes.codes = buffer<uint8_t>(1, "absmax", blocks, ScalarType::Byte);
    codes.nested_absmax = buffer<float>(3, "nested_absmax", nested, ScalarType::Float);
    codes.map = buffer<float>(4, "nested_map", 256, ScalarType::Float);
    codes.offset = *buffer<float>(5, "nested_offset", 1, ScalarType::Float);
  }

  void take_bytes() {
    const int64_t count = codes.rows * columns;
    codes.packed =
        reinterpret_cast<const uint8_t*>(buffer<int8_t>(0, "packed", count, ScalarType::Char));
    codes.absmax = buffer<float>(1, "absmax", codes.rows, ScalarType::Float);
    codes.block = columns;
  }

  static int64_t at(const std::vector<int64_t>& layout, size_t i) {
    return i < layout.size() ? layout[i] : 0;
  }

  template <typename T>
  const T* buffer(size_t i, const char* name, int64_t count, ScalarType dtype) const {
    check_count(weight_[i], name, count);
    check_dtype(weight_[i], name, dtype);
    return static_cast<const T*>(weight_[i].const_data_ptr());
  }

  std::vector<Tensor> weight_;
};

}  // namespace peftkern::qlora
