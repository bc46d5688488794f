// Small products of matrices, by our own kernels; part of the binding.
#pragma once
#include <type_traits>

#include "common/binding.h"
#include "common/kernels.h"

namespace peftkern {

// Calls f(kernels, typed null pointer) of the sums' dtype.
template <typename Function>
void with_sums(ScalarType sums, const Function& f) {
  const SharedKernels& kernels = shared_kernels();
  if (sums == ScalarType::Double) return f(kernels.sums_f64, static_cast<double*>(nullptr));
  f(kernels.sums_f32, static_cast<float*>(nullptr));
}

// out = scale * x p, or on top of it. All of the sums' dtype; x may be transposed.
inline void product(const Matrix& out, const Matrix& x, const Matrix& p, double scale, bool add) {
  with_sums(out.dtype, [&](const auto& typed, auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    typed.product({static_cast<const T*>(x.at(0, 0)), x.row_stride, x.column_stride,
                   static_cast<const T*>(p.at(0, 0)), p.row_stride, static_cast<T*>(out.at(0, 0)),
                   out.row_stride, x.rows, x.columns, p.columns, static_cast<T>(scale), add});
  });
}

// out = x a^T, all of the sums' dtype.
inline void dots(const Matrix& out, const Matrix& x, const Matrix& a) {
  with_sums(out.dtype, [&](const auto& typed, auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    typed.dots({static_cast<const T*>(x.at(0, 0)), x.row_stride, static_cast<const T*>(a.at(0, 0)),
                static_cast<T*>(out.at(0, 0)), out.row_stride, x.rows, a.rows, x.columns});
  });
}

}  // namespace peftkern
