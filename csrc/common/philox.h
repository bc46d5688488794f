// Philox 4x32-10 (Salmon et al., 2011), W counters at a time.
//   word(seed, i) = lane i % 4 of philox(counter = (i / 4 as 64 bits, 0, 0), key = seed)
// A word depends on the seed and i alone, so any tiling and any backend draws the same.
#pragma once
#include "common/simd.h"

namespace peftkern::PEFTKERN_ISA {

// One round's product: high and low halves of a * b in each lane.
PEFTKERN_INLINE void multiply(U a, uint32_t b, U& high, U& low) {
  const U factor = splat(b);
  const U64 even = multiply_even(a, factor), odd = multiply_even(U(U64(a) >> 32), factor);
  high = U((even >> 32) | (odd & 0xFFFFFFFF00000000u));
  low = U((even & 0xFFFFFFFFu) | (odd << 32));
}

// The 4 * W words from element `begin` on, a multiple of 4.
PEFTKERN_INLINE void philox(uint64_t seed, int64_t begin, uint32_t* words) {
  const uint64_t counter = static_cast<uint64_t>(begin) / 4;
  U c0 = splat(static_cast<uint32_t>(counter)) + lanes();
  U c1 =
      splat(static_cast<uint32_t>(counter >> 32)) - U(c0 < splat(static_cast<uint32_t>(counter)));
  U c2{}, c3{};
  uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    U high0, low0, high1, low1;
    multiply(c0, 0xD2511F53u, high0, low0);
    multiply(c2, 0xCD9E8D57u, high1, low1);
    c0 = high1 ^ c1 ^ key0;
    c1 = low1;
    c2 = high0 ^ c3 ^ key1;
    c3 = low0;
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  for (int i = 0; i < W; ++i) {
    words[4 * i] = c0[i];
    words[4 * i + 1] = c1[i];
    words[4 * i + 2] = c2[i];
    words[4 * i + 3] = c3[i];
  }
}

}  // namespace peftkern::PEFTKERN_ISA
