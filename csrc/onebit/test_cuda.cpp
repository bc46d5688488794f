// onebit's CUDA kernel in the emulator, where torch cannot lead it: every split of the columns, and
// data that lies anywhere. Numbers are small and whole, and levels of 2 and 4 bits are compared
// within roundings.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "common/testing.h"
#include "emulator/fragments.h"
#include "onebit/onebit_cuda.h"

using namespace peftkern;
using namespace peftkern::onebit;

namespace {

constexpr int64_t kBytesOfAStage = 64;
constexpr float kStatistics[2] = {0.25f, 2.0f};

// Numbers without a pattern, from 0 to below `end`.
struct Draw {
  uint32_t state = 1;
  int64_t operator()(uint32_t end) {
    state = state * 1664525u + 1013904223u;
    return (state >> 16) % end;
  }
};

// Canonical codes in rows of whole words. Where `offset` is not 0, they begin so many bytes late.
struct Stored {
  std::vector<uint8_t> memory;
  DeviceBits weight{};

  Stored(int64_t rows, int64_t columns, int64_t bits, size_t offset = 0)
      : memory(offset + static_cast<size_t>(laid_out_bytes(rows, columns, bits))) {
    weight = {memory.data() + offset, kStatistics, rows, columns, bits};
    Draw draw;
    for (int64_t n = 0; n < rows; ++n) {
      for (int64_t k = 0; k < columns; ++k) {
        memory[offset + byte(n, k)] |= static_cast<uint8_t>(draw(1u << bits) << k * bits % 8);
      }
    }
  }

  size_t byte(int64_t n, int64_t k) const {
    const int64_t row_bytes = 4 * words_of(weight.columns, weight.bits);
    return static_cast<size_t>(n * row_bytes + k * weight.bits / 8);
  }
  double at(int64_t n, int64_t k) const {
    const int code = weight.words[byte(n, k)] >> k * weight.bits % 8 & ((1 << weight.bits) - 1);
    return kStatistics[0] + kStatistics[1] * level(weight.bits, code);
  }
};

float from(float value, float) { return value; }
bf16 from(float value, bf16) { return {emulator::to_bf16(value)}; }
float to_float(float value) { return value; }
float to_float(bf16 value) { return emulator::from_bf16(value.bits); }

template <typename T>
std::vector<T> numbers(size_t count) {
  std::vector<T> x(count);
  Draw draw;
  for (T& value : x) value = from(static_cast<float>(draw(5)) - 2, T{});
  return x;
}

// Whether y is x W^T, whatever the splits; all of the workspace has to be written.
template <typename T>
void check(const Stored& stored, const T* x, int64_t inputs, int64_t splits) {
  const DeviceBits& weight = stored.weight;
  std::vector<T> y(static_cast<size_t>(inputs * weight.rows));
  std::vector<float> workspace(static_cast<size_t>(decode_workspace(weight, inputs, splits)),
                               std::numeric_limits<float>::quiet_NaN());
  FewRows<T> io{};
  io.x = x;
  io.y = y.data();
  io.inputs = inputs;
  io.splits = splits;
  EXPECT(decode_cuda(weight, io, workspace.data(), nullptr) == cudaSuccess);
  EXPECT(workspace.empty() == (splits == 1));
  for (float part : workspace) EXPECT(!std::isnan(part));
  const double rounding = sizeof(T) == 4 ? 0 : 0x1p-8;
  bool right = true;
  for (int64_t i = 0; i < inputs * weight.rows; ++i) {
    double sum = 0, size = 0;
    for (int64_t k = 0; k < weight.columns; ++k) {
      const double one = to_float(x[i / weight.rows * weight.columns + k]);
      sum += one * stored.at(i % weight.rows, k);
      size += std::abs(one * stored.at(i % weight.rows, k));
    }
    // The sum is rounded, and of 4 bits each level.
    const double rounded = std::abs(sum) + (weight.bits == 4 ? size : 0);
    right &=
        std::abs(to_float(y[static_cast<size_t>(i)]) - sum) <= rounding * rounded + 1e-6 * size;
  }
  EXPECT(right);
}

template <typename T>
void try_splits(int64_t inputs) {
  for (int64_t bits : {1, 2, 4}) {
    const int64_t stages = 4, columns = stages * kBytesOfAStage * 8 / bits - 128;
    const Stored stored(131, columns, bits);
    const std::vector<T> x = numbers<T>(static_cast<size_t>(inputs * columns));
    for (int64_t splits : {1, 3, 4}) check(stored, x.data(), inputs, splits);
  }
}

void every_split_gives_the_sum_of_floats() { try_splits<float>(5); }

void every_split_gives_the_sum_of_halves() {
  try_splits<bf16>(3);
  try_splits<bf16>(16);
}

void the_sum_is_the_same_wherever_its_numbers_lie() {
  const std::vector<bf16> x = numbers<bf16>(2 * 256 + 1);
  for (int64_t bits : {1, 2, 4}) {
    check(Stored(5, 256, bits), x.data(), 2, 1);
    check(Stored(5, 256, bits), x.data() + 1, 2, 1);
    check(Stored(5, 256, bits, 1), x.data(), 2, 1);
  }
}

DeviceBits of_shape(int64_t rows, int64_t columns, int64_t bits) {
  return {nullptr, nullptr, rows, columns, bits};
}

void columns_are_split_where_rows_leave_multiprocessors_idle() {
  EXPECT(decode_splits(of_shape(128, 16384, 1), 1, 2, 132) > 8);
  EXPECT(decode_splits(of_shape(4096, 4096, 1), 1, 2, 132) > 1);
  EXPECT(decode_splits(of_shape(128 * 2 * 132, 4096, 1), 1, 2, 132) == 1);
  // What the tests of the op take for split, on the emulator's four.
  for (int64_t bits : {1, 2, 4}) {
    EXPECT(decode_splits(of_shape(130, 8 * 512 / bits, bits), 4, 2, 4) > 1);
  }
}

void a_split_has_a_stage_at_least() {
  for (int64_t rows : {1, 128, 28672}) {
    for (int64_t columns : {0, 16, 128, 1024, 1100, 1 << 20}) {
      for (int64_t bits : {1, 2, 4}) {
        for (int64_t inputs : {1, 16}) {
          const DeviceBits weight = of_shape(rows, columns, bits);
          const int64_t splits = decode_splits(weight, inputs, 2, 132);
          const int64_t bytes = 4 * words_of(columns, bits);
          const int64_t stages = (bytes + kBytesOfAStage - 1) / kBytesOfAStage;
          EXPECT(splits >= 1 && splits <= std::max<int64_t>(stages, 1));
          EXPECT((bytes % 16 == 0 && columns % 8 == 0) || splits == 1);
          EXPECT(decode_workspace(weight, inputs, splits) ==
                 (splits > 1 ? splits * inputs * rows : 0));
        }
      }
    }
  }
}

}  // namespace

int main() {
  RUN(every_split_gives_the_sum_of_floats);
  RUN(every_split_gives_the_sum_of_halves);
  RUN(the_sum_is_the_same_wherever_its_numbers_lie);
  RUN(columns_are_split_where_rows_leave_multiprocessors_idle);
  RUN(a_split_has_a_stage_at_least);
}
