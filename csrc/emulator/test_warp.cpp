// Shuffles, votes and reductions, against what each says of all lanes at once; and arithmetic.
#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <vector>

#include "common/launch.h"
#include "common/ptx.h"
#include "common/testing.h"

using namespace peftkern;

namespace {

constexpr unsigned kAll = 0xFFFFFFFFu;

template <typename T>
__global__ void shuffle_kernel(const T* in, T* out, int by, int width) {
  const unsigned lane = threadIdx.x;
  const T value = in[lane];
  out[lane] = __shfl_sync(kAll, value, by, width);
  out[32 + lane] = __shfl_up_sync(kAll, value, static_cast<unsigned>(by), width);
  out[64 + lane] = __shfl_down_sync(kAll, value, static_cast<unsigned>(by), width);
  out[96 + lane] = __shfl_xor_sync(kAll, value, by, width);
}

template <typename T>
void shuffles_stay_within_their_segments() {
  std::vector<T> in(32), out(128);
  for (int i = 0; i < 32; ++i) in[static_cast<size_t>(i)] = static_cast<T>(3 * i + 1);
  for (int width : {32, 16, 8, 4, 2}) {
    for (int by = 0; by < width; ++by) {
      EXPECT(launch(shuffle_kernel<T>, 1, 32, 0, nullptr, in.data(), out.data(), by, width) == 0);
      for (int i = 0; i < 32; ++i) {
        const int first = i / width * width, last = first + width - 1;
        const auto at = [&](int lane) { return in[static_cast<size_t>(lane)]; };
        const auto* of = out.data() + i;
        EXPECT(of[0] == at(first + by));
        EXPECT(of[32] == at(i - by >= first ? i - by : i));
        EXPECT(of[64] == at(i + by <= last ? i + by : i));
        EXPECT(of[96] == at(i ^ by));
      }
    }
  }
}

// Even and odd lanes go different ways, each with a mask of its own.
__global__ void halves_kernel(const int* in, unsigned* out) {
  const unsigned lane = threadIdx.x % 32;
  const int value = in[threadIdx.x];
  unsigned* to = out + threadIdx.x * 8;
  if (lane % 2 == 0) {
    constexpr unsigned mask = 0x55555555u;
    to[0] = __ballot_sync(mask, value > 3);
    to[1] = static_cast<unsigned>(__any_sync(mask, value == 30));
    to[2] = static_cast<unsigned>(__all_sync(mask, value > -40));
    to[3] = static_cast<unsigned>(__reduce_add_sync(mask, value));
    to[4] = static_cast<unsigned>(__reduce_min_sync(mask, value));
    to[5] = static_cast<unsigned>(__reduce_max_sync(mask, value));
    to[6] = __reduce_min_sync(mask, static_cast<unsigned>(value));
    to[7] = __reduce_max_sync(mask, static_cast<unsigned>(value));
  } else {
    constexpr unsigned mask = 0xAAAAAAAAu;
    to[0] = __ballot_sync(mask, value & 4);
    to[1] = static_cast<unsigned>(__any_sync(mask, value > 100));
    to[2] = static_cast<unsigned>(__all_sync(mask, value == 5));
    to[3] = __reduce_and_sync(mask, static_cast<unsigned>(value));
    to[4] = __reduce_or_sync(mask, static_cast<unsigned>(value));
    to[5] = __reduce_xor_sync(mask, static_cast<unsigned>(value));
    to[6] = __reduce_add_sync(mask, static_cast<unsigned>(value));
    __syncwarp(mask);
    to[7] = 0;
  }
}

void votes_and_reductions_hear_the_lanes_of_their_mask() {
  std::vector<int> in(64);
  for (int i = 0; i < 64; ++i) in[static_cast<size_t>(i)] = i * 37 % 61 - 25;
  std::vector<unsigned> out(64 * 8);
  EXPECT(launch(halves_kernel, 1, 64, 0, nullptr, in.data(), out.data()) == cudaSuccess);
  for (size_t i = 0; i < 64; ++i) {
    unsigned ballot = 0, sum = 0, both = kAll, either = 0, odd = 0, below = kAll, above = 0;
    int least = 1000, greatest = -1000;
    bool is_30 = false, all = true, is_5 = true;
    for (unsigned lane = static_cast<unsigned>(i % 2); lane < 32; lane += 2) {
      const int value = in[i / 32 * 32 + lane];
      const auto bits = static_cast<unsigned>(value);
      ballot |= static_cast<unsigned>(i % 2 ? (value & 4) != 0 : value > 3) << lane;
      is_30 |= value == 30;
      all &= value > -40;
      is_5 &= value == 5;
      sum += bits;
      both &= bits;
      either |= bits;
      odd ^= bits;
      least = std::min(least, value);
      greatest = std::max(greatest, value);
      below = std::min(below, bits);
      above = std::max(above, bits);
    }
    const auto wanted = i % 2 ? std::vector<unsigned>{ballot, 0, is_5, both, either, odd, sum, 0}
                              : std::vector<unsigned>{ballot,
                                                      is_30,
                                                      all,
                                                      sum,
                                                      static_cast<unsigned>(least),
                                                      static_cast<unsigned>(greatest),
                                                      below,
                                                      above};
    EXPECT(std::equal(wanted.begin(), wanted.end(), out.begin() + static_cast<long>(8 * i)));
  }
}

__global__ void neighbours_kernel(int* out) {
  __shared__ int x[64];
  x[threadIdx.x] = static_cast<int>(threadIdx.x);
  __syncwarp();
  const int other = x[threadIdx.x ^ 1];
  __syncwarp();
  x[threadIdx.x] = other;
  out[threadIdx.x] = x[threadIdx.x];
}

void syncwarp_orders_what_lanes_see() {
  std::vector<int> out(64);
  EXPECT(launch(neighbours_kernel, 1, 64, 0, nullptr, out.data()) == cudaSuccess);
  for (int i = 0; i < 64; ++i) EXPECT(out[static_cast<size_t>(i)] == (i ^ 1));
}

void intrinsics_are_those_of_the_device() {
  EXPECT(__byte_perm(0x33221100u, 0x77665544u, 0x7351) == 0x77335511u);
  EXPECT(__byte_perm(0x00008100u, 0, 0x9899) == 0xFF00FFFFu);
  EXPECT(__funnelshift_l(0x80000001u, 0x7u, 1) == 0xFu &&
         __funnelshift_r(2u, 1u, 1) == 0x80000001u);
  EXPECT(__umulhi(0xFFFFFFFFu, 0xFFFFFFFFu) == 0xFFFFFFFEu);
  EXPECT(__popc(0xF0F0u) == 8 && __clz(1) == 31 && __ffs(8) == 4 && __ffs(0) == 0);
  EXPECT(__float2int_rn(2.5f) == 2 && __float2int_rn(3.5f) == 4 && __float2int_rn(-2.5f) == -2);
  EXPECT(__float2int_rn(1e20f) == 2147483647 && __float2int_rn(-1e20f) == -2147483647 - 1);
  EXPECT(__float2int_rn(NAN) == 0 && __float2int_rz(-2.9f) == -2);
}

// All bits of a half are known to a table that is built here by counting: neighbours in order.
void halves_are_rounded_to_nearest_even() {
  std::vector<float> values;
  for (uint16_t bits = 0; bits < 0x7C00; ++bits) values.push_back(emulator::from_fp16(bits));
  EXPECT(values[0] == 0 && values[1] == 0x1p-24f && values[0x3C00] == 1 && values[0x7BFF] == 65504);
  for (uint16_t bits = 1; bits < 0x7C00; ++bits) {
    const float below = values[bits - 1], value = values[bits], half = (below + value) / 2;
    EXPECT(below < value);
    EXPECT(emulator::to_fp16(value) == bits && emulator::to_fp16(-value) == (bits | 0x8000));
    EXPECT(emulator::to_fp16(half) == (bits % 2 ? bits - 1 : bits));
    EXPECT(emulator::to_fp16(std::nextafter(half, 1e9f)) == bits);
    EXPECT(emulator::to_fp16(std::nextafter(half, 0.0f)) == bits - 1);
  }
  EXPECT(emulator::to_fp16(65519.996f) == 0x7BFF && emulator::to_fp16(65520) == 0x7C00);
  EXPECT(emulator::to_fp16(-0.0f) == 0x8000 && emulator::to_fp16(NAN) == 0x7FFF);
  EXPECT(std::isinf(emulator::from_fp16(0xFC00)) && std::isnan(emulator::from_fp16(0x7C01)));
  EXPECT(emulator::to_bf16(1.0f + 0x1p-8f) == 0x3F80 &&
         emulator::to_bf16(1.0f + 0x3p-8f) == 0x3F82);
  EXPECT(emulator::to_bf16(3.4e38f) == 0x7F80 && emulator::to_bf16(NAN) == 0x7FFF);
  EXPECT(ptx::pack_bf16x2(1, -2) == 0xC0003F80u && ptx::pack_fp16x2(1, -2) == 0xC0003C00u);
}

}  // namespace

int main() {
  RUN(shuffles_stay_within_their_segments<int>);
  RUN(shuffles_stay_within_their_segments<double>);
  RUN(shuffles_stay_within_their_segments<uint8_t>);
  RUN(votes_and_reductions_hear_the_lanes_of_their_mask);
  RUN(syncwarp_orders_what_lanes_see);
  RUN(intrinsics_are_those_of_the_device);
  RUN(halves_are_rounded_to_nearest_even);
}
