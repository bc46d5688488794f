// What decode multiplies: codes become values in registers, a warp's sums stay there. 16-bit x
// meets them in the matrix unit, float x in the ordinary one; which lane has which columns is the
// same (cuda_decode_ring.h).
#pragma once
#include "qlora/cuda_decode_ring.h"

namespace peftkern::qlora {

template <typename T, typename Layout>
class Values;

// Codes of 4 bits: a byte finds its two values at once.
template <typename T, int kSegment, bool kNested>
class Values<T, Layout<4, kSegment, kNested>> : public PairTable<T> {
 public:
  using PairTable<T>::PairTable;

  __device__ static void write(char* table, const float* codebook) {
    PairTable<T>::write(table, codebook[threadIdx.x / 16], codebook[threadIdx.x % 16]);
  }

  template <int kBytes>
  __device__ typename Pair<T>::Type pair(const Words<kBytes>& codes, int i) const {
    return this->of(codes.word[i / 4], i % 4);
  }
};

// Codes of 8 bits: with its sign bit turned over, a code is the low byte of 2^23 + 128 + code.
template <typename T, int kSegment>
class Values<T, Layout<8, kSegment, false>> {
 public:
  __device__ explicit Values(const char*) {}
  __device__ static void write(char*, const float*) {}

  template <int kBytes>
  __device__ typename Pair<T>::Type pair(const Words<kBytes>& codes, int i) const {
    const uint32_t word = codes.word[i / 2] ^ 0x80808080u;
    return Pair<T>::of(value(word, i % 2 * 2), value(word, i % 2 * 2 + 1));
  }

 private:
  __device__ static float value(uint32_t word, unsigned byte) {
    return __uint_as_float(__byte_perm(word, 0x4B000000u, 0x7650u + byte)) - 0x1.0001p23f;
  }
};

// Where in a stage a lane's codes, columns and scales begin, of its first row and segment.
template <typename T, typename Layout, int kMost>
struct Begin {
  int codes, x, scales;

  __device__ explicit Begin(const Lane& lane)
      : codes(ptx::keep((lane.upper * kWarpRows + lane.group) * Layout::kPitch +
                        lane.part * Layout::kPartBytes + lane.member * Layout::kLaneBytes)),
        x((lane.part * kPart + lane.member * Layout::kSegment / 4) * static_cast<int>(sizeof(T))),
        scales(ptx::keep(Scales<Layout>::begin(lane))) {
    // The matrix unit has a group's rows of x in its lanes.
    if constexpr (sizeof(T) == 2) x += lane.group * Plan<T, Layout, kMost>::kXPitch;
    x = ptx::keep(x);
  }

  // Of row r, in a segment.
  __device__ Words<Layout::kLaneBytes> codes_of(const char* stage, int r, int segment) const {
    return load_words<Layout::kLaneBytes>(stage + codes + 8 * r * Layout::kPitch +
                                          segment * Layout::kSegmentBytes);
  }
};

// The weight is the matrix unit's first operand, 16 of its rows, and x^T the second, 8 of x's.
template <typename T, typename Layout, int kMost>
class Sums {
  static constexpr int kTiles = kMost / 8;

 public:
  // Adds the products of stage `t`.
  __device__ void add(const DecodeRing<T, Layout, kMost>& ring, const Scales<Layout>& scales,
                      const Values<T, Layout>& values, int inputs, int t) {
#pragma unroll
    for (int s = 0; s < Layout::kSegments; ++s) {
      const char* x = ring.x(t) + begin_.x + s * Layout::kSegment * static_cast<int>(sizeof(T));
      Words<kXBytes> columns[kTiles];
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
        if (8 * n + lane_.group < inputs) columns[n] = load_words<kXBytes>(x + 8 * n * kXPitch);
      }
      float4 scale{};
      if constexpr (Layout::kBits == 4) {
        scale = scales.of(t, begin_.scales, s);
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const auto above = begin_.codes_of(ring.codes(t), 2 * half, s);
        const auto below = begin_.codes_of(ring.codes(t), 2 * half + 1, s);
        if constexpr (Layout::kBits == 4) {
          float part[kTiles][4] = {};
          multiply(values, above, below, columns, part);
          fold(part, half ? scale.z : scale.x, half ? scale.w : scale.y, sums_[half]);
        } else {
          multiply(values, above, below, columns, sums_[half]);
        }
      }
    }
  }

  // out [kParts, kTileRows, kMost + 1]
  __device__ void write(float* out) const {
    out += lane_.part * kTileRows * (kMost + 1);
#pragma unroll
    for (int i = 0; i < 2 * kTiles * 4; ++i) {
      const int half = i / (kTiles * 4), n = i / 4 % kTiles, d = i % 4;
      const int row = lane_.upper * kWarpRows + 16 * half + d / 2 * 8 + lane_.group;
      out[row * (kMost + 1) + 8 * n + 2 * lane_.member + d % 2] = sums_[half][n][d];
    }
  }

 private:
  static constexpr int kXBytes = Layout::kSegment / 4 * static_cast<int>(sizeof(T));
  static constexpr int kXPitch = Plan<T, Layout, kMost>::kXPitch;
  using Codes = Words<Layout::kLaneBytes>;

  __device__ static void multiply(const Values<T, Layout>& values, const Codes& above,
                                  const Codes& below, const Words<kXBytes> (&columns)[kTiles],
                                  float (&out)[kTiles][4]) {
#pragma unroll
    for (int step = 0; step < Layout::kSteps; ++step) {
      const int i = 2 * step;
      const uint32_t a[4] = {values.pair(above, i), values.pair(below, i),
                             values.pair(above, i + 1), values.pair(below, i + 1)};
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
        const uint32_t b[2] = {columns[n].word[i], columns[n].word[i + 1]};
        ptx::mma_m16n8k16(out[n], a, b, T{});
      }
    }
  }

  __device__ static void fold(const float (&part)[kTiles][4], float above, float below,
                              float (&out)[kTiles][4]) {
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int d = 0; d < 4; ++d) out[n][d] = fmaf(d < 2 ? above : below, part[n][d], out[n][d]);
    }
  }

  Lane lane_;
  Begin<T, Layout, kMost> begin_{lane_};
  float sums_[2][kTiles][4] = {};
};

// Float x: a lane has of its four rows its own columns, and of x all rows.
template <typename Layout, int kMost>
class Sums<float, Layout, kMost> {
 public:
  __device__ void add(const DecodeRing<float, Layout, kMost>& ring, const Scales<Layout>& scales,
                      const Values<float, Layout>& values, int inputs, int t) {
#pragma unroll
    for (int s = 0; s < Layout::kSegments; ++s) {
      const char* x = ring.x(t) + begin_.x + s * Layout::kSegment * 4;
      Words<Layout::kLaneBytes> own[4];
#pragma unroll
      for (int r = 0; r < 4; ++r) own[r] = begin_.codes_of(ring.codes(t), r, s);
      float scale[4] = {1, 1, 1, 1};
      if constexpr (Layout::kBits == 4) {
        const float4 four = scales.of(t, begin_.scales, s);
        memcpy(scale, &four, sizeof four);
      }
      float part[kMost][4] = {};
#pragma unroll
      for (int step = 0; step < Layout::kSteps; ++step) {
        multiply(values, own, x + step * 16, inputs, step, part);
      }
#pragma unroll
      for (int i = 0; i < kMost; ++i) {
#pragma unroll
        for (int r = 0; r < 4; ++r) sums_[i][r] = fmaf(scale[r], part[i][r], sums_[i][r]);
      }
    }
  }

  // The members' columns come together; out as above.
  __device__ void write(float* out) const {
    out += lane_.part * kTileRows * (kMost + 1);
#pragma unroll
    for (int i = 0; i < kMost; ++i) {
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        float sum = sums_[i][r];
        sum += __shfl_xor_sync(0xFFFFFFFFu, sum, 1);
        sum += __shfl_xor_sync(0xFFFFFFFFu, sum, 2);
        const int row = lane_.upper * kWarpRows + 8 * r + lane_.group;
        if (lane_.member == 0) out[row * (kMost + 1) + i] = sum;
      }
    }
  }

 private:
  // Four columns of four rows.
  __device__ static void multiply(const Values<float, Layout>& values,
                                  const Words<Layout::kLaneBytes> (&own)[4], const char* x,
                                  int inputs, int step, float (&part)[kMost][4]) {
    uint2 w[4][2];
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      w[r][0] = values.pair(own[r], 2 * step);
      w[r][1] = values.pair(own[r], 2 * step + 1);
    }
#pragma unroll
    for (int i = 0; i < kMost; ++i) {
      if (i >= inputs) break;
      const float4 four =
          *reinterpret_cast<const float4*>(x + i * Plan<float, Layout, kMost>::kXPitch);
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        float sum = part[i][r];
        sum = fmaf(__uint_as_float(w[r][0].x), four.x, sum);
        sum = fmaf(__uint_as_float(w[r][0].y), four.y, sum);
        sum = fmaf(__uint_as_float(w[r][1].x), four.z, sum);
        part[i][r] = fmaf(__uint_as_float(w[r][1].y), four.w, sum);
      }
    }
  }

  Lane lane_;
  Begin<float, Layout, kMost> begin_{lane_};
  float sums_[kMost][4] = {};
};

}  // namespace peftkern::qlora
