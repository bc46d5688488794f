// The backward pass, of one problem or of several that read the same x; part of the binding.
#pragma once
#include "qlora/problem.h"

namespace peftkern::qlora {

// What a problem adds up, in the sums' dtype; a null pointer is a gradient nobody asked for.
struct Sums {
  Matrix t{}, bias{}, a{}, b{}, weight{};

  static Matrix zeros(int64_t rows, int64_t columns, ScalarType dtype, Scratch& scratch) {
    void* memory = scratch.take_bytes(rows * columns * size_of(dtype));
    const Matrix sum = Matrix::dense(memory, dtype, rows, columns);
    clear(sum);
    return sum;
  }
};

// The tensors of the gradients that are asked for, in the order in which an op returns them.
class Gradients {
 public:
  Gradients(Scratch& scratch, std::vector<Tensor>& out) : scratch_(scratch), out_(out) {}

  Matrix of_x(const Tensor& grad, const Problem& p) {
    std::vector<int64_t> shape(grad.sizes().begin(), grad.sizes().end());
    shape.back() = p.base.columns;
    out_.push_back(empty(shape, p.x.dtype));
    return Matrix::of(out_.back(), p.x.rows, p.base.columns);
  }

  // A parameter's, zero. Where it has the sums' dtype, it is summed up in place.
  Matrix of(const Tensor& parameter, ScalarType sums, int64_t rows, int64_t columns) {
    out_.push_back(empty_as(parameter));
    const Matrix target = Matrix::of(out_.back(), rows, columns);
    if (target.dtype != sums) {
      rounded_.emplace_back(Sums::zeros(rows, columns, sums, scratch_), target);
      return rounded_.back().first;
    }
    clear(target);
    return target;
  }

  void round() const {
    for (const auto& [sum, target] : rounded_) convert(sum, target);
  }

 private:
  Scratch& scratch_;
  std::vector<Tensor>& out_;
  std::vector<std::pair<Matrix, Matrix>> rounded_;
};

struct Backward {
  const Problem& p;
  Matrix grad, down;
  Sums sums;
};
// Adds up the sums, and writes grad_x, the sum of what each problem gives, unless its pointer is
// null. Several problems must be of one expert and one adapter each.
void backward(const std::vector<Backward>& problems, const Matrix& grad_x);

}  // namespace peftkern::qlora
