// One call of linear or of its gradient: the operands, checked; and the two passes as functions,
// for other families' ops as well; part of the binding.
#pragma once
#include "bottleneck/bottleneck.h"
#include "common/dropout.h"

namespace peftkern::bottleneck {

// Tensors as an op takes them; see peftkern/bottleneck/ops.py.
struct Options {
  const MaybeTensor &bias_down, &bias_up, &gate;
  double scale;
  int64_t activation;
  const MaybeTensor& residual;
  bool onto_x;
  const MaybeTensor &norm_weight, &norm_bias;
  std::optional<double> eps;
};

// A matrix without data is not there. Factors and parameters are of any float dtype.
struct Problem {
  Matrix x;                           // [rows, inputs]
  Matrix down, up;                    // [rank, inputs], [outputs, rank]
  Matrix bias_down{}, bias_up{};      // [1, rank], [1, outputs]
  Matrix residual{};                  // [rows, outputs], of x's dtype
  Matrix norm_weight{}, norm_bias{};  // [1, inputs]
  std::optional<double> eps{};        // none, no norm
  double scale = 1, gate = 1;         // the branch is multiplied by both
  Activation activation = Activation::relu;
  bool onto_x = false;  // x is the residual
  Dropout dropout{};

  ScalarType sums() const {
    return x.dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  }
};

// The matrix [rows of x, width of its last axis] of a tensor with any number of axes.
inline Matrix by_rows(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(tensor.dim() > 0, name, " must have at least one axis");
  check_dense(tensor, name);
  int64_t rows = 1;
  for (int64_t d = 0; d + 1 < tensor.dim(); ++d) rows *= tensor.size(d);
  return Matrix::of(tensor, rows, tensor.size(-1));
}

// `down` [rank, inputs] and `up` [outputs, rank] may lie in anybody's memory.
Problem problem_of(const Tensor& x, const Matrix& down, const Matrix& up, const Options& options,
                   const Dropout& dropout);

// hidden [rows, rank], in the sums' dtype; y [rows, outputs], in x's.
void forward(const Problem& problem, const Matrix& hidden, const Matrix& y);

// Where gradients go, of the shape of what they are the gradient of and in any float dtype; one
// without data is not asked for.
struct Gradients {
  Matrix x{}, down{}, up{}, bias_down{}, bias_up{}, gate{}, norm_weight{}, norm_bias{};
};
void backward(const Problem& problem, const Matrix& grad, const Matrix& hidden,
              const Gradients& gradients);

}  // namespace peftkern::bottleneck
