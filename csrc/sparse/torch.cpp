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

// Calls f(kernels, block, room) for every block of a plan.
template <typename A, typename Function>
void for_each_block(const Plan& plan, int64_t rows, int64_t columns, int64_t work,
                    const Function& f) {
  parallel(plan.tasks(), work / plan.tasks() + 1, [&](int64_t begin, int64_t end) {
    Scratch scratch;
    const Room<A> room = room_for<A>(plan.length, plan.width, scratch);
    for (int64_t task = begin; task < end; ++task) f(plan.block(task, rows, columns), room);
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
    const Plan plan(pattern.rows, pattern.columns, tokens, sizeof(A));
    for_each_block<A>(plan, pattern.rows, pattern.columns, pattern.nnz * tokens / kLanes,
                      [&](const Block& block, const Room<A>& room) {
                        typed.sddmm(pattern, block, left, right, io, room);
                      });
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
    const Plan plan(c.rows, pattern.columns, tokens, sizeof(A));
    for (int64_t group = 0; group < c.groups; ++group) {
      const Window<T> left = window_of<T>(c, x, grad, group);
      const Images<T> right = images_of<T>(grad);
      for_each_block<A>(plan, c.rows, pattern.columns, pattern.nnz * tokens / kLanes / c.groups,
                        [&](Block block, const Room<A>& room) {
                          block.row_begin += group * c.rows, block.row_end += group * c.rows;
                          typed.conv2d_sddmm(pattern, block, left, right, io, room);
                        });
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
