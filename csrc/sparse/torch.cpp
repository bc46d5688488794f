// The binding of the gradient of values, of matrices and of convolutions.
#include "sparse/operands.h"

namespace peftkern::sparse {
namespace {

template <typename T>
Operand<T> operand_of(const Tensor& tensor, const char* name, int64_t columns) {
  STD_TORCH_CHECK(tensor.is_cpu() && tensor.dim() == 2 && tensor.size(1) == columns, name,
                  " must be a matrix of the pattern's width on the CPU");
  const auto strides = tensor.strides();
  return {static_cast<const T*>(tensor.const_data_ptr()), strides[0], strides[1]};
}

void check_pair(const Tensor& x, const Tensor& grad) {
  STD_TORCH_CHECK(x.scalar_type() == grad.scalar_type(), "grad must be of x's dtype");
  STD_TORCH_CHECK(x.dim() > 0 && grad.dim() > 0 && x.size(0) == grad.size(0),
                  "x and grad must have as many rows");
}

// Rows [first_row, first_row + rows) of the pattern, by the kernel or by the library, whichever the
// density makes faster. `sample(block, room)` calls the kernel; `left` and `right` turn an operand:
// (token, tokens, first column, columns, length, to).
template <typename A, typename Sample, typename Left, typename Right, typename Collect>
void by_density(const Pattern& pattern, int64_t first_row, int64_t rows, double dense_from,
                const Sampled<A>& io, const Sample& sample, const Left& left, const Right& right,
                const Collect& collect) {
  const bool dense = static_cast<double>(pattern.nnz) >=
                     dense_from * static_cast<double>(pattern.rows) * pattern.columns;
  const Plan plan = dense ? Plan::dense(rows, pattern.columns, io.tokens)
                          : Plan(rows, pattern.columns, io.tokens, sizeof(A));
  const int64_t share = pattern.nnz / std::max<int64_t>(1, pattern.rows / rows);
  parallel(plan.tasks(), share * io.tokens / kLanes / plan.tasks() + 1, [&](int64_t b, int64_t e) {
    Scratch scratch;
    const int64_t listed = pattern.is_bitmap && !dense ? Plan::kListed : 0;
    const Room<A> room = room_for<A>(plan.length, plan.width, listed, scratch);
    A* strip = dense ? scratch.take<A>(plan.part * plan.length) : nullptr;
    A* product = dense ? scratch.take<A>(plan.part * plan.width) : nullptr;
    for (int64_t task = b; task < e; ++task) {
      Block block = plan.block(task, rows, pattern.columns);
      block.row_begin += first_row, block.row_end += first_row;
      if (!dense) {
        sample(block, room);
        continue;
      }
      const int64_t height = block.row_end - block.row_begin;
      const int64_t width = block.column_end - block.column_begin;
      const ScalarType dtype = sizeof(A) == 8 ? ScalarType::Double : ScalarType::Float;
      const Matrix out = Matrix::dense(product, dtype, height, width);
      if (io.tokens == 0) clear(out);
      for (int64_t token = 0; token < io.tokens; token += plan.length) {
        const int64_t tokens = std::min(plan.length, io.tokens - token);
        left(token, tokens, block.column_begin, width, plan.length, room.panel);
        right(token, tokens, block.row_begin, height, plan.length, strip);
        const Matrix x{reinterpret_cast<char*>(room.panel), dtype, tokens, width, 1, plan.length};
        const Matrix grad{reinterpret_cast<char*>(strip), dtype, height, tokens, plan.length};
        multiply(out, grad, x, token > 0);
      }
      collect(pattern, block, product, io, room.places);
    }
  });
}

void sddmm_into(void* values, const Tensor& x, const Tensor& grad, const Pattern& pattern,
                double scale, bool add) {
  check_pair(x, grad);
  if (pattern.nnz == 0) return;
  with_kernels(kernels(), x.scalar_type(), [&](const auto& typed, auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    using A = SumOf<T>;
    const auto left = operand_of<T>(x, "x", pattern.columns);
    const auto right = operand_of<T>(grad, "grad", pattern.rows);
    const int64_t tokens = x.size(0);
    const Sampled<A> io{tokens, static_cast<A>(scale), add, static_cast<A*>(values)};
    by_density<A>(
        pattern, 0, pattern.rows, typed.dense_from, io,
        [&](const Block& block, const Room<A>& room) {
          typed.sddmm(pattern, block, left, right, io, room);
        },
        [&](auto... where) { typed.turn(left, where...); },
        [&](auto... where) { typed.turn(right, where...); }, typed.collect);
  });
}

Tensor sddmm(const Tensor& x, const Tensor& grad, std::vector<Tensor> tensors,
             std::vector<int64_t> layout, double scale) {
  const Pattern pattern = pattern_of(tensors, layout);
  Tensor values = empty({pattern.nnz}, sums_of(x.scalar_type()));
  sddmm_into(values.mutable_data_ptr(), x, grad, pattern, scale, false);
  return values;
}

void sddmm_onto(Tensor values, const Tensor& x, const Tensor& grad, std::vector<Tensor> tensors,
                std::vector<int64_t> layout, double scale) {
  const Pattern pattern = pattern_of(tensors, layout);
  check_count(values, "values", pattern.nnz);
  check_dtype(values, "values", sums_of(x.scalar_type()));
  sddmm_into(values.mutable_data_ptr(), x, grad, pattern, scale, true);
}

// The shapes and steps of a convolution, once they are known to fit each other.
struct Convolution {
  int64_t kernel_height, kernel_width, step_down, step_right, above, left, down, right, groups;
  int64_t channels, rows;  // of one group

  Convolution(const std::vector<int64_t>& w, const Tensor& x, const Tensor& grad,
              const Pattern& pattern) {
    STD_TORCH_CHECK(w.size() == 9, "window must be nine numbers");
    kernel_height = w[0], kernel_width = w[1], step_down = w[2], step_right = w[3], above = w[4];
    left = w[5], down = w[6], right = w[7], groups = w[8];
    STD_TORCH_CHECK(
        std::min({w[0], w[1], w[2], w[3], w[6], w[7], w[8]}) > 0 && above >= 0 && left >= 0,
        "window must have sizes and steps of at least 1");
    STD_TORCH_CHECK(x.is_cpu() && grad.is_cpu() && x.dim() == 4 && grad.dim() == 4,
                    "x and grad must be images on the CPU");
    channels = x.size(1) / groups, rows = pattern.rows / groups;
    STD_TORCH_CHECK(x.size(1) == channels * groups && pattern.rows == rows * groups &&
                        grad.size(1) == pattern.rows &&
                        pattern.columns == channels * kernel_height * kernel_width,
                    "x and grad must have the channels of the pattern");
    STD_TORCH_CHECK(grad.size(2) <= outputs(x.size(2), kernel_height, step_down, above, down) &&
                        grad.size(3) <= outputs(x.size(3), kernel_width, step_right, left, right),
                    "grad must be no larger than the output");
  }

  static int64_t outputs(int64_t size, int64_t kernel, int64_t step, int64_t pad, int64_t spread) {
    const int64_t room = size + 2 * pad - spread * (kernel - 1) - 1;
    return room < 0 ? 0 : room / step + 1;
  }
};

template <typename T>
Window<T> window_of(const Convolution& c, const Tensor& x, const Tensor& grad, int64_t group) {
  const auto s = x.strides();
  return {static_cast<const T*>(x.const_data_ptr()) + group * c.channels * s[1],
          s[0],
          s[1],
          s[2],
          s[3],
          x.size(2),
          x.size(3),
          grad.size(2),
          grad.size(3),
          c.kernel_height,
          c.kernel_width,
          c.step_down,
          c.step_right,
          c.above,
          c.left,
          c.down,
          c.right};
}

template <typename T>
Images<T> images_of(const Tensor& grad) {
  const auto s = grad.strides();
  return {static_cast<const T*>(grad.const_data_ptr()),
          s[0],
          s[1],
          s[2],
          s[3],
          grad.size(2),
          grad.size(3)};
}

Tensor conv2d_sddmm(const Tensor& x, const Tensor& grad, std::vector<Tensor> tensors,
                    std::vector<int64_t> layout, std::vector<int64_t> window, double scale) {
  const Pattern pattern = pattern_of(tensors, layout);
  check_pair(x, grad);
  const Convolution c(window, x, grad, pattern);
  Tensor values = empty({pattern.nnz}, sums_of(x.scalar_type()));
  if (pattern.nnz == 0) return values;
  const int64_t tokens = grad.size(0) * grad.size(2) * grad.size(3);
  with_kernels(kernels(), x.scalar_type(), [&](const auto& typed, auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    using A = SumOf<T>;
    const Sampled<A> io{tokens, static_cast<A>(scale), false,
                        static_cast<A*>(values.mutable_data_ptr())};
    const Images<T> right = images_of<T>(grad);
    for (int64_t group = 0; group < c.groups; ++group) {
      const Window<T> left = window_of<T>(c, x, grad, group);
      by_density<A>(
          pattern, group * c.rows, c.rows, typed.dense_from, io,
          [&](const Block& block, const Room<A>& room) {
            typed.conv2d_sddmm(pattern, block, left, right, io, room);
          },
          [&](auto... where) { typed.turn_window(left, where...); },
          [&](auto... where) { typed.turn_images(right, where...); }, typed.collect);
    }
  });
  return values;
}

}  // namespace

PEFTKERN_OPS(CPU, m) {
  m.impl("sparse_sddmm", TORCH_BOX(&sddmm));
  m.impl("sparse_sddmm_", TORCH_BOX(&sddmm_onto));
  m.impl("sparse_conv2d_sddmm", TORCH_BOX(&conv2d_sddmm));
}

}  // namespace peftkern::sparse
