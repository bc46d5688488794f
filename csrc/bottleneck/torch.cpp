// The binding of linear: y = residual + scale * (D(act(N(x) down^T + bias_down)) up^T + bias_up).
#include "bottleneck/packed.h"

namespace peftkern::bottleneck {
namespace {

Matrix row_of(const MaybeTensor& tensor, const char* name, int64_t count) {
  if (!tensor) return {};
  check_count(*tensor, name, count);
  return Matrix::of(*tensor, 1, count);
}

double value_of(const MaybeTensor& gate) {
  if (!gate) return 1;
  check_count(*gate, "gate", 1);
  double exact = 0;
  convert_row(gate->const_data_ptr(), gate->scalar_type(), &exact, ScalarType::Double, 1);
  return exact;
}

}  // namespace

Problem problem_of(const Tensor& x, const Matrix& down, const Matrix& up, const Options& options,
                   const Dropout& dropout) {
  Problem p{by_rows(x, "x"), down, up};
  const int64_t inputs = p.x.columns, rank = down.rows, outputs = up.rows;
  size_of(p.x.dtype);
  STD_TORCH_CHECK(down.columns == inputs && up.columns == rank,
                  "down and up must fit x and each other");
  STD_TORCH_CHECK(options.activation >= 0 && options.activation < kActivations,
                  "activation must be one of those there are, got ", options.activation);
  STD_TORCH_CHECK(!options.onto_x || inputs == outputs,
                  "x must be as wide as y to be the residual");
  p.bias_down = row_of(options.bias_down, "bias_down", rank);
  p.bias_up = row_of(options.bias_up, "bias_up", outputs);
  p.norm_weight = row_of(options.norm_weight, "norm_weight", inputs);
  p.norm_bias = row_of(options.norm_bias, "norm_bias", inputs);
  p.eps = options.eps;
  if (options.residual) {
    check_count(*options.residual, "residual", p.x.rows * outputs);
    check_dtype(*options.residual, "residual", p.x.dtype);
    p.residual = Matrix::of(*options.residual, p.x.rows, outputs);
  }
  p.scale = options.scale;
  p.gate = value_of(options.gate);
  p.activation = static_cast<Activation>(options.activation);
  p.onto_x = options.onto_x;
  p.dropout = dropout;
  return p;
}

namespace {

template <typename T, typename Acc>
void run(const TypedKernels<T, Acc>& typed, const Problem& p, const Matrix& hidden,
         const Matrix& y) {
  Scratch scratch;
  const int64_t inputs = p.x.columns, rank = p.down.rows, outputs = p.up.rows;
  const Acc scale = static_cast<Acc>(p.scale * p.gate);
  Acc* bias_up = nullptr;
  if (p.bias_up.data) {
    const Acc* given = vector_of<Acc>(p.bias_up, p.sums(), scratch);
    bias_up = scratch.take<Acc>(outputs);
    for (int64_t i = 0; i < outputs; ++i) bias_up[i] = scale * given[i];
  }
  const Matrix& residual = p.onto_x ? p.x : p.residual;
  const bool few = p.x.rows < kFewRows;
  const auto factor = [&](const Matrix& lies, int64_t width) {
    if (few) return vector_of<Acc>(lies, p.sums(), scratch);
    return packed<Acc>(lies.transposed(), width, p.sums(), scratch);
  };
  const Forward<T, Acc> io{reinterpret_cast<const T*>(p.x.data),
                           factor(p.down, kNarrow),
                           factor(p.up, kWide),
                           vector_of<Acc>(p.bias_down, p.sums(), scratch),
                           bias_up,
                           reinterpret_cast<const T*>(residual.data),
                           reinterpret_cast<Acc*>(hidden.data),
                           reinterpret_cast<T*>(y.data),
                           inputs,
                           rank,
                           outputs,
                           scale,
                           p.activation,
                           norm_of<Acc>(p, scratch),
                           drop_of(p.dropout),
                           few};
  constexpr int64_t kRows = 8;  // a block of them goes through registers together
  parallel((p.x.rows + kRows - 1) / kRows, kRows * rank * (inputs + outputs),
           [&](int64_t begin, int64_t end) {
             Scratch piece;
             Acc* buffer = piece.take<Acc>(forward_buffer(inputs, rank, outputs, few));
             typed.forward(io, begin * kRows, std::min(end * kRows, p.x.rows), buffer);
           });
}

}  // namespace

void forward(const Problem& problem, const Matrix& hidden, const Matrix& y) {
  with_kernels(kernels(), problem.x.dtype,
               [&](const auto& typed, auto*) { run(typed, problem, hidden, y); });
}

std::tuple<Tensor, Tensor> linear(const Tensor& x, const Tensor& down, const Tensor& up,
                                  const MaybeTensor& bias_down, const MaybeTensor& bias_up,
                                  const MaybeTensor& gate, double scale, int64_t activation,
                                  const MaybeTensor& residual, bool onto_x,
                                  const MaybeTensor& norm_weight, const MaybeTensor& norm_bias,
                                  std::optional<double> eps, double dropout,
                                  const MaybeTensor& seed) {
  const Options options{bias_down, bias_up, gate,        scale,     activation,
                        residual,  onto_x,  norm_weight, norm_bias, eps};
  const Problem p =
      problem_of(x, by_rows(down, "down"), by_rows(up, "up"), options, Dropout(dropout, seed));
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  shape.back() = p.up.rows;
  Tensor y = empty(shape, x.scalar_type());
  Tensor hidden = empty({p.x.rows, p.down.rows}, p.sums());
  forward(p, Matrix::of(hidden, p.x.rows, p.down.rows), Matrix::of(y, p.x.rows, p.up.rows));
  return {y, hidden};
}

PEFTKERN_OPS(CPU, m) { m.impl("bottleneck_linear", TORCH_BOX(&linear)); }

}  // namespace peftkern::bottleneck
