// The activations and their slopes.
#pragma once
#include "bottleneck/bottleneck.h"
#include "common/functions.h"

namespace peftkern::bottleneck::PEFTKERN_ISA {
using namespace peftkern::PEFTKERN_ISA;

inline constexpr double kQuick = 1.702, kCubic = 0.044715;
inline constexpr double kRootOfHalf = 0.70710678118654752440;     // 1 / sqrt(2)
inline constexpr double kRootOfTwoByPi = 0.79788456080286535588;  // sqrt(2 / pi)

// A constant in the vector's own precision.
PEFTKERN_INLINE F constant(double x, F) { return splat(static_cast<float>(x)); }
PEFTKERN_INLINE double constant(double x, double) { return x; }

template <Activation kind>
struct Constant {
  static constexpr Activation value = kind;
};

template <typename X>
PEFTKERN_INLINE X tanh_of_gelu(X h) {
  const X cubic = constant(kCubic, h) * h * h * h;
  return tanh(constant(kRootOfTwoByPi, h) * (h + cubic));
}

template <Activation kind, typename X>
PEFTKERN_INLINE X activated(X h) {
  const X half = constant(0.5, h);
  switch (kind) {
    case Activation::identity:
      return h;
    case Activation::relu:
      return choose(h < X{}, X{}, h);  // a NaN stays one
    case Activation::gelu:
      return half * h * (1 + erf(h * constant(kRootOfHalf, h)));
    case Activation::gelu_tanh:
      return half * h * (1 + tanh_of_gelu(h));
    case Activation::quickgelu:
      return h * sigmoid(h * constant(kQuick, h));
    case Activation::silu:
      return h * sigmoid(h);
    case Activation::tanh:
      return tanh(h);
  }
  return h;
}

// Of h * sigmoid(by * h).
template <typename X>
PEFTKERN_INLINE X sigmoid_slope(X h, X by) {
  const X s = sigmoid(h * by);
  return s * (1 + by * h * (1 - s));
}

template <Activation kind, typename X>
PEFTKERN_INLINE X slope(X h) {
  const X half = constant(0.5, h), one = constant(1, h);
  switch (kind) {
    case Activation::identity:
      return one;
    case Activation::relu:
      return choose(h > X{}, one, X{});
    case Activation::gelu:
      return half * (1 + erf(h * constant(kRootOfHalf, h))) +
             h * (half * constant(kRootOfTwoByPi, h)) * exp(-half * h * h);
    case Activation::gelu_tanh: {
      const X t = tanh_of_gelu(h), inner = 1 + constant(3 * kCubic, h) * h * h;
      return half * (1 + t) * (1 + h * (1 - t) * constant(kRootOfTwoByPi, h) * inner);
    }
    case Activation::quickgelu:
      return sigmoid_slope(h, constant(kQuick, h));
    case Activation::silu:
      return sigmoid_slope(h, one);
    case Activation::tanh: {
      const X t = tanh(h);
      return 1 - t * t;
    }
  }
  return one;
}

// Calls f with the activation as a constant.
template <typename Function>
PEFTKERN_INLINE void with_activation(Activation kind, const Function& f) {
  switch (kind) {
    case Activation::identity:
      return f(Constant<Activation::identity>{});
    case Activation::relu:
      return f(Constant<Activation::relu>{});
    case Activation::gelu:
      return f(Constant<Activation::gelu>{});
    case Activation::gelu_tanh:
      return f(Constant<Activation::gelu_tanh>{});
    case Activation::quickgelu:
      return f(Constant<Activation::quickgelu>{});
    case Activation::silu:
      return f(Constant<Activation::silu>{});
    case Activation::tanh:
      return f(Constant<Activation::tanh>{});
  }
}

// out = act(h)
template <typename Acc>
void activate(Activation kind, const Acc* h, int64_t count, Acc* out) {
  with_activation(kind, [&](auto constant) {
    for (int64_t i = 0; i < count; i += Vector<Acc>::lanes) {
      const int64_t n = min(count - i, Vector<Acc>::lanes);
      write(out + i, activated<decltype(constant)::value>(read(h + i, n)), n);
    }
  });
}

// t = scale * t * act'(h)
template <typename Acc>
void multiply_by_slope(Activation kind, const Acc* h, int64_t count, Acc scale, Acc* t) {
  with_activation(kind, [&](auto constant) {
    for (int64_t i = 0; i < count; i += Vector<Acc>::lanes) {
      const int64_t n = min(count - i, Vector<Acc>::lanes);
      const auto by = slope<decltype(constant)::value>(read(h + i, n));
      write(t + i, scale * read(t + i, n) * by, n);
    }
  });
}

}  // namespace peftkern::bottleneck::PEFTKERN_ISA
