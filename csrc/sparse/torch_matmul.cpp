// The binding of products with S, and of what lies between a weight and its values.
#include "sparse/operands.h"

namespace peftkern::sparse {
namespace {

// x [..., width] dense; -> how many rows, and out [..., out_width].
Tensor beside(const Tensor& x, int64_t width, int64_t out_width, const MaybeTensor& residual,
              int64_t& tokens) {
  check_dense(x, "x");
  STD_TORCH_CHECK(x.dim() > 0 && x.size(-1) == width, "x must be as wide as the pattern");
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  tokens = 1;
  for (size_t d = 0; d + 1 < shape.size(); ++d) tokens *= shape[d];
  shape.back() = out_width;
  if (residual) {
    check_count(*residual, "residual", tokens * out_width);
    check_dtype(*residual, "residual", x.scalar_type());
  }
  return empty(shape, x.scalar_type());
}

template <typename T>
Operand<T> operand_of(const Tensor& x, int64_t width) {
  return {static_cast<const T*>(x.const_data_ptr()), width, 1};
}

template <typename T, typename A>
Beside<T, A> io_of(const MaybeTensor& residual, Tensor& out, const A* values, int64_t tokens,
                   double scale) {
  return {residual ? static_cast<const T*>(residual->const_data_ptr()) : nullptr,
          static_cast<T*>(out.mutable_data_ptr()), values, tokens, static_cast<A>(scale)};
}

// Tokens of a block whose panel of all columns stays in a core's own cache.
int64_t length_for(int64_t tokens, int64_t columns, int64_t size) {
  const int64_t most = Plan::kPanel / (std::max<int64_t>(1, columns) * size) / kLanes * kLanes;
  const int64_t wanted = std::min(Plan::kLength, Plan::round_up(tokens, kLanes));
  return std::max(kLanes, std::min(most, wanted));
}

Tensor matmul(const Tensor& x, const Tensor& values, std::vector<Tensor> tensors,
              std::vector<int64_t> layout, MaybeTensor residual, double scale) {
  const Pattern pattern = pattern_of(tensors, layout);
  int64_t tokens;
  Tensor y = beside(x, pattern.columns, pattern.rows, residual, tokens);
  if (tokens == 0 || pattern.rows == 0) return y;
  with_kernels(kernels(), x.scalar_type(), [&](const auto& typed, auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    using A = SumOf<T>;
    const auto io = io_of<T>(residual, y, values_of<A>(values, pattern), tokens, scale);
    const auto left = operand_of<T>(x, pattern.columns);
    const int64_t length = length_for(tokens, pattern.columns, sizeof(A));
    const int64_t turns = (tokens + length - 1) / length;
    const int64_t threads = torch::stable::get_num_threads();
    const int64_t parts =
        std::max<int64_t>(1, std::min(threads / std::gcd(threads, turns), pattern.rows / kStrip));
    const int64_t part = Plan::round_up((pattern.rows + parts - 1) / parts, kStrip);
    parallel(turns * parts, pattern.nnz * length / kLanes / parts + 1, [&](int64_t b, int64_t e) {
      Scratch scratch;
      const Room<A> room = room_for<A>(length, pattern.columns, 0, scratch);
      for (int64_t task = b; task < e; ++task) {
        const int64_t token = task / parts * length,
                      row = std::min(task % parts * part, pattern.rows);
        const Block block{row, std::min(row + part, pattern.rows), 0, pattern.columns};
        typed.matmul(pattern, block, left, io, token, std::min(token + length, tokens), room);
      }
    });
  });
  return y;
}

Tensor matmul_t(const Tensor& grad, const Tensor& values, std::vector<Tensor> tensors,
                std::vector<int64_t> layout, MaybeTensor residual, double scale) {
  const Pattern pattern = pattern_of(tensors, layout);
  int64_t tokens;
  Tensor x = beside(grad, pattern.rows, pattern.columns, residual, tokens);
  if (tokens == 0 || pattern.columns == 0) return x;
  with_kernels(kernels(), grad.scalar_type(), [&](const auto& typed, auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    using A = SumOf<T>;
    const auto io = io_of<T>(residual, x, values_of<A>(values, pattern), tokens, scale);
    const auto right = operand_of<T>(grad, pattern.rows);
    const Plan plan(kStrip, pattern.columns, tokens, sizeof(A));
    const int64_t turns = (tokens + plan.length - 1) / plan.length;
    const int64_t work = pattern.nnz * plan.length / kLanes / plan.blocks + 1;
    parallel(turns * plan.blocks, work, [&](int64_t b, int64_t e) {
      Scratch scratch;
      const Room<A> room = room_for<A>(plan.length, plan.width, 0, scratch);
      for (int64_t task = b; task < e; ++task) {
        const int64_t token = task / plan.blocks * plan.length;
        const int64_t column = task % plan.blocks * plan.width;
        const Block block{0, pattern.rows, column, std::min(column + plan.width, pattern.columns)};
        typed.matmul_t(pattern, block, right, io, token, std::min(token + plan.length, tokens),
                       room);
      }
    });
  });
  return x;
}

// Of a weight that is dense, or of four axes with the channels last.
Strides strides_of(const Tensor& weight, const Pattern& pattern) {
  STD_TORCH_CHECK(weight.is_cpu() && weight.numel() == pattern.rows * pattern.columns,
                  "weight must be on the CPU and have the pattern's shape");
  if (weight.is_contiguous()) return {pattern.columns, 0, pattern.columns, 1};
  STD_TORCH_CHECK(weight.dim() == 4 && weight.size(0) == pattern.rows,
                  "weight must be contiguous, or of four axes");
  const int64_t channels = weight.size(1), area = weight.size(2) * weight.size(3);
  const int64_t wanted[] = {channels * area, 1, weight.size(3) * channels, channels};
  const auto strides = weight.strides();
  for (int64_t d = 0; d < 4; ++d) {
    STD_TORCH_CHECK(weight.size(d) == 1 || strides[d] == wanted[d],
                    "weight must be contiguous, or have its channels last");
  }
  return {channels * area, 1, area, channels};
}

template <typename Function>
void for_rows(const Pattern& pattern, const Function& f) {
  if (pattern.nnz == 0) return;
  parallel(pattern.rows, 2 * (pattern.nnz / pattern.rows) + 1, f);
}

Tensor gather(const Tensor& weight, std::vector<Tensor> tensors, std::vector<int64_t> layout) {
  const Pattern pattern = pattern_of(tensors, layout);
  const Strides strides = strides_of(weight, pattern);
  Tensor values = empty({pattern.nnz}, sums_of(weight.scalar_type()));
  with_kernels(kernels(), weight.scalar_type(), [&](const auto& typed, auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const auto* from = static_cast<const T*>(weight.const_data_ptr());
    auto* to = static_cast<SumOf<T>*>(values.mutable_data_ptr());
    for_rows(pattern, [&](int64_t begin, int64_t end) {
      typed.gather(pattern, from, strides, begin, end, to);
    });
  });
  return values;
}

void scatter(Tensor weight, const Tensor& values, std::vector<Tensor> tensors,
             std::vector<int64_t> layout) {
  const Pattern pattern = pattern_of(tensors, layout);
  const Strides strides = strides_of(weight, pattern);
  with_kernels(kernels(), weight.scalar_type(), [&](const auto& typed, auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const auto* from = values_of<SumOf<T>>(values, pattern);
    auto* to = static_cast<T*>(weight.mutable_data_ptr());
    for_rows(pattern, [&](int64_t begin, int64_t end) {
      typed.scatter(pattern, to, strides, begin, end, from);
    });
  });
}

}  // namespace

PEFTKERN_OPS(CPU, m) {
  m.impl("sparse_matmul", TORCH_BOX(&matmul));
  m.impl("sparse_matmul_t", TORCH_BOX(&matmul_t));
  m.impl("sparse_gather", TORCH_BOX(&gather));
  m.impl("sparse_scatter_", TORCH_BOX(&scatter));
}

}  // namespace peftkern::sparse
