// What decode brings into shared memory while it multiplies: codes and x by copies that run ahead,
// scales through registers.
//
// A block of threads takes a tile of kTileRows rows, and of their columns kTileColumns at a time, a
// stage. Its warps stand two above each other, kWarpRows rows each, and four side by side, kPart
// columns each. Within a part, columns lie in segments that share a scale in each row, and of a
// segment each of the four members of a group of lanes has a quarter. So a lane has, of each of its
// rows 8 r + group, r = 0 to 3, the columns member * kSegment / 4 onwards, four a step.
#pragma once
#include "qlora/cuda_values.h"

namespace peftkern::qlora {

inline constexpr int kDecodeThreads = 256;
inline constexpr int kTileRows = 64, kTileColumns = 256, kWarpRows = 32, kPart = 64;
inline constexpr int kParts = kTileColumns / kPart;

// How codes lie in a stage, and what their scales are. A row is padded so that neighbouring rows
// fall into other banks.
template <int kBits_, int kSegment_, bool kNested_>
struct Layout {
  static constexpr int kBits = kBits_, kSegment = kSegment_;
  static constexpr bool kNested = kNested_;
  static constexpr int kSteps = kSegment / 16, kSegments = kPart / kSegment;
  static constexpr int kRowBytes = kTileColumns * kBits / 8, kPitch = kRowBytes * 5 / 4;
  static constexpr int kCodesBytes = kTileRows * kPitch;
  static constexpr int kPartBytes = kPart * kBits / 8;
  static constexpr int kSegmentBytes = kSegment * kBits / 8, kLaneBytes = kSegmentBytes / 4;
  static constexpr int kScales = kBits == 4 ? kTileRows * kParts * kSegments : 0;  // of a stage
};

// Where things lie in shared memory, in bytes from its begin. The sums of the warps take the
// stages' place when those are done with.
template <typename T, typename Layout, int kMost>
struct Plan {
  static constexpr int kStages = kMost == 8 && sizeof(T) == 2 ? 4 : 3;
  static constexpr int kXPitch = kTileColumns * static_cast<int>(sizeof(T)) + 16;
  static constexpr int kTableBytes = Layout::kBits == 4 ? 256 * 128 : 0;
  static constexpr int kMap = kTableBytes, kMapBytes = Layout::kNested ? 1024 : 0;
  static constexpr int kScales = kMap + kMapBytes;
  static constexpr int kRing = kScales + 2 * Layout::kScales * 4;
  static constexpr int bytes(int inputs) {
    return kRing + kStages * (Layout::kCodesBytes + inputs * kXPitch);
  }
  static_assert(kParts * kTileRows * (kMost + 1) * 4 <= kStages * Layout::kCodesBytes);
};

// Where a lane stands.
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
};

// How many times a thread has something to fetch `every` bytes further on, where `left` are left.
__device__ inline int times(int64_t left, int every, bool any, int most) {
  if (!any || left <= 0) return 0;
  const int64_t count = (left + every - 1) / every;
  return count < most ? static_cast<int>(count) : most;
}

// The stages of codes and x. A thread copies the same places of each stage.
template <typename T, typename Layout, int kMost>
class Ring {
  using Where = Plan<T, Layout, kMost>;

 public:
  static constexpr int kStages = Where::kStages;

  __device__ Ring(char* shared, const DeviceWeight& weight, const T* x, const Share& share)
      : memory_(shared + Where::kRing),
        stages_(share.stages),
        bytes_(Layout::kCodesBytes + share.inputs * Where::kXPitch) {
    const int row = threadIdx.x / kPieces, piece = threadIdx.x % kPieces * 16;
    const int64_t row_bytes = weight.columns * Layout::kBits / 8;
    const int64_t begin = share.stage * Layout::kRowBytes + piece;
    to_ = ptx::keep(row * Layout::kPitch + piece);
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      const int64_t at = share.row + row + i * kRows;
      codes_[i] = weight.packed + at * row_bytes + begin;
      times_[i] = times(row_bytes - begin, Layout::kRowBytes, at < weight.rows, share.stages);
    }
    const int input = threadIdx.x / kXPieces, x_piece = threadIdx.x % kXPieces * 16;
    const int64_t x_row_bytes = weight.columns * static_cast<int64_t>(sizeof(T));
    const int64_t x_begin = share.stage * kXRowBytes + x_piece;
    x_to_ = ptx::keep(Layout::kCodesBytes + input * Where::kXPitch + x_piece);
    x_times_ = times(x_row_bytes - x_begin, kXRowBytes, true, share.stages);
    inputs_ = ptx::keep(share.inputs - input);
#pragma unroll
    for (int i = 0; i < kXCopies; ++i) {
      const int64_t at = share.input + input + i * kInputs;
      x_[i] = reinterpret_cast<const char*>(x) + at * x_row_bytes + x_begin;
    }
  }

  // Starts the copies of stage `t`, the next one, into the place of the one kStages before; they
  // are one group, which is empty past the last stage. What is outside of the matrices becomes
  // zeros.
  __device__ void fill(int t) {
    if (t < stages_) {
      char* to = memory_ + t % kStages * bytes_;
#pragma unroll
      for (int i = 0; i < kCopies; ++i) {
        ptx::cp_async_16(to + to_ + i * kRows * Layout::kPitch, codes_[i], t < times_[i]);
        codes_[i] += Layout::kRowBytes;
      }
#pragma unroll
      for (int i = 0; i < kXCopies; ++i) {
        if (i * kInputs < inputs_) {
          ptx::cp_async_16(to + x_to_ + i * kInputs * Where::kXPitch, x_[i], t < x_times_);
        }
        x_[i] += kXRowBytes;
      }
    }
    ptx::cp_async_commit();
  }

  __device__ const char* codes(int t) const { return memory_ + t % kStages * bytes_; }
  __device__ const char* x(int t) const { return codes(t) + Layout::kCodesBytes; }

 private:
  // Of 16 bytes, and how many rows of them the threads copy at once.
  static constexpr int kPieces = Layout::kRowBytes / 16, kRows = kDecodeThreads / kPieces;
  static constexpr int kCopies = kTileRows / kRows;
  static constexpr int kXRowBytes = kTileColumns * static_cast<int>(sizeof(T));
  static constexpr int kXPieces = kXRowBytes / 16, kInputs = kDecodeThreads / kXPieces;
  static constexpr int kXCopies = kMost / kInputs;

  char* memory_;
  int stages_, bytes_;  // bytes of a stage
  int to_, x_to_;       // where in a stage
  const uint8_t* codes_[kCopies];
  const char* x_[kXCopies];
  int times_[kCopies], x_times_;
  int inputs_;  // rows of x from this thread's first on
};

// The scales of a stage, in two places by turns. A thread has one in each segment of a part, and
// brings it in three stages: read two before it is decoded, decoded one before it is used.
template <typename Layout>
class Scales {
 public:
  __device__ Scales(char* shared, int scales, int map, const DeviceWeight& weight, int shift,
                    const Share& share)
      : to_(reinterpret_cast<float*>(shared + scales)),
        map_(reinterpret_cast<const float*>(shared + map)),
        weight_(weight),
        shift_(shift) {
    const int row = threadIdx.x / kParts, part = threadIdx.x % kParts;
    const int64_t column = (share.stage * kParts + part) * kPart;
    if constexpr (Layout::kNested) offset_ = *weight.offset;
    flat_ = (share.row + row) * weight.columns + column;
    const bool inside = share.row + row < weight.rows;
#pragma unroll
    for (int s = 0; s < Layout::kSegments; ++s) {
      times_[s] =
          times(weight.columns - column - s * Layout::kSegment, kTileColumns, inside, share.stages);
    }
  }

  // Before the first stage, whose scales are then there after a barrier.
  __device__ void start() {
    read(next_, 0);
    write(next_, 0);
    read(next_, 1);
    read(after_, 2);
  }
  // While stage `t` is multiplied: those of the next one.
  __device__ void step(int t) {
    write(next_, t + 1);
    next_ = after_;
    read(after_, t + 3);
  }
  // Where a lane's begin; those of its four rows are neighbours.
  __device__ static int begin(const Lane& lane) {
    return lane.part * Layout::kSegments * kTileRows + lane.upper * kWarpRows + lane.group * 4;
  }
  // Of stage `t`, in a segment.
  __device__ float4 of(int t, int begin, int segment) const {
    const float* from = to_ + t % 2 * Layout::kScales + begin + segment * kTileRows;
    return *reinterpret_cast<const float4*>(from);
  }

 private:
  struct Raw {
    float scale[Layout::kSegments];
    uint8_t code[Layout::kSegments];
  };

  __device__ void read(Raw& raw, int t) {
#pragma unroll
    for (int s = 0; s < Layout::kSegments; ++s) {
      const int64_t b = (flat_ + s * Layout::kSegment) >> shift_;
      raw.scale[s] = 0;
      raw.code[s] = 0;
      if (t >= times_[s]) continue;
      if constexpr (Layout::kNested) {
        raw.code[s] = weight_.codes[b];
        raw.scale[s] = weight_.nested_absmax[b >> kNestedShift];
      } else {
        raw.scale[s] = weight_.absmax[b];
      }
    }
    flat_ += kTileColumns;
  }

  __device__ void write(const Raw& raw, int t) const {
    const int row = threadIdx.x / kParts, part = threadIdx.x % kParts;
    float* to = to_ + t % 2 * Layout::kScales + row / kWarpRows * kWarpRows + row % 8 * 4 +
                row % kWarpRows / 8;
#pragma unroll
    for (int s = 0; s < Layout::kSegments; ++s) {
      float scale = raw.scale[s];
      if constexpr (Layout::kNested) {
        scale = __fadd_rn(__fmul_rn(map_[raw.code[s]], scale), offset_);
      }
      to[(part * Layout::kSegments + s) * kTileRows] = scale;
    }
  }

  float* to_;
  const float* map_;
  const DeviceWeight& weight_;
  int shift_;
  float offset_ = 0;
  int64_t flat_;
  int times_[Layout::kSegments];
  Raw next_, after_;
};

}  // namespace peftkern::qlora
