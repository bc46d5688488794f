// qlora's kernels without torch: values that a reader can check, and every split the same bits.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "common/testing.h"
#include "qlora/test_few_rows.h"

using namespace peftkern;
using namespace peftkern::qlora;

namespace {

void a_block_of_codebook_values_comes_back() {
  std::vector<float> w(kCodebook, kCodebook + 16);
  const Nibbles q(w, 1, 16, 16);
  EXPECT(q.absmax == std::vector<float>{8});
  const std::vector<uint8_t> in_order{0x01, 0x23, 0x45, 0x67, 0x89, 0xab, 0xcd, 0xef};
  EXPECT(q.packed == in_order);
  for (float& x : w) x *= 8;  // the codebook here is eight times that of a real format
  EXPECT(dense(q.weight) == w);
}

void a_tie_takes_the_lower_code() {
  std::vector<float> w = midpoints();
  w.push_back(1);
  const Nibbles q(w, 1, 16, 16);
  const std::vector<uint8_t> codes{0x01, 0x23, 0x45, 0x67, 0x89, 0xab, 0xcd, 0xef};
  EXPECT(q.packed == codes);
}

void each_rank_has_the_code_that_it_was_given() {
  const uint8_t codes[16] = {11, 10, 13, 12, 15, 14, 9, 8, 0, 1, 6, 7, 4, 5, 2, 3};
  std::vector<float> w = midpoints();
  w.push_back(1);
  const Nibbles q(w, 1, 16, 16, codes);
  const std::vector<uint8_t> packed{0xba, 0xdc, 0xfe, 0x98, 0x01, 0x67, 0x45, 0x23};
  EXPECT(q.packed == packed);
}

void bytes_round_ties_to_the_even_code() {
  const Bytes q({127, .5f, 1.5f, 2.5f, -.5f, -1.5f, -127, 126.5f}, 1, 8);
  const std::vector<uint8_t> codes{127, 0, 2, 2, 0, 254, 129, 126};
  EXPECT(q.packed == codes && q.absmax[0] == 127);
  const Bytes none({0, -0.0f, 1e-36f, NAN, 1, 1, INFINITY, 1, 1}, 3, 3);
  EXPECT(none.absmax[0] == 1e-36f && std::isnan(none.absmax[1]) && std::isinf(none.absmax[2]));
  EXPECT(none.packed[0] == 0 && none.packed[2] == 127 && none.packed[3] == 0);
  EXPECT(none.packed[6] == 0 && none.packed[7] == 0);
  for (float tiny : {0.0f, -0.0f, 1e-39f}) {
    const Bytes zero(std::vector<float>(20, tiny), 1, 20);
    EXPECT(zero.absmax[0] == 0 && zero.packed == std::vector<uint8_t>(20, 0));
  }
}

void an_odd_count_ends_with_the_code_of_zero() {
  const Nibbles q({0, 1, 1}, 1, 3, 16);
  const std::vector<uint8_t> codes{0x7f, 0xf7};
  EXPECT(q.packed == codes);
}

void blocks_without_a_finite_reciprocal_are_zeros() {
  for (float tiny : {0.0f, -0.0f, 1e-39f}) {
    const Nibbles q(std::vector<float>(16, tiny), 1, 16, 16);
    EXPECT(q.absmax[0] == 0 && q.packed == std::vector<uint8_t>(8, 0x77));
  }
}

void a_nan_spoils_its_own_block_alone() {
  std::vector<float> w(48, 1.0f);
  w[20] = std::numeric_limits<float>::quiet_NaN();
  const Nibbles q(w, 1, 48, 16);
  EXPECT(q.absmax[0] == 1 && std::isnan(q.absmax[1]) && q.absmax[2] == 1);
}

void rows_may_be_split_to_quantize_bytes() {
  const std::vector<float> w = numbers(19 * 37);
  const Bytes whole(w, 19, 37), parts(w, 19, 37, 5);
  EXPECT(whole.packed == parts.packed && whole.absmax == parts.absmax);
  const std::vector<float> values = dense(whole.weight);
  for (int64_t i = 0; i < 19 * 37; ++i) {
    const float scale = whole.absmax[static_cast<size_t>(i / 37)] / 127;
    EXPECT(values[i] == static_cast<float>(static_cast<int8_t>(whole.packed[i])) * scale);
    EXPECT(std::fabs(values[i] - w[i]) <= 0.5001f * scale);
  }
}

void any_range_dequantizes_alike(const Stored& q) {
  const std::vector<float> whole = dense(q.weight);
  for (int64_t begin : {0, 1, 7, 16, 31, 33, 100}) {
    for (int64_t end : {begin, begin + 1, begin + 15, begin + 64, int64_t{7 * 37}}) {
      std::vector<float> part(static_cast<size_t>(end - begin));
      kernels().f32.dequantize(q.weight, begin, end, false, part.data());
      EXPECT(std::equal(part.begin(), part.end(), whole.begin() + begin));
    }
  }
}

void bf16_is_the_float_rounded(Stored& q) {
  const float scales[] = {3e38f, INFINITY, NAN, 1e-39f, -0.0f};
  for (size_t i = 0; i < 5; ++i) q.absmax[i] = scales[i];
  const std::vector<float> values = dense(q.weight);
  std::vector<peftkern::bf16> whole(values.size()), rounded(values.size());
  kernels().bf16.dequantize(q.weight, 0, 7 * 96, false, whole.data());
  shared_kernels().bf16.from_float(values.data(), 7 * 96, rounded.data());
  EXPECT(std::memcmp(whole.data(), rounded.data(), 2 * whole.size()) == 0);
  for (int64_t begin : {1, 16, 33, 95}) {
    std::vector<peftkern::bf16> part(static_cast<size_t>(200));
    kernels().bf16.dequantize(q.weight, begin, begin + 200, false, part.data());
    EXPECT(std::memcmp(part.data(), whole.data() + begin, 400) == 0);
  }
}

void any_weight_in_bf16_is_the_float_rounded() {
  Nibbles nibbles(numbers(7 * 96), 7, 96, 32);
  bf16_is_the_float_rounded(nibbles);
  Bytes bytes(numbers(7 * 96), 7, 96);
  bf16_is_the_float_rounded(bytes);
}

void any_range_of_any_weight_dequantizes_alike() {
  any_range_dequantizes_alike(Nibbles(numbers(7 * 37), 7, 37, 32));
  any_range_dequantizes_alike(Bytes(numbers(7 * 37), 7, 37));
}

void nested_scales_are_a_product_and_a_sum() {
  const Nibbles q(std::vector<float>(32, 1.0f), 1, 32, 16);
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

}  // namespace

int main() {
  for (int isa = 0; isa <= static_cast<int>(best_isa()); ++isa) {
    current_isa() = static_cast<Isa>(isa);
    std::printf("%s\n", kIsaNames[isa]);
    RUN(a_block_of_codebook_values_comes_back);
    RUN(a_tie_takes_the_lower_code);
    RUN(each_rank_has_the_code_that_it_was_given);
    RUN(bytes_round_ties_to_the_even_code);
    RUN(an_odd_count_ends_with_the_code_of_zero);
    RUN(blocks_without_a_finite_reciprocal_are_zeros);
    RUN(a_nan_spoils_its_own_block_alone);
    RUN(rows_may_be_split_to_quantize_bytes);
    RUN(any_range_of_any_weight_dequantizes_alike);
    RUN(any_weight_in_bf16_is_the_float_rounded);
    RUN(nested_scales_are_a_product_and_a_sum);
    RUN(few_rows_are_the_product_with_nibbles_and_bytes);
    RUN(tiles_are_the_product_with_nibbles_and_bytes);
    RUN(bf16_rows_are_the_product_with_the_weight_in_bf16);
  }
}
