// How decode lays its operands in shared memory, and which lane reads what of them.
//
// A block of threads takes kTileRows rows, and of their columns kTileColumns at a time, a stage.
// Two warps stand above each other, of kWarpRows rows each, and four side by side. A lane has, of
// each of its rows 8 r + group, r = 0 to 7, one 32-bit word of a stage, its member's of four; and
// of x the columns of that word. So that the lanes of a warp read those from as many banks, 16
// bytes of one member are followed by 16 bytes of the next.
#pragma once
#include "common/cuda_few_rows.h"
#include "onebit/onebit_cuda.h"

namespace peftkern::onebit {

inline constexpr int kDecodeTileRows = 128, kWarpRows = 64, kWordsOfAPart = 4;

template <typename T, int kBits, int kMost_>
struct Plan {
  static constexpr int kMost = kMost_, kTileRows = kDecodeTileRows;
  static constexpr int kWordColumns = 32 / kBits, kPartColumns = kWordsOfAPart * kWordColumns;
  static constexpr int kTileColumns = kParts * kPartColumns;
  static constexpr int kRowBytes = kParts * kWordsOfAPart * 4, kPitch = kRowBytes * 5 / 4;
  // As many as leave room for two blocks of threads on an H100.
  static constexpr int kStages = kBits == 1 && kMost == 16 ? 3 : 4;
  static constexpr int kSize = static_cast<int>(sizeof(T));
  static constexpr int kXPitch = kTileColumns * kSize + 64;
  static constexpr int kPieces = kWordColumns * kSize / 16;  // 16 bytes of x, of a word's columns
  static constexpr int kXPart = kPartColumns * kSize;
  __host__ __device__ static constexpr int x_place(int piece) {
    const int in_part = piece % (4 * kPieces);
    return piece / (4 * kPieces) * kXPart + (in_part % kPieces * 4 + in_part / kPieces) * 16;
  }
  // In bytes from the begin of shared memory. The sums take the stages' place in the end; two rows
  // of them are sums of x.
  static constexpr int kRing = kBits == 4 ? PairTable<T>::kBytes : 0;
  static constexpr int kSumsRows = kTileRows + 2, kSumsPitch = kMost + 1;
  static constexpr int kSumsBytes = kParts * kSumsRows * kSumsPitch * 4;
  static constexpr int bytes(int inputs) {
    const int stages = kStages * (kTileRows * kPitch + inputs * kXPitch);
    return kRing + (stages > kSumsBytes ? stages : kSumsBytes);
  }
};

// Where in a stage a lane's words begin, and, of row `input` of x, its columns.
template <typename Plan>
__device__ inline int begin_of_words(const Lane& lane) {
  return ptx::keep((lane.upper * kWarpRows + lane.group) * Plan::kPitch +
                   (lane.part * kWordsOfAPart + lane.member) * 4);
}
template <typename Plan>
__device__ inline int begin_of_x(const Lane& lane, int input) {
  return ptx::keep(input * Plan::kXPitch + lane.part * Plan::kXPart + lane.member * 16);
}

// Its word of row 8 r + group.
template <typename Plan>
__device__ inline uint32_t word_of(const char* words, int r) {
  return *reinterpret_cast<const uint32_t*>(words + 8 * r * Plan::kPitch);
}

}  // namespace peftkern::onebit
