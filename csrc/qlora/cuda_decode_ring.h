// What decode brings into shared memory while it multiplies: codes and x by copies that run ahead,
// scales through registers.
//
// A block of threads takes a tile of kTileRows rows, and of their columns kTileColumns at a time, a
// stage. Its warps stand two above each other, kWarpRows rows each, and four side by side, kPart
// columns each. Within a part, columns lie in segments that share a scale in each row, and of a
// segment each of the four members of a group of lanes has a quarter. So a lane has, of each of its
// rows 8 r + group, r = 0 to 3, the columns member * kSegment / 4 onwards, four a step.
#pragma once
#include "common/cuda_few_rows.h"
#include "qlora/cuda_values.h"

namespace peftkern::qlora {

inline constexpr int kTileRows = 64, kTileColumns = 256, kWarpRows = 32, kPart = 64;
static_assert(kParts == kTileColumns / kPart);

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
template <typename T, typename Layout_, int kMost_>
struct Plan {
  using Layout = Layout_;
  static constexpr int kMost = kMost_;
  static constexpr int kTileRows = qlora::kTileRows, kTileColumns = qlora::kTileColumns;
  static constexpr int kRowBytes = Layout::kRowBytes, kPitch = Layout::kPitch;
  // As many as leave room for two blocks of threads on an H100.
  static constexpr int kStages = kMost == 8 && sizeof(T) == 2 ? 4 : 3;
  static constexpr int kXPitch = kTileColumns * static_cast<int>(sizeof(T)) + 16;
  static constexpr int kTableBytes = Layout::kBits == 4 ? PairTable<T>::kBytes : 0;
  __host__ __device__ static constexpr int x_place(int piece) { return 16 * piece; }
  static constexpr int kMap = kTableBytes, kMapBytes = Layout::kNested ? 1024 : 0;
  static constexpr int kScales = kMap + kMapBytes;
  static constexpr int kRing = kScales + 2 * Layout::kScales * 4;
  static constexpr int bytes(int inputs) {
    return kRing + kStages * (Layout::kCodesBytes + inputs * kXPitch);
  }
  static_assert(kParts * kTileRows * (kMost + 1) * 4 <= kStages * Layout::kCodesBytes);
};

template <typename T, typename Layout, int kMost>
using DecodeRing = Ring<T, Plan<T, Layout, kMost>>;

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
