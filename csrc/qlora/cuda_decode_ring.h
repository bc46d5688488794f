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

// How codes lie in a stage. A row is padded so that the rows of a group's neighbours fall into
// other banks.
template <int kBits_, int kSegment_>
struct Layout {
  static constexpr int kBits = kBits_, kSegment = kSegment_;
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
  static constexpr int kMap = kTableBytes, kMapBytes = Layout::kBits == 4 ? 1024 : 0;
  static constexpr int kScales = kMap + kMapBytes;
  static constexpr int kRing = kScales + 2 * Layout::kScales * 4;
  static constexpr int bytes(int inputs) {
    return kRing + kStages * (Layout::kCodesBytes + inputs * kXPitch);
  }
  static_assert(kParts * kTileRows * (kMost + 1) * 4 <= kStages * Layout::kCodesBytes);
};

// What a block of threads computes.
struct Share {
  int64_t row;    // the first of its rows
  int64_t stage;  // the first of its stages
  int stages;
  int input, inputs;  // rows of x
};

template <typename T, typename Layout, int kMost>
class Ring {
  using Where = Plan<T, Layout, kMost>;

 public:
  static constexpr int kStages = Where::kStages;

  __device__ Ring(char* shared, const DeviceWeight& weight, const T* x, const Share& share)
      : memory_(shared + Where::kRing),
        codes_(weight.packed),
        x_(reinterpret_cast<const char*>(x + share.input * weight.columns)),
        rows_(weight.rows - share.row),
        row_bytes_(weight.columns * Layout::kBits / 8),
        x_bytes_(weight.columns * static_cast<int64_t>(sizeof(T))),
        share_(share),
        stage_bytes_(Layout::kCodesBytes + share.inputs * Where::kXPitch) {}

  // Starts the copies of stage `t` into the place of the one kStages before; they are one group,
  // which is empty past the last stage. What is outside of the matrices becomes zeros.
  __device__ void fill(int t) const {
    if (t < share_.stages) {
      char* to = memory_ + t % kStages * stage_bytes_;
      const int64_t stage = share_.stage + t;
      copy_codes(to, stage * Layout::kRowBytes);
      copy_x(to + Layout::kCodesBytes, stage * kXRowBytes);
    }
    ptx::cp_async_commit();
  }

  __device__ const char* codes(int t) const { return memory_ + t % kStages * stage_bytes_; }
  __device__ const char* x(int t) const { return codes(t) + Layout::kCodesBytes; }

 private:
  static constexpr int kXRowBytes = kTileColumns * static_cast<int>(sizeof(T));

  __device__ void copy_codes(char* to, int64_t begin) const {
    constexpr int kPieces = Layout::kRowBytes / 16, kCopies = kTileRows * kPieces / kDecodeThreads;
    const int piece = threadIdx.x % kPieces * 16;
    const bool inside = begin + piece < row_bytes_;
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      const int row = (threadIdx.x + i * kDecodeThreads) / kPieces;
      const bool valid = inside && row < rows_;
      const int64_t from = (share_.row + row) * row_bytes_ + begin + piece;
      ptx::cp_async_16(to + row * Layout::kPitch + piece, codes_ + (valid ? from : 0), valid);
    }
  }

  __device__ void copy_x(char* to, int64_t begin) const {
    constexpr int kPieces = kXRowBytes / 16;
    const int piece = threadIdx.x % kPieces * 16;
    const bool valid = begin + piece < x_bytes_;
    for (int input = threadIdx.x / kPieces; input < share_.inputs;
         input += kDecodeThreads / kPieces) {
      const int64_t from = input * x_bytes_ + begin + piece;
      ptx::cp_async_16(to + input * Where::kXPitch + piece, x_ + (valid ? from : 0), valid);
    }
  }

  char* memory_;
  const uint8_t* codes_;
  const char* x_;
  int64_t rows_, row_bytes_, x_bytes_;
  Share share_;
  int stage_bytes_;
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
        nested_(weight.absmax == nullptr),
        offset_(nested_ ? *weight.offset : 0.0f),
        shift_(shift),
        column_((share.stage * kParts + threadIdx.x % kParts) * kPart),
        inside_(share.row + threadIdx.x / kParts < weight.rows),
        flat_((share.row + threadIdx.x / kParts) * weight.columns + column_) {}

  // Before the first stage, whose scales are then there after a barrier.
  __device__ void start() {
    read(next_);
    write(next_, 0);
    read(next_);
    read(after_);
  }
  // While stage `t` is multiplied: those of the next one.
  __device__ void step(int t) {
    write(next_, (t + 1) % 2);
    next_ = after_;
    read(after_);
  }
  // Of stage `t`: those of a lane's four rows are neighbours.
  __device__ float4 of(int t, int part, int segment, int upper, int group) const {
    const int s = part * Layout::kSegments + segment;
    return reinterpret_cast<const float4*>(to_ +
                                           t % 2 * Layout::kScales)[(s * 2 + upper) * 8 + group];
  }

 private:
  struct Raw {
    float scale[Layout::kSegments];
    uint8_t code[Layout::kSegments];
  };

  __device__ void read(Raw& raw) {
#pragma unroll
    for (int s = 0; s < Layout::kSegments; ++s) {
      const int64_t b = (flat_ + s * Layout::kSegment) >> shift_;
      const bool valid = inside_ && column_ + s * Layout::kSegment < weight_.columns;
      raw.code[s] = valid && nested_ ? weight_.codes[b] : uint8_t{0};
      raw.scale[s] = !valid    ? 0.0f
                     : nested_ ? weight_.nested_absmax[b / kNestedBlock]
                               : weight_.absmax[b];
    }
    column_ += kTileColumns;
    flat_ += kTileColumns;
  }

  __device__ void write(const Raw& raw, int place) const {
    const int row = threadIdx.x / kParts, part = threadIdx.x % kParts;
#pragma unroll
    for (int s = 0; s < Layout::kSegments; ++s) {
      const int segment = part * Layout::kSegments + s;
      float scale = raw.scale[s];
      if (nested_) scale = __fadd_rn(__fmul_rn(map_[raw.code[s]], scale), offset_);
      to_[place * Layout::kScales + (segment * 2 + row / kWarpRows) * kWarpRows + row % 8 * 4 +
          row % kWarpRows / 8] = scale;
    }
  }

  float* to_;
  const float* map_;
  const DeviceWeight& weight_;
  bool nested_;
  float offset_;
  int shift_;
  int64_t column_;
  bool inside_;
  int64_t flat_;
  Raw next_, after_;
};

}  // namespace peftkern::qlora
