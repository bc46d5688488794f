// qlora's kernels without torch: values that a reader can check, and every split the same bits.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "common/testing.h"
#include "qlora/qlora.h"

using namespace peftkern;
using namespace peftkern::qlora;

namespace {

constexpr float kCodebook[16] = {-8, -7, -6, -5, -4, -3, -2, 0, 1, 2, 3, 4, 5, 6, 7, 8};

std::vector<float> midpoints() {
  std::vector<float> out(15);
  for (int i = 0; i < 15; ++i) out[i] = (kCodebook[i] + kCodebook[i + 1]) / 2 / 8;
  return out;
}

// Numbers without a pattern, the same on every machine.
std::vector<float> numbers(int64_t count, uint32_t state = 1) {
  std::vector<float> out(static_cast<size_t>(count));
  for (float& x : out) {
    state = state * 1664525u + 1013904223u;
    x = static_cast<float>(static_cast<int32_t>(state)) / 2147483648.0f;
  }
  return out;
}

struct Quantized {
  std::vector<uint8_t> packed;
  std::vector<float> absmax;
  Weight weight;

  Quantized(const std::vector<float>& w, int64_t rows, int64_t columns, int64_t block)
      : packed((w.size() + 1) / 2), absmax((w.size() + block - 1) / block), weight{} {
    const int64_t count = rows * columns;
    kernels().f32.quantize(w.data(), count, midpoints().data(), block, 0,
                           static_cast<int64_t>(absmax.size()), packed.data(), absmax.data());
    weight.packed = packed.data();
    weight.absmax = absmax.data();
    weight.codebook = kCodebook;
    weight.rows = rows;
    weight.columns = columns;
    weight.block = block;
  }
};

std::vector<float> dense(const Weight& w) {
  std::vector<float> out(static_cast<size_t>(w.rows * w.columns));
  kernels().f32.dequantize(w, 0, w.rows * w.columns, false, out.data());
  return out;
}

void a_block_of_codebook_values_comes_back() {
  std::vector<float> w(kCodebook, kCodebook + 16);
  const Quantized q(w, 1, 16, 16);
  EXPECT(q.absmax == std::vector<float>{8});
  const std::vector<uint8_t> in_order{0x01, 0x23, 0x45, 0x67, 0x89, 0xab, 0xcd, 0xef};
  EXPECT(q.packed == in_order);
  for (float& x : w) x *= 8;  // the codebook here is eight times that of a real format
  EXPECT(dense(q.weight) == w);
}

void a_tie_takes_the_lower_code() {
  std::vector<float> w = midpoints();
  w.push_back(1);
  const Quantized q(w, 1, 16, 16);
  const std::vector<uint8_t> codes{0x01, 0x23, 0x45, 0x67, 0x89, 0xab, 0xcd, 0xef};
  EXPECT(q.packed == codes);
}

void an_odd_count_ends_with_the_code_of_zero() {
  const Quantized q({0, 1, 1}, 1, 3, 16);
  const std::vector<uint8_t> codes{0x7f, 0xf7};
  EXPECT(q.packed == codes);
}

void blocks_without_a_finite_reciprocal_are_zeros() {
  for (float tiny : {0.0f, -0.0f, 1e-39f}) {
    const Quantized q(std::vector<float>(16, tiny), 1, 16, 16);
    EXPECT(q.absmax[0] == 0 && q.packed == std::vector<uint8_t>(8, 0x77));
  }
}

void a_nan_spoils_its_own_block_alone() {
  std::vector<float> w(48, 1.0f);
  w[20] = std::numeric_limits<float>::quiet_NaN();
  const Quantized q(w, 1, 48, 16);
  EXPECT(q.absmax[0] == 1 && std::isnan(q.absmax[1]) && q.absmax[2] == 1);
}

void any_range_dequantizes_alike() {
  const Quantized q(numbers(7 * 37), 7, 37, 32);
  const std::vector<float> whole = dense(q.weight);
  for (int64_t begin : {0, 1, 7, 16, 31, 33, 100}) {
    for (int64_t end : {begin, begin + 1, begin + 15, begin + 64, int64_t{7 * 37}}) {
      std::vector<float> part(static_cast<size_t>(end - begin));
      kernels().f32.dequantize(q.weight, begin, end, false, part.data());
      EXPECT(std::equal(part.begin(), part.end(), whole.begin() + begin));
    }
  }
}

void bf16_is_the_float_rounded() {
  Quantized q(numbers(5 * 96), 5, 96, 32);
  const float scales[] = {3e38f, INFINITY, NAN, 1e-39f, -0.0f, 1e-45f};
  for (size_t i = 0; i < 6; ++i) q.absmax[i] = scales[i];
  const std::vector<float> values = dense(q.weight);
  std::vector<peftkern::bf16> whole(values.size()), rounded(values.size());
  kernels().bf16.dequantize(q.weight, 0, 5 * 96, false, whole.data());
  kernels().bf16.from_float(values.data(), 5 * 96, rounded.data());
  EXPECT(std::memcmp(whole.data(), rounded.data(), 2 * whole.size()) == 0);
  for (int64_t begin : {1, 16, 33, 95}) {
    std::vector<peftkern::bf16> part(static_cast<size_t>(200));
    kernels().bf16.dequantize(q.weight, begin, begin + 200, false, part.data());
    EXPECT(std::memcmp(part.data(), whole.data() + begin, 400) == 0);
  }
}

void nested_scales_are_a_product_and_a_sum() {
  const Quantized q(std::vector<float>(32, 1.0f), 1, 32, 16);
  std::vector<float> map(256, 0.0f);
  map[3] = 0.5f;
  map[9] = -0.25f;
  const uint8_t codes[2] = {3, 9};
  const float nested = 4, values[2] = {0.5f * 4 + 10, -0.25f * 4 + 10};
  Weight w = q.weight;
  w.absmax = nullptr;
  w.codes = codes;
  w.nested_absmax = &nested;
  w.map = map.data();
  w.offset = 10;
  const std::vector<float> out = dense(w);
  EXPECT(out[0] == 8 * values[0] && out[31] == 8 * values[1]);
}

using FewKernel = void (*)(const Weight&, const FewRows&, int64_t, int64_t);

std::vector<float> few(FewKernel kernel, const Quantized& q, const std::vector<float>& x,
                       int64_t inputs, int64_t pieces) {
  const int64_t columns = q.weight.columns, width = kernels().interleaved_width(columns);
  std::vector<float> laid(static_cast<size_t>(inputs * width));
  for (int64_t m = 0; m < inputs; m += kGroup) {
    kernels().interleave(x.data() + m * columns, std::min(kGroup, inputs - m), columns,
                         laid.data() + m * width);
  }
  std::vector<float> y(static_cast<size_t>(inputs * q.weight.rows), NAN);
  const FewRows io{laid.data(), nullptr, nullptr, nullptr, y.data(), inputs, 0};
  for (int64_t i = 0; i < pieces; ++i) {
    kernel(q.weight, io, q.weight.rows * i / pieces, q.weight.rows * (i + 1) / pieces);
  }
  return y;
}

void is_the_product_with_the_dense_weight(FewKernel kernel, int64_t inputs) {
  for (int64_t block : {16, 32, 64, 128, 256, 512}) {
    const int64_t rows = 19, columns = block * 3;
    const Quantized q(numbers(rows * columns), rows, columns, block);
    if (!kernels().serves_few_rows(q.weight)) continue;
    const std::vector<float> x = numbers(inputs * columns, 2), w = dense(q.weight);
    const std::vector<float> y = few(kernel, q, x, inputs, 1);
    for (int64_t m = 0; m < inputs; ++m) {
      for (int64_t n = 0; n < rows; ++n) {
        double sum = 0, size = 0;
        for (int64_t k = 0; k < columns; ++k) {
          sum += double{x[m * columns + k]} * w[n * columns + k];
          size += std::fabs(double{x[m * columns + k]} * w[n * columns + k]);
        }
        EXPECT(std::fabs(y[m * rows + n] - sum) <= 1e-6 * size);
      }
    }
    EXPECT(few(kernel, q, x, inputs, 3) == y);
    EXPECT(few(kernel, q, x, inputs, 19) == y);
    // Nor does a row of x depend on those beside it.
    const int64_t cut = inputs / 2;
    std::vector<float> parts = few(kernel, q, x, cut, 1);
    const std::vector<float> rest =
        few(kernel, q, {x.begin() + cut * columns, x.end()}, inputs - cut, 1);
    parts.insert(parts.end(), rest.begin(), rest.end());
    EXPECT(parts == y);
  }
}

void few_rows_are_the_product_with_the_dense_weight() {
  for (int64_t inputs : {1, 2, 7}) {
    is_the_product_with_the_dense_weight(kernels().few_rows, inputs);
  }
}

void tiles_are_the_product_with_the_dense_weight() {
  for (int64_t inputs : {1, 6, 39}) is_the_product_with_the_dense_weight(kernels().tiles, inputs);
}

void dropout_depends_on_the_place_alone() {
  const std::vector<float> x = numbers(301);
  std::vector<float> whole(x.size()), parts(x.size());
  const auto drop = kernels().f32.dropout;
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
    kernels().sums_f32.product({x.data(), depth, 1, p.data(), columns, out.data(), columns, rows,
                                depth, columns, 2.0f, true});
    std::vector<float> p_transposed(p.size());
    for (int64_t j = 0; j < depth; ++j) {
      for (int64_t c = 0; c < columns; ++c) p_transposed[c * depth + j] = p[j * columns + c];
    }
    kernels().sums_f32.dots(
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
  kernels().sums_f32.product(
      {ones.data(), depth, 1, tenths.data(), 1, &out, 1, 1, depth, 1, 1, false});
  EXPECT(std::fabs(out / (double{0.1f} * depth) - 1) < 2e-5);
}

void sixteen_bit_floats_round_to_nearest_even() {
  const float from[] = {1, 1.0f + 0x1p-8f, 1.0f + 0x3p-8f, INFINITY, -0.0f};
  peftkern::bf16 to[5];
  kernels().bf16.from_float(from, 5, to);
  const uint16_t bits[] = {0x3f80, 0x3f80, 0x3f82, 0x7f80, 0x8000};
  for (int i = 0; i < 5; ++i) EXPECT(to[i].bits == bits[i]);
  const float halves[] = {1, 65504, 65520, 0x1p-24f, 0x1p-25f, 1.0f + 0x1p-11f};
  peftkern::fp16 half[6];
  kernels().fp16.from_float(halves, 6, half);
  const uint16_t half_bits[] = {0x3c00, 0x7bff, 0x7c00, 0x0001, 0x0000, 0x3c00};
  for (int i = 0; i < 6; ++i) EXPECT(half[i].bits == half_bits[i]);
}

}  // namespace

int main() {
  for (int isa = 0; isa <= static_cast<int>(best_isa()); ++isa) {
    current_isa() = static_cast<Isa>(isa);
    std::printf("%s\n", kIsaNames[isa]);
    RUN(a_block_of_codebook_values_comes_back);
    RUN(a_tie_takes_the_lower_code);
    RUN(an_odd_count_ends_with_the_code_of_zero);
    RUN(blocks_without_a_finite_reciprocal_are_zeros);
    RUN(a_nan_spoils_its_own_block_alone);
    RUN(any_range_dequantizes_alike);
    RUN(bf16_is_the_float_rounded);
    RUN(nested_scales_are_a_product_and_a_sum);
    RUN(few_rows_are_the_product_with_the_dense_weight);
    RUN(tiles_are_the_product_with_the_dense_weight);
    RUN(dropout_depends_on_the_place_alone);
    RUN(product_and_dots_are_matrix_products);
    RUN(a_long_sum_is_a_sum_of_short_ones);
    RUN(sixteen_bit_floats_round_to_nearest_even);
  }
}
