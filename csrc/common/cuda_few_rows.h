// Few rows of x times a weight that lies packed: what the kernels of several families share. Codes
// and x come into shared memory by copies that run ahead, and the columns may be split among blocks
// of threads, whose sums are added in order.
//
// A block of kFewRowsThreads takes a tile of rows, and so many of their columns at a time, a stage.
// `Plan` says how both lie in shared memory:
//   kTileRows, kTileColumns            of a stage
//   kRowBytes, kPitch                  of a row's codes, and from one to the next
//   kXPitch, x_place(piece)            from one row of x to the next; where 16 bytes of it stand
//   kMost                              rows of x
//   kStages                            that there is room for
#pragma once
#include "common/cuda_values.h"

namespace peftkern {

inline constexpr int kFewRowsThreads = 256;

template <int kBytes>
struct Words {
  uint32_t word[(kBytes + 3) / 4] = {};
};

template <int kBytes>
__device__ inline Words<kBytes> load_words(const char* from) {
  Words<kBytes> out;
  if constexpr (kBytes % 16 == 0) {
#pragma unroll
    for (int i = 0; i < kBytes / 16; ++i) {
      const uint4 four = reinterpret_cast<const uint4*>(from)[i];
      out.word[4 * i] = four.x;
      out.word[4 * i + 1] = four.y;
      out.word[4 * i + 2] = four.z;
      out.word[4 * i + 3] = four.w;
    }
  } else if constexpr (kBytes == 8) {
    const uint2 two = *reinterpret_cast<const uint2*>(from);
    out.word[0] = two.x;
    out.word[1] = two.y;
  } else if constexpr (kBytes == 4) {
    out.word[0] = *reinterpret_cast<const uint32_t*>(from);
  } else {
    static_assert(kBytes == 2);
    out.word[0] = *reinterpret_cast<const uint16_t*>(from);
  }
  return out;
}

// A pair of values for each byte. An entry fills all banks with copies, so that each lane, or each
// lane of a half-warp for float, has its own and none waits for another.
template <typename T>
class PairTable {
  using Entry = typename Pair<T>::Type;
  static constexpr int kEntryBytes = 128, kCopies = kEntryBytes / static_cast<int>(sizeof(Entry));

 public:
  static constexpr int kBytes = 256 * kEntryBytes;

  __device__ explicit PairTable(const char* table)
      : table_(table),
        copy_(static_cast<unsigned>(
            ptx::keep(static_cast<int>(threadIdx.x % kCopies * sizeof(Entry))))) {}

  // A thread writes the entry of its number, from a place on that differs from its neighbours'.
  __device__ static void write(char* table, float first, float second) {
    static_assert(kFewRowsThreads == 256);
    const Entry entry = Pair<T>::of(first, second);
    Entry copies[16 / sizeof(Entry)];
    for (Entry& copy : copies) copy = entry;
    uint4 four;
    memcpy(&four, copies, sizeof four);
    auto* to = reinterpret_cast<uint4*>(table + threadIdx.x * kEntryBytes);
#pragma unroll
    for (unsigned i = 0; i < 8; ++i) to[(threadIdx.x + i) % 8] = four;
  }

  // Of this byte of a word.
  __device__ Entry of(uint32_t word, int byte) const {
    const uint32_t entry = byte ? word >> (8 * byte - 7) : word << 7;
    return *reinterpret_cast<const Entry*>(table_ + ptx::and_or(entry, 0x7F80u, copy_));
  }

 private:
  const char* table_;
  unsigned copy_;
};

// Where a lane stands. Warps stand above each other, and kParts side by side, each with a part of a
// stage's columns.
inline constexpr int kParts = 4;
struct Lane {
  int part = threadIdx.x / 32 % kParts, upper = threadIdx.x / 32 / kParts;
  int group = threadIdx.x % 32 / 4, member = threadIdx.x % 4;
};

// What a block of threads computes.
struct Share {
  int64_t row;    // the first of its rows
  int64_t stage;  // the first of its stages
  int stages;
  int input, inputs;  // rows of x

  // Of block (tile, split, rows of x), among as many splits as the grid has.
  template <typename Plan>
  __device__ static Share of(int64_t columns, int64_t inputs) {
    const int64_t all = (columns + Plan::kTileColumns - 1) / Plan::kTileColumns;
    Share share;
    share.row = int64_t{blockIdx.x} * Plan::kTileRows;
    share.stage = all * blockIdx.y / gridDim.y;
    share.stages = static_cast<int>(all * (blockIdx.y + 1) / gridDim.y - share.stage);
    share.input = static_cast<int>(blockIdx.z) * Plan::kMost;
    share.inputs = static_cast<int>(inputs) - share.input;
    if (share.inputs > Plan::kMost) share.inputs = Plan::kMost;
    return share;
  }
};

// How many times a thread has something to fetch `every` bytes further on, where `left` are left.
__device__ inline int times(int64_t left, int every, bool any, int most) {
  if (!any || left <= 0) return 0;
  const int64_t count = (left + every - 1) / every;
  return count < most ? static_cast<int>(count) : most;
}

// The stages of codes and x. A thread copies the same places of each stage.
template <typename T, typename Plan>
class Ring {
 public:
  static constexpr int kStages = Plan::kStages;

  __device__ Ring(char* memory, const uint8_t* codes, int64_t row_bytes, int64_t rows, const T* x,
                  int64_t columns, const Share& share)
      : memory_(memory), stages_(share.stages), bytes_(kCodesBytes + share.inputs * Plan::kXPitch) {
    const int row = threadIdx.x / kPieces, piece = threadIdx.x % kPieces * 16;
    const int64_t begin = share.stage * Plan::kRowBytes + piece;
    to_ = ptx::keep(row * Plan::kPitch + piece);
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      const int64_t at = share.row + row + i * kRows;
      codes_[i] = codes + at * row_bytes + begin;
      times_[i] = times(row_bytes - begin, Plan::kRowBytes, at < rows, share.stages);
    }
    const int input = threadIdx.x / kXPieces, x_piece = threadIdx.x % kXPieces;
    const int64_t x_row_bytes = columns * static_cast<int64_t>(sizeof(T));
    const int64_t x_begin = share.stage * kXRowBytes + 16 * x_piece;
    x_to_ = ptx::keep(kCodesBytes + input * Plan::kXPitch + Plan::x_place(x_piece));
    x_times_ = times(x_row_bytes - x_begin, kXRowBytes, true, share.stages);
    inputs_ = ptx::keep(share.inputs - input);
    x_ = reinterpret_cast<const char*>(x) + (share.input + input) * x_row_bytes + x_begin;
    x_step_ = kInputs * x_row_bytes;
  }

  // Starts the copies of stage `t`, the next one, into the place of the one kStages before; they
  // are one group, which is empty past the last stage. What is outside of the matrices becomes
  // zeros.
  __device__ void fill(int t) {
    if (t < stages_) {
      char* to = memory_ + t % kStages * bytes_;
#pragma unroll
      for (int i = 0; i < kCopies; ++i) {
        ptx::cp_async_16(to + to_ + i * kRows * Plan::kPitch, codes_[i], t < times_[i]);
        codes_[i] += Plan::kRowBytes;
      }
#pragma unroll
      for (int i = 0; i < kXCopies; ++i) {
        if (i * kInputs < inputs_) {
          ptx::cp_async_16(to + x_to_ + i * kInputs * Plan::kXPitch, x_ + i * x_step_,
                           t < x_times_);
        }
      }
      x_ += kXRowBytes;
    }
    ptx::cp_async_commit();
  }

  __device__ const char* codes(int t) const { return memory_ + t % kStages * bytes_; }
  __device__ const char* x(int t) const { return codes(t) + kCodesBytes; }

 private:
  // Of 16 bytes, and how many rows of them the threads copy at once.
  static constexpr int kPieces = Plan::kRowBytes / 16, kRows = kFewRowsThreads / kPieces;
  static constexpr int kCopies = Plan::kTileRows / kRows;
  static constexpr int kCodesBytes = Plan::kTileRows * Plan::kPitch;
  static constexpr int kXRowBytes = Plan::kTileColumns * static_cast<int>(sizeof(T));
  static constexpr int kXPieces = kXRowBytes / 16, kInputs = kFewRowsThreads / kXPieces;
  static constexpr int kXCopies = (Plan::kMost + kInputs - 1) / kInputs;

  char* memory_;
  int stages_, bytes_;  // bytes of a stage
  int to_, x_to_;       // where in a stage
  const uint8_t* codes_[kCopies];
  const char* x_;
  int64_t x_step_;  // from one of a thread's rows of x to the next
  int times_[kCopies], x_times_;
  int inputs_;  // rows of x from this thread's first on
};

// The sum of the splits' shares [splits, inputs, rows], in their order.
__device__ inline float sum_of_splits(const float* shares, int64_t splits, int64_t inputs,
                                      int64_t rows, int input, int64_t row) {
  float sum = 0;
  for (int64_t s = 0; s < splits; ++s) sum += shares[(s * inputs + input) * rows + row];
  return sum;
}

// Into how many parts to split the stages of so many tiles, where each multiprocessor has room for
// two blocks of threads. `join`: a tile's sums, written and read again, beside the bytes of a
// stage.
inline int64_t splits_of(int64_t tiles, int64_t stages, int64_t multiprocessors, double join) {
  // In stages of a block of threads: what it takes to begin, and to write the sums and join them.
  // Estimated, not measured.
  constexpr double kBegin = 2, kJoin = 2;
  const int64_t places = 2 * multiprocessors;
  int64_t best = 1;
  double least = 0;
  for (int64_t splits = 1; splits <= stages && splits <= 64; ++splits) {
    const int64_t waves = (tiles * splits + places - 1) / places;
    const double each = static_cast<double>((stages + splits - 1) / splits) + kBegin;
    const double cost = waves * each + (splits > 1 ? kJoin + waves * join : 0);
    if (splits == 1 || cost < least) {
      best = splits;
      least = cost;
    }
  }
  return best;
}

}  // namespace peftkern
