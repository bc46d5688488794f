// The step of packed values and their way into the weight, block by block.
#pragma once
#include <math.h>

#include "common/blocks.h"
#include "sparse/adamw.h"
#include "sparse/entries.h"

namespace peftkern::sparse::PEFTKERN_ISA {
using namespace peftkern::PEFTKERN_ISA;

inline constexpr int64_t kBlock = 512;  // entries whose values stay in the first-level cache
// Entries whose place is asked for before its value is put there: a fifth of the time at 5 %, where
// most lines of a weight are touched and no hardware sees a stride.
inline constexpr int64_t kAhead = 64;

PEFTKERN_INLINE F square_root(F x) {
#if defined(__AVX512F__)
  return _mm512_sqrt_ps(x);
#elif defined(__AVX2__)
  return _mm256_sqrt_ps(x);
#else
  for (int i = 0; i < W; ++i) x[i] = ::sqrtf(x[i]);
  return x;
#endif
}
PEFTKERN_INLINE double square_root(double x) { return ::sqrt(x); }
PEFTKERN_INLINE F where(F condition, F yes, F no) {
  const U mask = U(condition != F{});
  return F((mask & U(yes)) | (~mask & U(no)));
}
PEFTKERN_INLINE double where(double condition, double yes, double no) {
  return condition != 0 ? yes : no;
}

// The corrections of entries [begin, begin + count); a spread of 0 where nothing may change.
template <typename A>
PEFTKERN_INLINE void correct(const Adamw<A>& by, const int32_t* born, int64_t begin, int64_t count,
                             A* rate, A* spread) {
  const Corrections<A>& table = by.corrections;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t age = by.step - (born ? born[begin + i] : 0), known = min(age, table.known);
    rate[i] = age < 1 ? A(0) : table.rate[known];
    spread[i] = age < 1 ? A(0) : table.spread[known];
  }
}

template <typename A>
PEFTKERN_INLINE void update(const Adamw<A>& by, const A* rate, const A* spread, const A* grad,
                            int64_t count, A* values, A* exp_avg, A* exp_avg_sq) {
  constexpr int64_t kLanes = Vector<A>::lanes;
  const auto keep = splat(by.keep), beta2 = splat(by.beta2), eps = splat(by.eps),
             new_in_1 = splat(by.new_in_1), new_in_2 = splat(by.new_in_2);
  for (int64_t i = 0; i < count; i += kLanes) {
    const int64_t n = min(count - i, kLanes);
    const auto live = read(spread + i, n), g = read(grad + i, n), value = read(values + i, n),
               m = read(exp_avg + i, n), s = read(exp_avg_sq + i, n);
    const auto next_m = m + new_in_1 * (g - m), next_s = s * beta2 + new_in_2 * g * g;
    const auto down = square_root(next_s) * live + eps;
    const auto next = value * keep - read(rate + i, n) * next_m / down;
    write(values + i, where(live, next, value), n);
    write(exp_avg + i, where(live, next_m, m), n);
    write(exp_avg_sq + i, where(live, next_s, s), n);
  }
}

// Values as the weight holds them.
template <typename T>
PEFTKERN_INLINE const T* as_weight(const float* values, int64_t count, T* buffer) {
  for (int64_t i = 0; i < count; i += W) {
    const int64_t n = min(count - i, W);
    write(buffer + i, read(values + i, n), n);
  }
  return buffer;
}
PEFTKERN_INLINE const float* as_weight(const float* values, int64_t, float*) { return values; }
PEFTKERN_INLINE const double* as_weight(const double* values, int64_t, double*) { return values; }

// The last of `count` rows or tiles that does not start behind the entry: it has the entry.
PEFTKERN_INLINE int64_t holder(const Pattern& at, int64_t count, int64_t entry) {
  int64_t low = 0;
  for (int64_t high = count; high - low > 1;) {
    const int64_t middle = (low + high) / 2;
    (position(at, middle) <= entry ? low : high) = middle;
  }
  return low;
}

// Walks through the entries in their order, from any one on, and puts values where they belong.
struct Csr {
  const Pattern& at;
  int64_t entry, row, row_end;

  PEFTKERN_INLINE Csr begin(const Pattern& at, int64_t entry) {
    const int64_t row = holder(at, at.rows, entry);
    return {at, entry, row, position(at, row + 1)};
  }
  template <typename Column, typename T>
  PEFTKERN_INLINE void put_in(Csr& walk, const Column* column, const T* values, int64_t count,
                              T* weight) {
    for (const int64_t end = walk.entry + count; walk.entry < end;) {
      while (walk.row_end <= walk.entry) walk.row_end = position(walk.at, ++walk.row + 1);
      T* row = weight + walk.row * walk.at.columns;
      for (const int64_t last = min(end, walk.row_end); walk.entry < last; ++walk.entry) {
        __builtin_prefetch(row + column[min(walk.entry + kAhead, walk.at.nnz - 1)], 1);
        row[column[walk.entry]] = *values++;
      }
    }
  }
  template <typename T>
  PEFTKERN_INLINE void put(Csr& walk, const T* values, int64_t count, T* weight) {
    if (is_small(walk.at.columns)) {
      put_in(walk, static_cast<const uint16_t*>(walk.at.places), values, count, weight);
    } else {
      put_in(walk, static_cast<const uint32_t*>(walk.at.places), values, count, weight);
    }
  }
};

struct Bitmap {
  const Pattern& at;
  const uint32_t* bits;
  int64_t words, row, word;
  uint32_t left;  // bits of this word that are still to come

  PEFTKERN_INLINE Bitmap begin(const Pattern& at, int64_t entry) {
    const auto* bits = static_cast<const uint32_t*>(at.places);
    const int64_t words = words_of(at.columns), tiles = tiles_of(at.columns),
                  tile = holder(at, at.rows * tiles, entry), row = tile / tiles,
                  word = tile % tiles * (kTile / kWord);
    Bitmap walk{at, bits, words, row, word, bits[row * words + word]};
    for (int64_t skip = entry - position(at, tile); skip; --skip) {
      next(walk);
      walk.left &= walk.left - 1;
    }
    return walk;
  }
  // Goes on to a word that has bits.
  PEFTKERN_INLINE void next(Bitmap& walk) {
    while (walk.left == 0) {
      if (++walk.word == walk.words) {
        walk.word = 0;
        ++walk.row;
      }
      walk.left = walk.bits[walk.row * walk.words + walk.word];
    }
  }
  template <typename T>
  PEFTKERN_INLINE void put(Bitmap& walk, const T* values, int64_t count, T* weight) {
    for (int64_t i = 0; i < count; ++i, walk.left &= walk.left - 1) {
      next(walk);
      T* word = weight + walk.row * walk.at.columns + walk.word * kWord;
      word[__builtin_ctz(walk.left)] = values[i];
    }
  }
};

// Calls f(entry, how many) for each block once it has made its step.
template <typename T, typename A, typename Function>
PEFTKERN_INLINE void for_each_block(const Packed<T, A>& io, const Adamw<A>& by, int64_t begin,
                                    int64_t end, const Function& f) {
  alignas(64) A rate[kBlock], spread[kBlock];
  if (!io.born) correct<A>(by, nullptr, 0, kBlock, rate, spread);
  for (int64_t e = begin; e < end; e += kBlock) {
    const int64_t count = min(kBlock, end - e);
    if (io.born) correct(by, io.born, e, count, rate, spread);
    update(by, rate, spread, io.grad + e, count, io.values + e, io.exp_avg + e, io.exp_avg_sq + e);
    f(e, count);
  }
}

template <typename Walk, typename T, typename A>
PEFTKERN_INLINE void adamw_along(const Packed<T, A>& io, const Adamw<A>& by, int64_t begin,
                                 int64_t end) {
  alignas(64) T buffer[kBlock];
  Walk walk = Walk::begin(io.pattern, begin);
  for_each_block(io, by, begin, end, [&](int64_t e, int64_t count) {
    Walk::put(walk, as_weight(io.values + e, count, buffer), count, io.weight);
  });
}

template <typename T, typename A>
void adamw(const Packed<T, A>& io, const Adamw<A>& by, int64_t begin, int64_t end) {
  if (begin == end) return;
  if (!io.weight) return for_each_block(io, by, begin, end, [](int64_t, int64_t) {});
  if (io.pattern.is_bitmap) return adamw_along<Bitmap>(io, by, begin, end);
  adamw_along<Csr>(io, by, begin, end);
}

}  // namespace peftkern::sparse::PEFTKERN_ISA
