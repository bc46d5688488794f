// Keys of scores: counted in bins, and compared with limits.
#pragma once
#include "common/simd.h"
#include "sparse/select.h"

namespace peftkern::sparse::PEFTKERN_ISA {
using namespace peftkern::PEFTKERN_ISA;

#if defined(__AVX512F__)
// Of a comparison, a bit a lane.
PEFTKERN_INLINE uint32_t bits_of(I mask) { return _mm512_movepi32_mask(__m512i(mask)); }
#elif defined(__AVX2__)
PEFTKERN_INLINE uint32_t bits_of(I mask) {
  return static_cast<uint32_t>(_mm256_movemask_ps(__m256(mask)));
}
#else
PEFTKERN_INLINE uint32_t bits_of(I mask) {
  uint32_t bits = 0;
  for (int i = 0; i < W; ++i) bits |= (static_cast<uint32_t>(mask[i]) & 1) << i;
  return bits;
}
#endif

PEFTKERN_INLINE int64_t ones(uint32_t bits) { return __builtin_popcount(bits); }
PEFTKERN_INLINE int lowest(uint32_t bits) { return __builtin_ctz(bits); }

// A branch on a score waits for its memory, and what comes behind a wrong guess is not yet asked
// for.
PEFTKERN_INLINE void prefetch(const void* from) {
  constexpr int64_t kAhead = 2048;
  __builtin_prefetch(static_cast<const char*>(from) + kAhead);
}

template <bool kLargest>
PEFTKERN_INLINE U keys_of(F scores) {
  const U key = U(scores) & 0x7FFFFFFFu;
  return kLargest ? static_cast<uint32_t>(kInfinity) - key : key;
}
template <bool kLargest>
PEFTKERN_INLINE uint64_t key_of(double score) {
  uint64_t key;
  std::memcpy(&key, &score, sizeof key);
  key &= 0x7FFFFFFFFFFFFFFF;
  return kLargest ? kWideInfinity - key : key;
}

template <typename T>
PEFTKERN_INLINE double as_double(const T* from) {
  return load_some(from, 1)[0];
}
PEFTKERN_INLINE double as_double(const float* from) { return *from; }
PEFTKERN_INLINE double as_double(const double* from) { return *from; }

// How far the bins reach, at most to the last number: so no NaN lies in one.
PEFTKERN_INLINE uint64_t reach(const Bins& bins) {
  const uint64_t all = bins.keys.infinity() + 1 - bins.low, whole = static_cast<uint64_t>(bins.bins)
                                                                    << bins.shift;
  return whole >> bins.shift == static_cast<uint64_t>(bins.bins) && whole < all ? whole : all;
}

template <bool kLargest, typename T>
PEFTKERN_INLINE void histogram_of(const T* scores, int64_t count, const Bins& bins,
                                  int64_t* counts) {
  const U low = splat(static_cast<uint32_t>(bins.low)),
          span = splat(static_cast<uint32_t>(reach(bins))),
          infinity = splat(static_cast<uint32_t>(kInfinity));
  // A shift by 32 or more would be none.
  const int shift = bins.shift < 31 ? bins.shift : 31;
  int64_t below = 0, inside = 0, numbers = 0;
  uint32_t places[W];
  for (int64_t i = 0; i < count; i += W) {
    prefetch(scores + i);
    const int64_t n = count - i;
    const uint32_t there = n >= W ? (1u << (W - 1)) * 2 - 1 : (1u << n) - 1;
    const U key = keys_of<kLargest>(n >= W ? load(scores + i) : load_some(scores + i, n));
    const U above = key - low;
    uint32_t in = bits_of(above < span) & there;
    below += ones(bits_of(key < low) & there);
    numbers += ones(bits_of(key <= infinity) & there);
    if (!in) continue;
    inside += ones(in);
    const U place = above >> shift;
    std::memcpy(places, &place, sizeof places);
    for (; in; in &= in - 1) ++counts[1 + places[lowest(in)]];
  }
  counts[0] += below;
  counts[bins.bins + 1] += numbers - below - inside;
}

template <bool kLargest, typename T>
PEFTKERN_INLINE void wide_histogram_of(const T* scores, int64_t count, const Bins& bins,
                                       int64_t* counts) {
  const uint64_t span = reach(bins);
  for (int64_t i = 0; i < count; ++i) {
    const uint64_t key = key_of<kLargest>(as_double(scores + i)), above = key - bins.low;
    if (key > kWideInfinity) continue;
    const int64_t place = key < bins.low ? 0
                          : above < span ? 1 + static_cast<int64_t>(above >> bins.shift)
                                         : bins.bins + 1;
    ++counts[place];
  }
}

template <typename T>
void histogram(const T* scores, int64_t count, const Bins& bins, int64_t* counts) {
  if constexpr (sizeof(T) < 8) {  // a double's keys are wide
    if (!bins.keys.wide) {
      return bins.keys.largest ? histogram_of<true>(scores, count, bins, counts)
                               : histogram_of<false>(scores, count, bins, counts);
    }
  }
  bins.keys.largest ? wide_histogram_of<true>(scores, count, bins, counts)
                    : wide_histogram_of<false>(scores, count, bins, counts);
}

// Of a word's n scores, those below low and those in the band, and where asked for, their keys.
template <bool kWide, bool kLargest>
struct Comparer;

template <bool kLargest>
struct Comparer<false, kLargest> {
  U low, span;
  explicit Comparer(const Picking& by)
      : low(splat(static_cast<uint32_t>(by.low))),
        span(splat(static_cast<uint32_t>(by.high - by.low))) {}

  template <typename T>
  PEFTKERN_INLINE void compare(const Comparer& c, const T* from, int64_t n, uint32_t& below,
                               uint32_t& inside) {
    below = inside = 0;
    PEFTKERN_UNROLL
    for (int v = 0; v < kWord; v += W) {
      if (v >= n) break;
      const U key = keys_of<kLargest>(n - v >= W ? load(from + v) : load_some(from + v, n - v));
      below |= bits_of(key < c.low) << v;
      inside |= bits_of(key - c.low < c.span) << v;
    }
  }
  template <typename T>
  PEFTKERN_INLINE uint64_t key(const T* from) {
    return keys_of<kLargest>(load_some(from, 1))[0];
  }
};

template <bool kLargest>
struct Comparer<true, kLargest> {
  uint64_t low, span;
  explicit Comparer(const Picking& by) : low(by.low), span(by.high - by.low) {}

  template <typename T>
  PEFTKERN_INLINE void compare(const Comparer& c, const T* from, int64_t n, uint32_t& below,
                               uint32_t& inside) {
    below = inside = 0;
    for (int64_t i = 0; i < kWord && i < n; ++i) {
      const uint64_t key = key_of<kLargest>(as_double(from + i));
      below |= static_cast<uint32_t>(key < c.low) << i;
      inside |= static_cast<uint32_t>(key - c.low < c.span) << i;
    }
  }
  template <typename T>
  PEFTKERN_INLINE uint64_t key(const T* from) {
    return key_of<kLargest>(as_double(from));
  }
};

template <typename C, typename T>
PEFTKERN_INLINE void add(Candidates& to, const T* scores, int64_t at, uint32_t inside,
                         int64_t position) {
  int64_t next = __atomic_fetch_add(&to.count, ones(inside), __ATOMIC_RELAXED);
  for (; inside && next < kBand; inside &= inside - 1, ++next) {
    const int64_t i = at + lowest(inside);
    to.list[next] = {C::key(scores + i), position + i};
  }
}

template <typename C, typename T>
PEFTKERN_INLINE Picked pick_by(const T* scores, const Picking& by, int64_t begin, int64_t end,
                               int64_t take, Candidates* candidates, int64_t position,
                               uint32_t* bits) {
  const C comparer(by);
  const int64_t words = words_of(by.columns);
  int64_t row = begin / words, column = begin % words * kWord;
  Picked found{0, 0};
  for (int64_t w = begin; w < end; ++w) {
    const int64_t at = row * by.columns + column, n = by.columns - column;
    const uint32_t there = n >= kWord ? ~0u : (1u << n) - 1;
    uint32_t below, inside;
    prefetch(scores + at);
    prefetch(scores + at + kWord / 2);
    C::compare(comparer, scores + at, n, below, inside);
    below &= there;
    inside &= there;
    found.below += ones(below);
    if (inside) {
      found.inside += ones(inside);
      if (candidates) add<C>(*candidates, scores, at, inside, position);
      for (; take && inside; --take, inside &= inside - 1) below |= inside & -inside;
    }
    bits[w] = below;
    column += kWord;
    if (column >= by.columns) {
      column = 0;
      ++row;
    }
  }
  return found;
}

template <bool kWide, typename T>
PEFTKERN_INLINE Picked pick_of(const T* scores, const Picking& by, int64_t begin, int64_t end,
                               int64_t take, Candidates* candidates, int64_t position,
                               uint32_t* bits) {
  if (by.keys.largest) {
    return pick_by<Comparer<kWide, true>>(scores, by, begin, end, take, candidates, position, bits);
  }
  return pick_by<Comparer<kWide, false>>(scores, by, begin, end, take, candidates, position, bits);
}

template <typename T>
Picked pick(const T* scores, const Picking& by, int64_t begin, int64_t end, int64_t take,
            Candidates* candidates, int64_t position, uint32_t* bits) {
  if constexpr (sizeof(T) < 8) {  // a double's keys are wide
    if (!by.keys.wide) {
      return pick_of<false>(scores, by, begin, end, take, candidates, position, bits);
    }
  }
  return pick_of<true>(scores, by, begin, end, take, candidates, position, bits);
}

}  // namespace peftkern::sparse::PEFTKERN_ISA
