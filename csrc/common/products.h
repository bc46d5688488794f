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

// a^T in memory of its own.
inline Matrix transposed_copy(const Matrix& a, Scratch& scratch) {
  void* memory = scratch.take_bytes(a.rows * a.columns * size_of(a.dtype));
  const Matrix to = Matrix::dense(memory, a.dtype, a.columns, a.rows);
  with_sums(a.dtype, [&](const auto&, auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    parallel(a.columns, 4 * a.rows, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        T* out = static_cast<T*>(to.at(row, 0));
        for (int64_t c = 0; c < a.rows; ++c) out[c] = *static_cast<const T*>(a.at(c, row));
      }
    });
  });
  return to;
}

// x a^T of many rows x, cut into ranges: to the same bits as one product of all rows.
class TimesTransposed {
 public:
  // `rows`: of x, whatever the ranges are.
  TimesTransposed(const Matrix& a, int64_t rows, Scratch& scratch)
      : few_(rows < kFewRows), a_(few_ ? a : transposed_copy(a, scratch)) {}

  // out = scale * x a^T, or on top of it.
  void into(const Matrix& out, const Matrix& x, double scale, bool add) const {
    if (!few_) return product(out, x, a_, scale, add);
    if (scale == 1 && !add) return dots(out, x, a_);
    Scratch scratch;
    void* memory = scratch.take_bytes(out.rows * out.columns * size_of(out.dtype));
    const Matrix sum = Matrix::dense(memory, out.dtype, out.rows, out.columns);
    dots(sum, x, a_);
    with_sums(out.dtype, [&](const auto&, auto* type) {
      using T = std::remove_pointer_t<decltype(type)>;
      for (int64_t row = 0; row < out.rows; ++row) {
        T* to = static_cast<T*>(out.at(row, 0));
        const T* from = static_cast<const T*>(sum.at(row, 0));
        for (int64_t c = 0; c < out.columns; ++c) {
          const T scaled = static_cast<T>(scale) * from[c];
          to[c] = add ? to[c] + scaled : scaled;
        }
      }
    });
  }

 private:
  bool few_;
  Matrix a_;
};

}  // namespace peftkern
