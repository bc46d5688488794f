// Dropout and the ways between float and the other dtypes.
#pragma once
#include "common/philox.h"
#include "common/simd.h"

namespace peftkern::PEFTKERN_ISA {

// Zero where a word is below the threshold. Double multiplies in its own width, the rest in float.
PEFTKERN_INLINE void keep_or_drop(const double* x, const uint32_t* words, uint32_t threshold,
                                  double factor, int64_t count, double* out) {
  for (int64_t i = 0; i < count; ++i) out[i] = words[i] >= threshold ? x[i] * factor : 0.0;
}

template <typename T>
PEFTKERN_INLINE void keep_or_drop(const T* x, const uint32_t* words, uint32_t threshold,
                                  double factor, int64_t count, T* out) {
  const F by = splat(static_cast<float>(factor));
  for (int64_t i = 0; i < count; i += W) {
    const U keep = U(load_bits<U>(words + i) >= threshold);
    if (i + W <= count) {
      store(out + i, F(keep & U(load(x + i) * by)));
    } else {
      store_some(out + i, F(keep & U(load_some(x + i, count - i) * by)), count - i);
    }
  }
}

template <typename T>
void dropout(const T* x, int64_t count, uint64_t seed, uint64_t threshold, double factor,
             int64_t begin, T* out) {
  if (threshold > 0xFFFFFFFFu) {
    std::memset(out, 0, static_cast<size_t>(count) * sizeof(T));
    return;
  }
  constexpr int64_t kDraw = 4 * W;
  alignas(64) uint32_t words[kDraw + 4];
  for (int64_t i = 0; i < count;) {
    const int64_t skip = (begin + i) % 4, n = min(kDraw - skip, count - i);
    philox(seed, begin + i - skip, words);
    keep_or_drop(x + i, words + skip, static_cast<uint32_t>(threshold), factor, n, out + i);
    i += n;
  }
}

template <typename T>
void to_float(const T* from, int64_t count, float* to) {
  int64_t i = 0;
  for (; i + W <= count; i += W) store(to + i, load(from + i));
  if (i < count) store_some(to + i, load_some(from + i, count - i), count - i);
}

template <typename T>
void from_float(const float* from, int64_t count, T* to) {
  int64_t i = 0;
  for (; i + W <= count; i += W) store(to + i, load(from + i));
  if (i < count) store_some(to + i, load_some(from + i, count - i), count - i);
}

}  // namespace peftkern::PEFTKERN_ISA
