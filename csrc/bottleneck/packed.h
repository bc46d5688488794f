// Operands as the kernels want them: in the sums' dtype, the factors packed; part of the binding.
#pragma once
#include "bottleneck/problem.h"

namespace peftkern::bottleneck {

inline const PackKernels<float>& packing(float*) { return kernels().pack_f32; }
inline const PackKernels<double>& packing(double*) { return kernels().pack_f64; }

// In the sums' dtype, or null where it is not there.
template <typename Acc>
const Acc* vector_of(const Matrix& vector, ScalarType sums, Scratch& scratch) {
  if (!vector.data) return nullptr;
  return static_cast<const Acc*>(as_dtype(vector, sums, scratch).at(0, 0));
}

// `right` [depth, columns], which may be transposed, in panels of this width.
template <typename Acc>
const Acc* packed(const Matrix& right, int64_t width, ScalarType sums, Scratch& scratch) {
  const bool transposed = right.column_stride != 1;
  const Matrix lies = as_dtype(transposed ? right.transposed() : right, sums, scratch);
  Packing<Acc> io{
      static_cast<const Acc*>(lies.at(0, 0)), lies.row_stride, 1, right.rows, right.columns, width};
  if (transposed) std::swap(io.row, io.column);
  Acc* to = scratch.take<Acc>(packed_size(right.rows, right.columns, width));
  parallel(panels_of(right.columns, width), 4 * right.rows * width,
           [&](int64_t begin, int64_t end) {
             packing(static_cast<Acc*>(nullptr)).pack(io, begin, end, to);
           });
  return to;
}

template <typename Acc>
Norm<Acc> norm_of(const Problem& p, Scratch& scratch) {
  return {vector_of<Acc>(p.norm_weight, p.sums(), scratch),
          vector_of<Acc>(p.norm_bias, p.sums(), scratch), static_cast<Acc>(p.eps.value_or(0)),
          p.eps.has_value()};
}

inline Drop drop_of(const Dropout& dropout) {
  if (dropout.p == 0) return {};
  return {dropout.seed, dropout.threshold(), dropout.factor()};
}

}  // namespace peftkern::bottleneck
