// qlora's CUDA kernels in the emulator, where torch cannot lead them: every split of decode's
// columns, and data that lies anywhere. Numbers are small and whole and scales powers of two, so
// that sums are exact in any order.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "common/testing.h"
#include "emulator/fragments.h"
#include "qlora/qlora_cuda.h"

using namespace peftkern;
using namespace peftkern::qlora;

namespace {

constexpr float kCodebook[16] = {-8, -7, -6, -5, -4, -3, -2, 0, 1, 2, 3, 4, 5, 6, 7, 8};
constexpr int64_t kBlock = 64, kColumnsOfAStage = 256;

// Numbers without a pattern, from 0 to below `end`.
struct Draw {
  uint32_t state = 1;
  int64_t operator()(uint32_t end) {
    state = state * 1664525u + 1013904223u;
    return (state >> 16) % end;
  }
};

struct Stored {
  std::vector<uint8_t> packed;
  std::vector<float> absmax;
  DeviceWeight weight{};

  Stored(int64_t rows, int64_t columns) {
    Draw draw;
    packed.resize(static_cast<size_t>((rows * columns + 1) / 2));
    absmax.resize(static_cast<size_t>((rows * columns + kBlock - 1) / kBlock));
    for (uint8_t& byte : packed) byte = static_cast<uint8_t>(draw(256));
    for (float& scale : absmax) scale = static_cast<float>(1 << draw(3));
    weight.packed = packed.data();
    weight.absmax = absmax.data();
    weight.codebook = kCodebook;
    weight.rows = rows;
    weight.columns = columns;
    weight.block = kBlock;
    weight.bits = 4;
  }

  float at(int64_t i) const {
    const int byte = packed[static_cast<size_t>(i / 2)];
    return kCodebook[i % 2 ? byte & 15 : byte >> 4] * absmax[static_cast<size_t>(i / kBlock)];
  }
};

float from(float value, float) { return value; }
bf16 from(float value, bf16) { return {emulator::to_bf16(value)}; }
float to_float(float value) { return value; }
float to_float(bf16 value) { return emulator::from_bf16(value.bits); }

DeviceWeight of_shape(int64_t rows, int64_t columns) {
  DeviceWeight weight{};
  weight.rows = rows;
  weight.columns = columns;
  weight.block = kBlock;
  weight.bits = 4;
  return weight;
}

// y of x W^T in so many splits; all of the workspace has to be written.
template <typename T>
std::vector<T> decoded(const Stored& stored, const std::vector<T>& x, int64_t inputs,
                       int64_t splits) {
  const DeviceWeight& weight = stored.weight;
  std::vector<T> y(static_cast<size_t>(inputs * weight.rows));
  std::vector<float> workspace(static_cast<size_t>(decode_workspace(weight, inputs, splits)),
                               std::numeric_limits<float>::quiet_NaN());
  Decode<T> io{};
  io.x = x.data();
  io.y = y.data();
  io.inputs = inputs;
  io.splits = splits;
  EXPECT(decode_cuda(weight, io, workspace.data(), nullptr) == cudaSuccess);
  EXPECT(workspace.empty() == (splits == 1));
  for (float part : workspace) EXPECT(!std::isnan(part));
  return y;
}

template <typename T>
void try_splits(int64_t inputs) {
  const int64_t rows = 70, stages = 7, columns = stages * kColumnsOfAStage - 64;
  const Stored stored(rows, columns);
  std::vector<T> x(static_cast<size_t>(inputs * columns));
  Draw draw;
  for (T& value : x) value = from(static_cast<float>(draw(5)) - 2, T{});
  std::vector<T> wanted(static_cast<size_t>(inputs * rows));
  for (int64_t m = 0; m < inputs; ++m) {
    for (int64_t n = 0; n < rows; ++n) {
      float sum = 0;
      for (int64_t k = 0; k < columns; ++k) {
        sum += to_float(x[static_cast<size_t>(m * columns + k)]) * stored.at(n * columns + k);
      }
      wanted[static_cast<size_t>(m * rows + n)] = from(sum, T{});
    }
  }
  for (int64_t splits : {1, 2, 3, 5, 7}) {
    const std::vector<T> y = decoded(stored, x, inputs, splits);
    EXPECT(std::memcmp(y.data(), wanted.data(), y.size() * sizeof(T)) == 0);
  }
}

void every_split_gives_the_sum_of_floats() { try_splits<float>(5); }

void every_split_gives_the_sum_of_halves() {
  try_splits<bf16>(3);
  try_splits<bf16>(16);
}

void columns_are_split_where_rows_leave_multiprocessors_idle() {
  EXPECT(decode_splits(of_shape(64, 4096), 1, 132) > 8);
  EXPECT(decode_splits(of_shape(4096, 4096), 1, 132) > 1);
  EXPECT(decode_splits(of_shape(64 * 2 * 132, 4096), 1, 132) == 1);
  // What the tests of the op take for split, on the emulator's four.
  EXPECT(decode_splits(of_shape(1, 2048), 1, 4) > 1);
  EXPECT(decode_splits(of_shape(70, 2048), 4, 4) > 1);
}

void a_split_has_a_stage_at_least() {
  for (int64_t rows : {1, 64, 1000, 28672}) {
    for (int64_t columns : {0, 16, 32, 256, 288, 1100, 4096, 1 << 20}) {
      for (int64_t inputs : {1, 16}) {
        for (int64_t multiprocessors : {1, 20, 148}) {
          const DeviceWeight weight = of_shape(rows, columns);
          const int64_t splits = decode_splits(weight, inputs, multiprocessors);
          const int64_t stages = (columns + kColumnsOfAStage - 1) / kColumnsOfAStage;
          EXPECT(splits >= 1 && splits <= std::max<int64_t>(stages, 1));
          EXPECT(columns % 32 == 0 || splits == 1);
          EXPECT(decode_workspace(weight, inputs, splits) ==
                 (splits > 1 ? splits * inputs * rows : 0));
        }
      }
    }
  }
}

// Where `offset` is not 0, what is read and written begins an element or a byte late.
std::vector<float> dequantized(const Stored& stored, size_t offset) {
  std::vector<uint8_t> packed(offset);
  packed.insert(packed.end(), stored.packed.begin(), stored.packed.end());
  DeviceWeight weight = stored.weight;
  weight.packed = packed.data() + offset;
  std::vector<float> out(offset + static_cast<size_t>(weight.rows * weight.columns));
  EXPECT(dequantize_cuda(weight, out.data() + offset, nullptr) == cudaSuccess);
  out.erase(out.begin(), out.begin() + static_cast<std::ptrdiff_t>(offset));
  return out;
}

void values_are_the_same_wherever_they_lie() {
  const Stored stored(5, 2049);
  std::vector<float> wanted;
  for (int64_t i = 0; i < 5 * 2049; ++i) wanted.push_back(stored.at(i));
  EXPECT(dequantized(stored, 0) == wanted);
  EXPECT(dequantized(stored, 1) == wanted);
}

void codes_are_the_same_wherever_they_lie() {
  constexpr int64_t kCount = 3000;
  constexpr uint8_t kInOrder[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  float thresholds[15];
  for (int i = 0; i < 15; ++i) thresholds[i] = (kCodebook[i] + kCodebook[i + 1]) / 16;
  const auto quantized = [&](size_t offset) {
    Draw draw;
    std::vector<float> w(offset + kCount), absmax((kCount + kBlock - 1) / kBlock);
    for (size_t i = offset; i < w.size(); ++i) w[i] = static_cast<float>(draw(17)) - 8;
    std::vector<uint8_t> packed(offset + kCount / 2);
    EXPECT(quantize_cuda(w.data() + offset, kCount, thresholds, kInOrder, kBlock,
                         packed.data() + offset, absmax.data(), nullptr) == cudaSuccess);
    packed.erase(packed.begin(), packed.begin() + static_cast<std::ptrdiff_t>(offset));
    return packed;
  };
  EXPECT(quantized(1) == quantized(0));
}

}  // namespace

int main() {
  RUN(every_split_gives_the_sum_of_floats);
  RUN(every_split_gives_the_sum_of_halves);
  RUN(columns_are_split_where_rows_leave_multiprocessors_idle);
  RUN(a_split_has_a_stage_at_least);
  RUN(values_are_the_same_wherever_they_lie);
  RUN(codes_are_the_same_wherever_they_lie);
}
