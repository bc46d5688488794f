// What decode multiplies: codes become levels in registers, a warp's sums stay there.
//
// Levels are odd, and all sums are of -level: so each bit is a sign as floats have it.
//
// 16-bit x meets the levels in the matrix unit. A word w, shifted left by s, has two bits where
// numbers of 16 bits have their signs, and two more just below:
//   ((w << s) & 0x80008000) | [1, 1]    is 1 or -1, of bits 15 - s and 31 - s
//   ((w << s) & 0x40004000) | [-0, -0]  is -0 or -2, of bits 14 - s and 30 - s: 1 less than a sign
// Two instructions and a shift make four signs: of 1 bit those of four columns, of 2 bits of two
// columns in two planes, level = high * sign + low * sign'. What that 1 adds up to is taken off at
// the end: one more product, for all rows of the weight, sums x, and x beside such bits alone.
// Columns that share a product are so chosen that their pairs of x are formed where x was loaded.
#pragma once
#include "onebit/cuda_linear_plan.h"

namespace peftkern::onebit {

// Of 2 bits: levels are high + low, high - low and their opposites.
inline constexpr float kHigh = static_cast<float>((level(2, 3) + level(2, 2)) / 2);
inline constexpr float kLow = static_cast<float>((level(2, 3) - level(2, 2)) / 2);

template <typename T>
inline constexpr uint32_t kOnes = 0;
template <>
inline constexpr uint32_t kOnes<bf16> = 0x3F803F80u;
template <>
inline constexpr uint32_t kOnes<fp16> = 0x3C003C00u;

// Of a shifted word, the pair in the place of signs and the one below.
template <typename T>
__device__ inline uint32_t sign_of(uint32_t word) {
  return ptx::and_or(word, 0x80008000u, kOnes<T>);
}
__device__ inline uint32_t below_of(uint32_t word) {
  return ptx::and_or(word, 0x40004000u, 0x80008000u);
}

// The weight is the matrix unit's first operand, 16 of its rows, and x^T the second, 8 of x's.
template <typename T, int kBits, int kMost>
class Sums {
  using Where = Plan<T, kBits, kMost>;
  static constexpr int kTiles = kMost / 8, kRowTiles = kWarpRows / 16;
  static constexpr int kPairs = Where::kWordColumns / 2;

 public:
  // The matrix unit has a group's row of x in its lanes. Where there is none, it has the first once
  // more, for sums that nobody reads.
  __device__ explicit Sums(int inputs) {
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      const int input = 8 * n + lane_.group;
      x_[n] = begin_of_x<Where>(lane_, input < inputs ? input : 0);
    }
  }

  // Adds the products of a stage.
  __device__ void add(const char* codes, const char* x, const PairTable<T>& table) {
    uint32_t pairs[kTiles][kPairs];
#pragma unroll
    for (int n = 0; n < kTiles; ++n) load_pairs(x + x_[n], pairs[n]);
#pragma unroll
    for (int tile = 0; tile < kRowTiles; ++tile) {
      const uint32_t above = word_of<Where>(codes + words_, 2 * tile),
                     below = word_of<Where>(codes + words_, 2 * tile + 1);
      if constexpr (kBits == 1) {
        multiply_signs(above, below, pairs, sums_[tile]);
      } else if constexpr (kBits == 2) {
        float high[kTiles][4] = {};
        multiply_plane(above, below, pairs, sign_of<T>, high);
        fold(high, kHigh, sums_[tile]);
        float low[kTiles][4] = {};
        multiply_plane(above, below, pairs, below_of, low);
        fold(low, kLow, sums_[tile]);
      } else {
        multiply_pairs(above, below, table, pairs, sums_[tile]);
      }
    }
    add_up(pairs);
  }

  // out [kParts, kSumsRows, kSumsPitch]
  __device__ void write(float* out) const {
    out += lane_.part * Where::kSumsRows * Where::kSumsPitch + 2 * lane_.member;
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int i = 0; i < kRowTiles * 4; ++i) {
        const int tile = i / 4, d = i % 4;
        const int row = lane_.upper * kWarpRows + 16 * tile + d / 2 * 8 + lane_.group;
        out[row * Where::kSumsPitch + 8 * n + d % 2] = sums_[tile][n][d];
      }
      if (lane_.upper == 0 && lane_.group < 2) {
        const int row = Where::kTileRows + lane_.group;
        out[row * Where::kSumsPitch + 8 * n] = of_x_[n][0];
        out[row * Where::kSumsPitch + 8 * n + 1] = of_x_[n][1];
      }
    }
  }

 private:
  using Part = float[kTiles][4];

  // Pairs of columns as a register's codes stand: of 4 bits neighbours, otherwise half a word
  // apart.
  __device__ static void load_pairs(const char* from, uint32_t (&pairs)[kPairs]) {
    uint32_t raw[kPairs];
#pragma unroll
    for (int i = 0; i < kPairs / 4; ++i) {
      const uint4 four = *reinterpret_cast<const uint4*>(from + 64 * i);
      raw[4 * i] = four.x;
      raw[4 * i + 1] = four.y;
      raw[4 * i + 2] = four.z;
      raw[4 * i + 3] = four.w;
    }
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      pairs[i] = kBits == 4
                     ? raw[i]
                     : __byte_perm(raw[i / 2], raw[i / 2 + kPairs / 2], i % 2 ? 0x7632u : 0x5410u);
    }
  }

  // out += a x, of the columns of two pairs.
  __device__ static void multiply(const uint32_t (&a)[4], const uint32_t (&pairs)[kTiles][kPairs],
                                  int first, int second, Part& out) {
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      const uint32_t b[2] = {pairs[n][first], pairs[n][second]};
      ptx::mma_m16n8k16(out[n], a, b, T{});
    }
  }

  __device__ static void multiply_signs(uint32_t above, uint32_t below,
                                        const uint32_t (&pairs)[kTiles][kPairs], Part& out) {
#pragma unroll
    for (int t = 0; t < 8; t += 2) {
      const uint32_t up = above << (2 * t), down = below << (2 * t);
      const uint32_t next_up = up << 2, next_down = down << 2;
      const uint32_t a[4] = {sign_of<T>(next_up), sign_of<T>(next_down), below_of(up),
                             below_of(down)};
      multiply(a, pairs, 13 - 2 * t, 14 - 2 * t, out);
      const uint32_t b[4] = {sign_of<T>(up), sign_of<T>(down), below_of(next_up),
                             below_of(next_down)};
      multiply(b, pairs, 15 - 2 * t, 12 - 2 * t, out);
    }
  }

  template <typename Plane>
  __device__ static void multiply_plane(uint32_t above, uint32_t below,
                                        const uint32_t (&pairs)[kTiles][kPairs], const Plane& plane,
                                        Part& out) {
#pragma unroll
    for (int t = 0; t < 8; ++t) {
      if (t & 2) continue;
      const uint32_t a[4] = {plane(above << (2 * t)), plane(below << (2 * t)),
                             plane(above << (2 * t + 4)), plane(below << (2 * t + 4))};
      multiply(a, pairs, 7 - t, 5 - t, out);
    }
  }

  __device__ static void multiply_pairs(uint32_t above, uint32_t below, const PairTable<T>& table,
                                        const uint32_t (&pairs)[kTiles][kPairs], Part& out) {
#pragma unroll
    for (int i = 0; i < 4; i += 2) {
      const uint32_t a[4] = {table.of(above, i), table.of(below, i), table.of(above, i + 1),
                             table.of(below, i + 1)};
      multiply(a, pairs, i, i + 1, out);
    }
  }

  __device__ static void fold(const Part& part, float by, Part& out) {
#pragma unroll
    for (int i = 0; i < kTiles * 4; ++i) {
      out[i / 4][i % 4] = fmaf(by, part[i / 4][i % 4], out[i / 4][i % 4]);
    }
  }

  // Of x: row 0 is the sum of all columns, row 1 of those beside a bit that means -0 or -2.
  __device__ void add_up(const uint32_t (&pairs)[kTiles][kPairs]) {
    const uint32_t all = lane_.group == 0 ? kOnes<T> : 0;
    const uint32_t below = kBits == 1 && lane_.group == 1 ? kOnes<T> : all;
    const uint32_t a[4] = {all, 0, below, 0};
    float part[kTiles][4] = {};
#pragma unroll
    for (int i = 0; i < kPairs; i += 4) {
      if (kBits == 1) {
        multiply(a, pairs, i + 1, i + 2, part);
        multiply(a, pairs, i + 3, i, part);
      } else if (kBits == 2) {
        multiply(a, pairs, i + 3, i + 1, part);
        multiply(a, pairs, i + 2, i, part);
      } else {
        multiply(a, pairs, i, i + 1, part);
        multiply(a, pairs, i + 2, i + 3, part);
      }
    }
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      of_x_[n][0] += part[n][0];
      of_x_[n][1] += part[n][1];
    }
  }

  Lane lane_;
  int words_ = begin_of_words<Where>(lane_), x_[kTiles];
  float sums_[kRowTiles][kTiles][4] = {}, of_x_[kTiles][2] = {};
};

// Float x: a lane has of its eight rows its own columns, and of x all rows.
template <int kBits, int kMost>
class Sums<float, kBits, kMost> {
  using Where = Plan<float, kBits, kMost>;
  static constexpr int kRows = kWarpRows / 8;

 public:
  __device__ explicit Sums(int inputs) : inputs_(inputs) {}

  __device__ void add(const char* codes, const char* x, const PairTable<float>& table) {
    uint32_t words[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) words[r] = word_of<Where>(codes + words_, r);
#pragma unroll
    for (int piece = 0; piece < Where::kPieces; ++piece) {
      float w[kRows][4];
#pragma unroll
      for (int r = 0; r < kRows; ++r) read(table, words[r], 4 * piece, w[r]);
#pragma unroll
      for (int i = 0; i < kMost; ++i) {
        if (i >= inputs_) break;
        const float4 four =
            *reinterpret_cast<const float4*>(x + x_ + 64 * piece + i * Where::kXPitch);
        of_x_[i] += (four.x + four.y) + (four.z + four.w);
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          float sum = fmaf(w[r][0], four.x, sums_[i][r]);
          sum = fmaf(w[r][1], four.y, sum);
          sum = fmaf(w[r][2], four.z, sum);
          sums_[i][r] = fmaf(w[r][3], four.w, sum);
        }
      }
    }
  }

  // The members' columns come together; out as above, but for the second sum of x.
  __device__ void write(float* out) const {
    out += lane_.part * Where::kSumsRows * Where::kSumsPitch;
#pragma unroll
    for (int i = 0; i < kMost; ++i) {
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const float sum = of_members(sums_[i][r]);
        const int row = lane_.upper * kWarpRows + 8 * r + lane_.group;
        if (lane_.member == 0) out[row * Where::kSumsPitch + i] = sum;
      }
      const float sum = of_members(of_x_[i]);
      if (lane_.upper == 0 && lane_.group == 0 && lane_.member == 0) {
        out[Where::kTileRows * Where::kSumsPitch + i] = sum;
      }
    }
  }

 private:
  __device__ static float of_members(float sum) {
    sum += __shfl_xor_sync(0xFFFFFFFFu, sum, 1);
    return sum + __shfl_xor_sync(0xFFFFFFFFu, sum, 2);
  }

  // value, or -value where this bit of a word is set.
  __device__ static float signed_by(uint32_t word, int bit, float value) {
    return __uint_as_float(ptx::and_or(word << (31 - bit), 0x80000000u, __float_as_uint(value)));
  }

  // -level of four columns.
  __device__ static void read(const PairTable<float>& table, uint32_t word, int column,
                              float (&out)[4]) {
    if constexpr (kBits == 4) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const uint2 two = table.of(word, column / 2 + i);
        out[2 * i] = __uint_as_float(two.x);
        out[2 * i + 1] = __uint_as_float(two.y);
      }
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int bit = kBits * (column + i);
        out[i] = kBits == 1 ? signed_by(word, bit, 1.0f)
                            : signed_by(word, bit + 1, kHigh) + signed_by(word, bit, kLow);
      }
    }
  }

  int inputs_;
  Lane lane_;
  int words_ = begin_of_words<Where>(lane_), x_ = begin_of_x<Where>(lane_, 0);
  float sums_[kMost][kRows] = {}, of_x_[kMost] = {};
};

}  // namespace peftkern::onebit
