// bottleneck: down, an activation, up, and the residual, by rows of x.
//
//   z = x, or with a norm (x - mean) / sqrt(variance + eps) * norm_weight + norm_bias, by rows
//   hidden = z down^T + bias_down
//   y = residual + scale * (D(act(hidden)) up^T + bias_up)
//
// and with t = g up:
//   grad_hidden = scale * D(t) * act'(hidden)      grad_down = grad_hidden^T z
//   grad_z = grad_hidden down                      grad_up = scale * g^T D(act(hidden))
//
// x and z [rows, inputs], hidden [rows, rank], y, g and residual [rows, outputs]; dense, row-major.
// T: float, double, bf16, fp16, what lies in memory; Acc: float, double for double, in which all
// sums run. Sums of more than 256 products are sums of shorter ones, in order. D drops where the
// Philox word of an element's place in [rows, rank] is below the threshold (common/kernels.h).
//
// Every kernel writes the rows of a range, or its own sums; threads belong to the caller.
#pragma once
#include <cstdint>

#include "common/half.h"
#include "common/isa.h"

namespace peftkern::bottleneck {

enum class Activation : int64_t { identity, relu, gelu, gelu_tanh, quickgelu, silu, tanh };
inline constexpr int64_t kActivations = 7;

// A right operand [depth, columns], cut into panels of `width` columns that lie one after the
// other; the last one is filled up with zeros: packed[panel, depth, width].
template <typename Acc>
struct Packing {
  const Acc* from;  // (j, c) at from[j * row + c * column]
  int64_t row, column, depth, columns, width;
};
// The widths: of panels over the rank, and over x's or y's columns.
inline constexpr int64_t kNarrow = 32, kWide = 64;

struct Drop {
  uint64_t seed = 0, threshold = 0;  // no threshold, no dropout
  double factor = 1;
};

template <typename Acc>
struct Norm {
  const Acc *weight, *bias;  // [inputs], or null
  Acc eps;
  bool there;
};

template <typename T, typename Acc>
struct Forward {
  const T* x;
  const Acc* down;       // packed: depth inputs, columns rank, kNarrow; of few rows as it lies
  const Acc* up;         // packed: depth rank, columns outputs, kWide; of few rows as it lies
  const Acc* bias_down;  // [rank], or null
  const Acc* bias_up;    // [outputs], times the scale, or null
  const T* residual;     // [rows, outputs], or null
  Acc* hidden;           // [rows, rank]
  T* y;
  int64_t inputs, rank, outputs;
  Acc scale;
  Activation activation;
  Norm<Acc> norm;
  Drop drop;
  bool few;  // rows, fewer than kFewRows: to pack the factors would cost more than the work
};

// A null pointer is a gradient that nobody asked for. What is summed up over rows is added to what
// is there.
template <typename T, typename Acc>
struct Backward {
  const T *grad, *x;
  const Acc* hidden;
  const Acc* up;          // packed: depth outputs, columns rank, kNarrow
  const Acc* down;        // packed: depth rank, columns inputs, kWide
  T* grad_x;              // [rows, inputs]
  Acc* grad_down;         // [rank, inputs]
  Acc* grad_up;           // [rank, outputs]: transposed, and without the scale
  Acc* grad_bias_down;    // [rank]
  Acc* grad_bias_up;      // [outputs], without the scale
  Acc* reached;           // [1], sum of t * D(act(hidden)): the scale's gradient, but for bias_up
  Acc* grad_norm_weight;  // [inputs]
  Acc* grad_norm_bias;    // [inputs]
  int64_t inputs, rank, outputs;
  Acc scale;
  Activation activation;
  bool onto_x;  // x was the residual too
  Norm<Acc> norm;
  Drop drop;
};

template <typename T, typename Acc>
struct TypedKernels {
  // Rows [begin, end); `buffer` holds as many Acc as `buffer_of` says.
  void (*forward)(const Forward<T, Acc>& io, int64_t begin, int64_t end, Acc* buffer);
  void (*backward)(const Backward<T, Acc>& io, int64_t begin, int64_t end, Acc* buffer);
};

template <typename Acc>
struct PackKernels {
  // Panels [begin, end).
  void (*pack)(const Packing<Acc>& io, int64_t begin, int64_t end, Acc* packed);
};

struct Kernels {
  TypedKernels<float, float> f32;
  TypedKernels<double, double> f64;
  TypedKernels<peftkern::bf16, float> bf16;
  TypedKernels<peftkern::fp16, float> fp16;
  PackKernels<float> pack_f32;
  PackKernels<double> pack_f64;
};

// Rows that pass through the kernels together: what they take stays in a core's cache.
inline constexpr int64_t kTileRows = 48;
constexpr int64_t forward_buffer(int64_t inputs, int64_t rank, int64_t outputs, bool few) {
  return kTileRows * (inputs + rank + (few ? outputs : 0));
}
constexpr int64_t backward_buffer(int64_t inputs, int64_t rank, int64_t outputs) {
  return kTileRows * (3 * inputs + 2 * rank + outputs + 1);
}
constexpr int64_t panels_of(int64_t columns, int64_t width) {
  return (columns + width - 1) / width;
}
constexpr int64_t packed_size(int64_t depth, int64_t columns, int64_t width) {
  return panels_of(columns, width) * depth * width;
}

PEFTKERN_DECLARE(Kernels, kernels)

inline const Kernels& kernels() { return PEFTKERN_SELECT(kernels); }

}  // namespace peftkern::bottleneck
