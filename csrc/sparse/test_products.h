// Products, gather and scatter without torch: values that a reader can check, and every split the
// same bits.
#pragma once
#include "common/testing.h"
#include "sparse/sparse.h"

namespace peftkern::sparse {
namespace {

// Entries (0, 1), (1, 0) and (1, 2) of a matrix of 2 x 3, in both formats.
const int32_t row_start[] = {0, 1, 3};
const uint16_t columns[] = {1, 0, 2};
const uint32_t bits[] = {2, 5};
const int32_t prefix[] = {0, 1};
const Pattern csr{false, 2, 3, 3, columns, row_start, false};
const Pattern bitmap{true, 2, 3, 3, bits, prefix, false};

struct Memory {
  std::vector<float> panel, strip;
  std::vector<uint32_t> places, listed;
  std::vector<uint16_t> list;
  Room<float> room;

  Memory(int64_t length, int64_t width)
      : panel(static_cast<size_t>(length * width)),
        strip(static_cast<size_t>(length * kStrip)),
        places(static_cast<size_t>(width + kLanes)),
        listed(kListedRows + 1),
        list(static_cast<size_t>(2 * width + kLanes)),
        room{length,      panel.data(),  strip.data(), places.data(),
             list.data(), listed.data(), 2 * width} {}
};

void the_gradient_of_a_small_layer_is_right() {
  const std::vector<float> x{1, 2, 3, 4, 5, 6}, grad{1, -1, 2, .5f};
  for (const Pattern& pattern : {csr, bitmap}) {
    Memory memory(16, kTile);
    std::vector<float> values(3, 100);
    kernels().f32.sddmm(pattern, {0, 2, 0, 3}, {x.data(), 3, 1}, {grad.data(), 2, 1},
                        {2, 1, false, values.data()}, memory.room);
    EXPECT((values == std::vector<float>{12, 1, 0}));
    kernels().f32.sddmm(pattern, {0, 2, 0, 3}, {x.data(), 3, 1}, {grad.data(), 2, 1},
                        {2, 2, true, values.data()}, memory.room);
    EXPECT((values == std::vector<float>{36, 3, 0}));
    kernels().f32.sddmm(pattern, {0, 2, 0, 3}, {x.data(), 3, 1}, {grad.data(), 2, 1},
                        {0, 1, false, values.data()}, memory.room);
    EXPECT((values == std::vector<float>{0, 0, 0}));
  }
}

void any_range_gives_the_same_bits() {
  constexpr int64_t kRows = 37, kColumns = 300, kTokens = 70;
  std::vector<int32_t> starts{0};
  std::vector<uint16_t> entries;
  for (int64_t row = 0; row < kRows; ++row) {
    for (int64_t c = row % 3; c < kColumns; c += 1 + row % 11) {
      entries.push_back(static_cast<uint16_t>(c));
    }
    starts.push_back(static_cast<int32_t>(entries.size()));
  }
  const int64_t nnz = starts.back();
  const Pattern pattern{false, kRows, kColumns, nnz, entries.data(), starts.data(), false};
  EXPECT(kernels().holds(pattern, 0, kRows));
  const std::vector<float> x = numbers(kTokens * kColumns), grad = numbers(kTokens * kRows, 2);
  const auto run = [&](const std::vector<Block>& blocks) {
    Memory memory(32, 3 * kTile);
    std::vector<float> values(static_cast<size_t>(nnz));
    for (const Block& block : blocks) {
      kernels().f32.sddmm(pattern, block, {x.data(), kColumns, 1}, {grad.data(), kRows, 1},
                          {kTokens, 1, false, values.data()}, memory.room);
    }
    return values;
  };
  const std::vector<float> whole = run({{0, kRows, 0, kColumns}});
  EXPECT(whole == run({{0, 5, 0, kColumns}, {5, kRows, 0, kColumns}}));
  EXPECT(
      whole ==
      run({{0, kRows, 128, 256}, {0, 20, 0, 128}, {20, kRows, 0, 128}, {0, kRows, 256, kColumns}}));
}

void values_go_and_come_back() {
  std::vector<float> weight{1, 2, 3, 4, 5, 6};
  for (const Pattern& pattern : {csr, bitmap}) {
    std::vector<float> values(3);
    kernels().f32.gather(pattern, weight.data(), {3, 0, 3, 1}, 0, 2, values.data());
    EXPECT((values == std::vector<float>{2, 4, 6}));
    std::vector<float> zero(6);
    kernels().f32.scatter(pattern, zero.data(), {3, 0, 3, 1}, 0, 2, values.data());
    EXPECT((zero == std::vector<float>{0, 2, 0, 4, 0, 6}));
  }
}

void what_points_outside_does_not_hold() {
  EXPECT(kernels().holds(csr, 0, 2) && kernels().holds(bitmap, 0, 2));
  const uint16_t outside[] = {1, 0, 3}, falling[] = {1, 2, 0};
  for (const uint16_t* wrong : {outside, falling}) {
    EXPECT(!kernels().holds({false, 2, 3, 3, wrong, row_start, false}, 0, 2));
  }
  const int32_t beyond[] = {0, 1, 4}, back[] = {0, 2, 1}, late[] = {1, 1, 3};
  for (const int32_t* wrong : {beyond, back, late}) {
    EXPECT(!kernels().holds({false, 2, 3, 3, columns, wrong, false}, 0, 2));
  }
  const uint32_t tail[] = {2, 13}, fewer[] = {2, 1};
  for (const uint32_t* wrong : {tail, fewer}) {
    EXPECT(!kernels().holds({true, 2, 3, 3, wrong, prefix, false}, 0, 2));
  }
  const int32_t shifted[] = {0, 2};
  EXPECT(!kernels().holds({true, 2, 3, 3, bits, shifted, false}, 0, 2));
}

}  // namespace
}  // namespace peftkern::sparse
