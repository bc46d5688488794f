// The forward pass, a tile of rows at a time.
#pragma once
#include "bottleneck/activations.h"
#include "bottleneck/panels.h"
#include "bottleneck/rows.h"

namespace peftkern::bottleneck::PEFTKERN_ISA {

// z of the rows, in `buffer` unless it is x itself.
template <typename T, typename Acc>
const Acc* normed(const T* x, int64_t rows, int64_t inputs, const Norm<Acc>& norm, Acc* buffer) {
  const Acc* from = as_sums(x, rows * inputs, buffer);
  if (!norm.there) return from;
  for (int64_t row = 0; row < rows; ++row) {
    Acc* to = buffer + row * inputs;
    centre(from + row * inputs, inputs, norm.eps, to);
    stretch(norm, to, inputs, to);
  }
  return buffer;
}

template <typename T, typename Acc>
void forward_tile(const Forward<T, Acc>& io, int64_t begin, int64_t rows, Acc* buffer) {
  const int64_t inputs = io.inputs, rank = io.rank, outputs = io.outputs;
  Acc* active = buffer + rows * inputs;
  const Acc* z = normed(io.x + begin * inputs, rows, inputs, io.norm, buffer);
  Acc* hidden = io.hidden + begin * rank;
  const Left<Acc> left{z, inputs, rows};
  const auto finish_hidden = [&](int64_t row, int64_t c, auto v, int64_t n) {
    if (io.bias_down) v += read(io.bias_down + c, n);
    write(hidden + row * rank + c, v, n);
  };
  if (io.few) {
    for_each_dot(left, io.down, inputs, rank, Acc(1), hidden, finish_hidden);
  } else {
    for_each_sum<kNarrow>(left, io.down, inputs, rank, Acc(1), finish_hidden);
  }
  activate(io.activation, hidden, rows * rank, active);
  drop_rows(io.drop, active, begin, rows, rank);
  T* y = io.y + begin * outputs;
  const T* residual = io.residual ? io.residual + begin * outputs : nullptr;
  const Left<Acc> right{active, rank, rows};
  const auto finish_y = [&](int64_t row, int64_t c, auto v, int64_t n) {
    if (io.bias_up) v += read(io.bias_up + c, n);
    if (residual) v = read(residual + row * outputs + c, n) + v;
    write(y + row * outputs + c, v, n);
  };
  if (io.few) {
    for_each_dot(right, io.up, rank, outputs, io.scale, active + rows * rank, finish_y);
  } else {
    for_each_sum<kWide>(right, io.up, rank, outputs, io.scale, finish_y);
  }
}

template <typename T, typename Acc>
void forward(const Forward<T, Acc>& io, int64_t begin, int64_t end, Acc* buffer) {
  for (int64_t row = begin; row < end; row += kTileRows) {
    forward_tile(io, row, min(end - row, kTileRows), buffer);
  }
}

}  // namespace peftkern::bottleneck::PEFTKERN_ISA
