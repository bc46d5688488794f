// Between a weight and its codes, and the gradient of a latent weight.
#pragma once
#include "onebit/bytes.h"

namespace peftkern::onebit::PEFTKERN_ISA {

inline constexpr int64_t kBlock = 512;  // codes that pass through the first-level cache at a time

// Up to W elements as a vector of the sums' type; doubles come one by one.
template <typename T>
struct Lanes {
  using Sum = float;
  using Vector = F;
  static constexpr int count = W;
};
template <>
struct Lanes<double> {
  using Sum = double;
  using Vector = double;
  static constexpr int count = 1;
};
template <typename T>
PEFTKERN_INLINE F take(const T* from, int64_t n) {
  return n >= W ? load(from) : load_some(from, n);
}
PEFTKERN_INLINE double take(const double* from, int64_t) { return *from; }
template <typename T>
PEFTKERN_INLINE void give(T* to, F v, int64_t n) {
  n >= W ? store(to, v) : store_some(to, v, n);
}
PEFTKERN_INLINE void give(double* to, double v, int64_t) { *to = v; }

// What a number above the mean has as its code, and what the code has as its value.
template <typename A, int kBits>
struct Coder;

template <int kBits>
struct Coder<float, kBits> {
  F middle, low, high;
  Table limits, values;
  static constexpr uint32_t half = 1u << (kBits - 1);

  Coder(const Quantizer<float>& by, const float* meanings)
      : middle(splat(by.limits[half - 1])),
        low(splat(meanings[0])),
        high(splat(meanings[1])),
        limits(by.limits),
        values(meanings) {}

  // A search by halves; what is no number is not above anything.
  PEFTKERN_INLINE U code(const Coder& c, F above) {
    U found = U(above > c.middle) & half;
    PEFTKERN_UNROLL
    for (uint32_t step = half / 2; step; step /= 2) {
      found += U(above > Table::look_up(c.limits, found + (step - 1))) & step;
    }
    return found;
  }
  PEFTKERN_INLINE F value(const Coder& c, F above) {
    if constexpr (kBits == 1) return above > c.middle ? c.high : c.low;
    return Table::look_up(c.values, code(c, above));
  }
};

template <int kBits>
struct Coder<double, kBits> {
  const double *limits, *values;

  Coder(const Quantizer<double>& by, const double* meanings)
      : limits(by.limits), values(meanings) {}

  PEFTKERN_INLINE uint32_t code(const Coder& c, double above) {
    uint32_t found = 0;
    for (int t = 0; t + 1 < 1 << kBits; ++t) found += above > c.limits[t];
    return found;
  }
  PEFTKERN_INLINE double value(const Coder& c, double above) { return c.values[code(c, above)]; }
};

// Calls f with a coder of as many bits, whose values are `meanings`.
template <typename A, typename Function>
PEFTKERN_INLINE void with_coder(const Quantizer<A>& by, const A* meanings, const Function& f) {
  switch (by.bits) {
    case 1:
      return f(Coder<A, 1>(by, meanings));
    case 2:
      return f(Coder<A, 2>(by, meanings));
    default:
      return f(Coder<A, 4>(by, meanings));
  }
}

// A sum whose order is the same whatever W is; of the lanes' sums, kLast are added one by one.
inline constexpr int kLast = 16;

template <typename V>
struct Sum;

template <>
struct Sum<F> {
  static constexpr int count = kSumLanes / W;
  F parts[count] = {};

  PEFTKERN_INLINE void add(Sum& s, int part, F v) { s.parts[part] += v; }
  PEFTKERN_INLINE double total(Sum s) {
    for (int half = count / 2; half * W >= kLast; half /= 2) {
      for (int v = 0; v < half; ++v) s.parts[v] += s.parts[v + half];
    }
    float lanes[kLast];
    for (int v = 0; v < kLast / W; ++v) store(lanes + v * W, s.parts[v]);
    double sum = 0;
    for (int i = 0; i < kLast; ++i) sum += lanes[i];
    return sum;
  }
};

template <>
struct Sum<double> {
  static constexpr int count = kLast;
  double parts[count] = {};

  PEFTKERN_INLINE void add(Sum& s, int part, double v) { s.parts[part] += v; }
  PEFTKERN_INLINE double total(Sum s) {
    for (int half = count / 2; half; half /= 2) {
      for (int v = 0; v < half; ++v) s.parts[v] += s.parts[v + half];
    }
    return s.parts[0];
  }
};

// Calls f(part of a Sum, element, how many are left) for each vector of a piece.
template <typename T, typename Function>
PEFTKERN_INLINE void for_each_vector(int64_t begin, int64_t end, const Function& f) {
  constexpr int kParts = Sum<typename Lanes<T>::Vector>::count, kLanes = Lanes<T>::count;
  int64_t i = begin;
  for (; i + kParts * kLanes <= end; i += kParts * kLanes) {
    PEFTKERN_UNROLL
    for (int v = 0; v < kParts; ++v) f(v, i + v * kLanes, int64_t{kLanes});
  }
  for (int v = 0; i < end; ++v, i += kLanes) f(v, i, end - i);
}

// The lanes that are there.
PEFTKERN_INLINE F first_lanes(F v, int64_t n) {
  return n >= W ? v : F(U(v) & U(lanes() < splat(static_cast<uint32_t>(n))));
}
PEFTKERN_INLINE double first_lanes(double v, int64_t) { return v; }

template <bool kSquares, typename T, typename A>
PEFTKERN_INLINE void piece_sums(const T* weight, int64_t begin, int64_t end, A mean, double* to) {
  using V = typename Lanes<T>::Vector;
  Sum<V> first, second;
  for_each_vector<T>(begin, end, [&](int v, int64_t i, int64_t n) {
    const V above = first_lanes(take(weight + i, n) - mean, n);
    Sum<V>::add(first, v, above);
    if constexpr (kSquares) Sum<V>::add(second, v, above * above);
  });
  to[0] = Sum<V>::total(first);
  to[1] = Sum<V>::total(second);
}

template <typename T, typename A>
void sums(const T* weight, int64_t count, A mean, bool squares, int64_t begin, int64_t end,
          double* sums) {
  for (int64_t p = begin; p < end; ++p) {
    const int64_t first = p * kPiece, last = min(count, first + kPiece);
    if (squares) {
      piece_sums<true>(weight, first, last, mean, sums + 2 * p);
    } else {
      piece_sums<false>(weight, first, last, mean, sums + 2 * p);
    }
  }
}

template <typename T, typename A>
void quantize(const T* weight, const Quantizer<A>& by, int64_t begin, int64_t end, T* out) {
  with_coder(by, by.values, [&](const auto& coder) {
    for (int64_t i = begin; i < end; i += Lanes<T>::count) {
      give(out + i, coder.value(coder, take(weight + i, end - i) - by.mean), end - i);
    }
  });
}

PEFTKERN_INLINE void put_codes(uint8_t* to, U code) { narrow(reinterpret_cast<int8_t*>(to), code); }
PEFTKERN_INLINE void put_codes(uint8_t* to, uint32_t code) { *to = static_cast<uint8_t>(code); }

template <typename T, typename A>
void encode(const T* weight, const Quantizer<A>& by, int64_t columns, int64_t begin, int64_t end,
            uint8_t* packed) {
  const int64_t bytes = (columns * by.bits + 7) / 8;
  uint8_t codes[kBlock];
  with_coder(by, by.values, [&](const auto& coder) {
    for (int64_t row = begin; row < end; ++row) {
      for (int64_t k = 0; k < columns; k += kBlock) {
        const T* from = weight + row * columns + k;
        const int64_t width = min(kBlock, columns - k);
        for (int64_t i = 0; i < width; i += Lanes<T>::count) {
          put_codes(codes + i, coder.code(coder, take(from + i, width - i) - by.mean));
        }
        pack(codes, width, by.bits, packed + row * bytes + k * by.bits / 8);
      }
    }
  });
}

template <typename T, typename A>
void slope_sums(const A* grad, const T* weight, const Quantizer<A>& by, const Slopes<A>& slopes,
                int64_t count, int64_t begin, int64_t end, double* sums) {
  using V = typename Lanes<T>::Vector;
  with_coder(by, slopes.levels, [&](const auto& coder) {
    for (int64_t p = begin; p < end; ++p) {
      Sum<V> first, second;
      const int64_t stop = min(count, (p + 1) * kPiece);
      for_each_vector<T>(p * kPiece, stop, [&](int v, int64_t i, int64_t n) {
        const V g = take(grad + i, n), above = take(weight + i, n) - by.mean;
        Sum<V>::add(first, v, g);
        Sum<V>::add(second, v, g * (coder.value(coder, above) - above * slopes.along));
      });
      sums[2 * p] = Sum<V>::total(first);
      sums[2 * p + 1] = Sum<V>::total(second);
    }
  });
}

template <typename T, typename A>
void slope(const A* grad, const T* weight, const Quantizer<A>& by, const Slopes<A>& slopes,
           int64_t begin, int64_t end, T* out) {
  for (int64_t i = begin; i < end; i += Lanes<T>::count) {
    const int64_t n = end - i;
    const auto above = take(weight + i, n) - by.mean;
    const auto straight = take(grad + i, n) * slopes.straight;
    give(out + i, straight + slopes.shift + above * slopes.slope, n);
  }
}

PEFTKERN_INLINE void give_values(const Quantizer<double>& by, const uint8_t* codes, int64_t n,
                                 double* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = by.values[codes[i]];
}
template <typename T>
PEFTKERN_INLINE void give_values(const Quantizer<float>& by, const uint8_t* codes, int64_t n,
                                 T* out) {
  const Table values(by.values);
  for (int64_t i = 0; i < n; i += W) {
    give(out + i, Table::look_up(values, load_bytes(codes + i)), n - i);
  }
}

template <typename T, typename A>
void dequantize(const uint8_t* packed, const Quantizer<A>& by, int64_t columns, int64_t begin,
                int64_t end, T* out) {
  const int64_t bytes = (columns * by.bits + 7) / 8;
  uint8_t codes[kBlock];
  for (int64_t row = begin; row < end; ++row) {
    for (int64_t k = 0; k < columns; k += kBlock) {
      const int64_t width = min(kBlock, columns - k);
      unpack(packed + row * bytes + k * by.bits / 8, width, by.bits, codes);
      give_values(by, codes, width, out + row * columns + k);
    }
  }
}

}  // namespace peftkern::onebit::PEFTKERN_ISA
