// Tests of the products straight from the packed codes; part of test.cpp.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "common/kernels.h"
#include "common/testing.h"
#include "qlora/test_weights.h"

namespace peftkern::qlora {

using FewKernel = void (*)(const Weight&, const FewRows&, int64_t, int64_t);

// `inputs` rows of x, of columns of T, times W^T, a piece of W at a time.
template <typename T>
std::vector<float> few(const FewRowsKernels& by, FewKernel kernel, const Weight& weight,
                       const std::vector<T>& x, int64_t inputs, int64_t pieces) {
  std::vector<T> laid(static_cast<size_t>(by.laid_out(inputs, weight.columns)));
  for (int64_t m = 0; m < inputs; ++m) by.lay_out(weight, x.data(), inputs, m, laid.data());
  std::vector<float> y(static_cast<size_t>(inputs * weight.rows), NAN);
  const FewRows io{laid.data(), nullptr, nullptr, nullptr, y.data(), inputs, 0};
  for (int64_t i = 0; i < pieces; ++i) {
    kernel(weight, io, weight.rows * i / pieces, weight.rows * (i + 1) / pieces);
  }
  return y;
}

// x as the kernels take it is `stored`; x and `w` are the numbers that it and the weight stand for.
template <typename T>
void is_the_product(const FewRowsKernels& by, FewKernel kernel, const Weight& weight,
                    const std::vector<T>& stored, const std::vector<float>& x,
                    const std::vector<float>& w, int64_t inputs, double tolerance) {
  const int64_t rows = weight.rows, columns = weight.columns;
  const std::vector<float> y = few(by, kernel, weight, stored, inputs, 1);
  for (int64_t m = 0; m < inputs; ++m) {
    for (int64_t n = 0; n < rows; ++n) {
      double sum = 0, size = 0;
      for (int64_t k = 0; k < columns; ++k) {
        sum += double{x[m * columns + k]} * w[n * columns + k];
        size += std::fabs(double{x[m * columns + k]} * w[n * columns + k]);
      }
      EXPECT(std::fabs(y[m * rows + n] - sum) <= tolerance * size);
    }
  }
  EXPECT(few(by, kernel, weight, stored, inputs, 3) == y);
  EXPECT(few(by, kernel, weight, stored, inputs, 19) == y);
  // Nor does a row of x depend on those beside it.
  const int64_t cut = inputs / 2;
  if (cut == 0) return;
  std::vector<float> parts = few(by, kernel, weight, stored, cut, 1);
  const std::vector<T> others(stored.begin() + cut * columns, stored.end());
  const std::vector<float> rest = few(by, kernel, weight, others, inputs - cut, 1);
  parts.insert(parts.end(), rest.begin(), rest.end());
  EXPECT(parts == y);
}

inline void is_the_product_in_float(FewKernel kernel, const Stored& q, int64_t inputs) {
  const std::vector<float> x = numbers(inputs * q.weight.columns, 2);
  is_the_product(kernels().rows_f32, kernel, q.weight, x, x, dense(q.weight), inputs, 1e-6);
}

inline void is_the_product_with_nibbles_and_bytes(FewKernel kernel, int64_t inputs) {
  const int64_t rows = 19;
  for (int64_t block : {16, 32, 64, 128, 256, 512}) {
    const Nibbles q(numbers(rows * block * 3), rows, block * 3, block);
    if (kernels().rows_f32.most(q.weight)) is_the_product_in_float(kernel, q, inputs);
  }
  for (int64_t columns : {1, 7, 64, 65, 127, 128, 129, 300, 1500}) {
    const Bytes q(numbers(rows * columns), rows, columns);
    EXPECT(kernels().rows_f32.most(q.weight));
    is_the_product_in_float(kernel, q, inputs);
  }
}

inline void few_rows_are_the_product_with_nibbles_and_bytes() {
  for (int64_t inputs : {1, 2, 7}) {
    is_the_product_with_nibbles_and_bytes(kernels().rows_f32.few_rows, inputs);
  }
}

inline void tiles_are_the_product_with_nibbles_and_bytes() {
  for (int64_t inputs : {1, 6, 70}) {
    is_the_product_with_nibbles_and_bytes(kernels().rows_f32.tiles, inputs);
  }
}

inline std::vector<float> floats(const std::vector<peftkern::bf16>& from) {
  std::vector<float> to(from.size());
  shared_kernels().bf16.to_float(from.data(), static_cast<int64_t>(from.size()), to.data());
  return to;
}

// Nor on the turn that it passes in: 64 rows at a time.
inline void bf16_rows_are_the_product_with_the_weight_in_bf16() {
  const FewRowsKernels& by = kernels().rows_bf16;
  if (!by.most) return;  // without a matrix unit
  const int64_t rows = 67;
  for (int64_t block : {32, 64, 128, 256, 512}) {
    for (int64_t columns : {block, 3 * block}) {
      const Nibbles q(numbers(rows * columns), rows, columns, block);
      EXPECT((by.most(q.weight) > 0) == (block >= 64));
      if (!by.most(q.weight)) continue;
      std::vector<peftkern::bf16> w(static_cast<size_t>(rows * columns));
      kernels().bf16.dequantize(q.weight, 0, rows * columns, false, w.data());
      for (int64_t inputs : {1, 2, 16, 17, 33, 64, 65, 130}) {
        const std::vector<float> numbers_of_x = numbers(inputs * columns, 2);
        std::vector<peftkern::bf16> x(numbers_of_x.size());
        shared_kernels().bf16.from_float(numbers_of_x.data(), inputs * columns, x.data());
        is_the_product(by, by.tiles, q.weight, x, floats(x), floats(w), inputs, 2e-6);
      }
    }
  }
  const Bytes bytes(numbers(128), 1, 128);
  EXPECT(!by.most(bytes.weight));
}

}  // namespace peftkern::qlora
