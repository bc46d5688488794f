// Selection's kernels without torch.
#pragma once
#include <vector>

#include "common/testing.h"
#include "sparse/select.h"

namespace peftkern::sparse {

// Without a pattern, but for three of one magnitude, a NaN and an infinity.
inline std::vector<float> scores_of(int64_t rows, int64_t columns) {
  std::vector<float> scores = numbers(rows * columns);
  scores[1] = scores[5] = 0.25f;
  scores[2] = -0.25f;
  scores[7] = __builtin_nanf("");
  scores[8] = -__builtin_inff();
  return scores;
}

inline uint32_t key_of(float score) {
  uint32_t key;
  __builtin_memcpy(&key, &score, sizeof key);
  return key & 0x7FFFFFFFu;
}

inline bool bit(const std::vector<uint32_t>& bits, int64_t columns, int64_t i) {
  const int64_t column = i % columns, word = i / columns * words_of(columns) + column / kWord;
  return bits[static_cast<size_t>(word)] >> column % kWord & 1;
}

inline void every_number_is_counted_once_and_a_nan_never() {
  const std::vector<float> scores = scores_of(3, 37);
  for (bool largest : {false, true}) {
    std::vector<int64_t> whole(10), parts(10);
    const Bins bins{{false, largest}, 0x3C000000, 23, 8};
    const auto& run = select_kernels().f32.histogram;
    run(scores.data(), 111, bins, whole.data());
    run(scores.data(), 40, bins, parts.data());
    run(scores.data() + 40, 71, bins, parts.data());
    EXPECT(whole == parts);
    std::vector<int64_t> wanted(10);
    for (float score : scores) {
      uint64_t key = key_of(score);
      if (key > kInfinity) continue;
      if (largest) key = kInfinity - key;
      const bool below = key < bins.low;
      const uint64_t place = below ? 0 : (key - bins.low) >> 23;
      ++wanted[below ? 0 : place < 8 ? 1 + place : 9];
    }
    EXPECT(whole == wanted);
  }
}

inline void any_range_of_words_is_picked_alike_and_nothing_else_is_written() {
  constexpr int64_t kRows = 3, kColumns = 37, kWords = 6;
  const std::vector<float> scores = scores_of(kRows, kColumns);
  const Picking by{{false, false}, key_of(0.25f), key_of(0.25f) + 1, kColumns};
  std::vector<uint32_t> whole(kWords), parts(kWords + 2, 0xABCDABCD);
  const auto& run = select_kernels().f32.pick;
  const Picked found = run(scores.data(), by, 0, kWords, 2, nullptr, 0, whole.data());
  EXPECT(found.inside == 3);
  int64_t below = 0;
  for (int64_t w = 0; w < kWords; ++w) {
    below += run(scores.data(), by, w, w + 1, w ? 0 : 2, nullptr, 0, parts.data() + 1).below;
  }
  EXPECT(below == found.below);
  EXPECT(parts.front() == 0xABCDABCD && parts.back() == 0xABCDABCD);
  for (int64_t w = 0; w < kWords; ++w) EXPECT(whole[w] == parts[w + 1]);
  for (int64_t i = 0; i < kRows * kColumns; ++i) {
    const bool wanted = key_of(scores[i]) < by.low || i == 1 || i == 2;  // and not 5, the third
    EXPECT(bit(whole, kColumns, i) == wanted);
  }
}

inline void candidates_are_those_of_the_band() {
  const std::vector<float> scores = scores_of(3, 37);
  std::vector<Candidate> list(kBand);
  Candidates candidates{list.data(), 0};
  const Picking by{{false, false}, key_of(0.2f), key_of(0.3f), 37};
  std::vector<uint32_t> bits(6);
  select_kernels().f32.pick(scores.data(), by, 0, 6, 0, &candidates, 1000, bits.data());
  int64_t next = 0;
  for (int64_t i = 0; i < 111; ++i) {
    const uint64_t key = key_of(scores[i]);
    if (key < by.low || key >= by.high) continue;
    EXPECT(list[next].key == key && list[next].position == 1000 + i);
    ++next;
  }
  EXPECT(next == candidates.count && next > 2);
}

inline void bits_become_columns_and_what_they_keep() {
  const std::vector<uint32_t> bits{0x80000001u, 0, 0x6u, 0, 0x1u};
  int32_t counts[2];
  select_kernels().tile_counts(bits.data(), 5, counts);
  EXPECT(counts[0] == 4 && counts[1] == 1 && select_kernels().count(bits.data(), 5) == 5);
  const int32_t wanted[]{0, 31, 65, 66, 128};
  uint16_t narrow[5];
  int32_t wide[5];
  select_kernels().columns_u16(bits.data(), 5, narrow);
  select_kernels().columns_i32(bits.data(), 5, wide);
  std::vector<double> from(160), kept(6, -1);
  for (size_t i = 0; i < from.size(); ++i) from[i] = static_cast<double>(i);
  EXPECT(select_kernels().compact(from.data(), 8, bits.data(), 5, kept.data()) == 5);
  for (int i = 0; i < 5; ++i) {
    EXPECT(narrow[i] == wanted[i] && wide[i] == wanted[i] && kept[i] == wanted[i]);
  }
  EXPECT(kept[5] == -1);
}

}  // namespace peftkern::sparse
