// What families share, by values that can be checked by eye, on every instruction set.
#include <cmath>
#include <vector>

#include "common/kernels.h"
#include "common/testing.h"

namespace peftkern {
namespace {

void dropout_depends_on_the_place_alone() {
  const std::vector<float> x = numbers(301);
  std::vector<float> whole(x.size()), parts(x.size());
  const auto drop = shared_kernels().f32.dropout;
  drop(x.data(), 301, 77, 1u << 30, 4.0 / 3, 1000, whole.data());
  for (int64_t i = 0; i < 301; i += 7) {
    drop(x.data() + i, 7, 77, 1u << 30, 4.0 / 3, 1000 + i, parts.data() + i);
  }
  EXPECT(whole == parts);
  int64_t kept = 0;
  for (float v : whole) kept += v != 0;
  EXPECT(kept > 190 && kept < 260);  // three quarters of 301
  drop(x.data(), 301, 77, uint64_t{1} << 32, 0, 0, whole.data());
  EXPECT(whole == std::vector<float>(301, 0.0f));
}

void product_and_dots_are_matrix_products() {
  const int64_t rows = 11, depth = 21;
  for (int64_t columns : {1, 8, 16, 17, 40, 70}) {
    const std::vector<float> x = numbers(rows * depth), p = numbers(depth * columns, 5);
    std::vector<float> out(static_cast<size_t>(rows * columns), 1.0f), transposed(out.size());
    shared_kernels().sums_f32.product({x.data(), depth, 1, p.data(), columns, out.data(), columns,
                                       rows, depth, columns, 2.0f, true});
    std::vector<float> p_transposed(p.size());
    for (int64_t j = 0; j < depth; ++j) {
      for (int64_t c = 0; c < columns; ++c) p_transposed[c * depth + j] = p[j * columns + c];
    }
    shared_kernels().sums_f32.dots(
        {x.data(), depth, p_transposed.data(), transposed.data(), columns, rows, columns, depth});
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t c = 0; c < columns; ++c) {
        double sum = 0;
        for (int64_t j = 0; j < depth; ++j) sum += double{x[i * depth + j]} * p[j * columns + c];
        EXPECT(std::fabs(out[i * columns + c] - (1 + 2 * sum)) < 1e-4);
        EXPECT(std::fabs(transposed[i * columns + c] - sum) < 1e-4);
      }
    }
  }
}

void a_long_sum_is_a_sum_of_short_ones() {
  const int64_t depth = 1 << 16;  // one running sum of as many tenths is off by a ten-thousandth
  const std::vector<float> tenths(depth, 0.1f), ones(depth, 1.0f);
  float out;
  shared_kernels().sums_f32.product(
      {ones.data(), depth, 1, tenths.data(), 1, &out, 1, 1, depth, 1, 1, false});
  EXPECT(std::fabs(out / (double{0.1f} * depth) - 1) < 2e-5);
}

void sixteen_bit_floats_round_to_nearest_even() {
  const float from[] = {1, 1.0f + 0x1p-8f, 1.0f + 0x3p-8f, INFINITY, -0.0f};
  bf16 to[5];
  shared_kernels().bf16.from_float(from, 5, to);
  const uint16_t bits[] = {0x3f80, 0x3f80, 0x3f82, 0x7f80, 0x8000};
  for (int i = 0; i < 5; ++i) EXPECT(to[i].bits == bits[i]);
  const float halves[] = {1, 65504, 65520, 0x1p-24f, 0x1p-25f, 1.0f + 0x1p-11f};
  fp16 half[6];
  shared_kernels().fp16.from_float(halves, 6, half);
  const uint16_t half_bits[] = {0x3c00, 0x7bff, 0x7c00, 0x0001, 0x0000, 0x3c00};
  for (int i = 0; i < 6; ++i) EXPECT(half[i].bits == half_bits[i]);
}

}  // namespace
}  // namespace peftkern

int main() {
  using namespace peftkern;
  for (int isa = 0; isa <= static_cast<int>(best_isa()); ++isa) {
    current_isa() = static_cast<Isa>(isa);
    std::printf("%s\n", kIsaNames[isa]);
    RUN(dropout_depends_on_the_place_alone);
    RUN(product_and_dots_are_matrix_products);
    RUN(a_long_sum_is_a_sum_of_short_ones);
    RUN(sixteen_bit_floats_round_to_nearest_even);
  }
}
