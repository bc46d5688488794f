// The backward pass, a tile of rows at a time: grad is read once, and x once where a gradient needs
// it.
#pragma once
#include "bottleneck/activations.h"
#include "bottleneck/panels.h"
#include "bottleneck/rows.h"

namespace peftkern::bottleneck::PEFTKERN_ISA {

// to += left^T right, of `rows` rows.
template <typename Acc>
void add_outer(const Acc* left, int64_t width, const Acc* right, int64_t columns, int64_t rows,
               Acc* to) {
  sums(Acc{}).product({left, 1, width, right, columns, to, columns, width, rows, columns, 1, true});
}

// to[c] += the sum over the rows of f(place of row and c, lanes): a tile's is made apart, since the
// error of a sum grows with its length.
template <typename Acc, typename Function>
PEFTKERN_INLINE void add_by_column(int64_t rows, int64_t columns, Acc* to, const Function& f) {
  for (int64_t c = 0; c < columns; c += Vector<Acc>::lanes) {
    const int64_t n = min(columns - c, Vector<Acc>::lanes);
    typename Vector<Acc>::type total{};
    for (int64_t row = 0; row < rows; ++row) total += f(row * columns + c, n);
    write(to + c, read(to + c, n) + total, n);
  }
}

template <typename Acc>
void add_rows(const Acc* from, int64_t rows, int64_t columns, Acc* to) {
  add_by_column(rows, columns, to, [&](int64_t i, int64_t n) { return read(from + i, n); });
}

template <typename Acc>
void add_products_by_column(const Acc* a, const Acc* b, int64_t rows, int64_t columns, Acc* to) {
  add_by_column(rows, columns, to,
                [&](int64_t i, int64_t n) { return read(a + i, n) * read(b + i, n); });
}

// One tile's parts of the caller's buffer.
template <typename Acc>
struct Buffers {
  Acc *z, *centred, *grad_z, *inverse, *grad, *active, *reached;

  template <typename T>
  Buffers(const Backward<T, Acc>& io, Acc* at)
      : z(at),
        centred(z + kTileRows * io.inputs),
        grad_z(centred + kTileRows * io.inputs),
        inverse(grad_z + kTileRows * io.inputs),
        grad(inverse + kTileRows),
        active(grad + kTileRows * io.outputs),
        reached(active + kTileRows * io.rank) {}
};

// z as the forward had it; with a norm, x centred and 1 / deviation of each row too.
template <typename T, typename Acc>
const Acc* z_of(const Backward<T, Acc>& io, const T* x, int64_t rows, const Buffers<Acc>& at) {
  const Acc* from = as_sums(x, rows * io.inputs, at.z);
  if (!io.norm.there) return from;
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t first = row * io.inputs;
    at.inverse[row] = centre(from + first, io.inputs, io.norm.eps, at.centred + first);
    stretch(io.norm, at.centred + first, io.inputs, at.z + first);
  }
  return at.z;
}

// From grad_z to grad_x through the norm, in place; both means are over the row.
template <typename Acc>
void through_norm(const Norm<Acc>& norm, const Acc* centred, Acc inverse, int64_t count,
                  Acc* grad) {
  const Norm<Acc> scaling{norm.weight, nullptr, 0, true};
  stretch(scaling, grad, count, grad);
  const Acc length = static_cast<Acc>(count);
  const auto mean_of = [&](bool along) {
    return sum_of<Acc>(count,
                       [&](int64_t i, int64_t n) {
                         const auto g = read(grad + i, n);
                         return along ? g * read(centred + i, n) : g;
                       }) /
           length;
  };
  const Acc mean = mean_of(false), along = mean_of(true);
  for (int64_t i = 0; i < count; i += Vector<Acc>::lanes) {
    const int64_t n = min(count - i, Vector<Acc>::lanes);
    write(grad + i, (read(grad + i, n) - mean - along * read(centred + i, n)) * inverse, n);
  }
}

template <typename T, typename Acc>
void grad_x_tile(const Backward<T, Acc>& io, const Acc* grad_hidden, int64_t begin, int64_t rows,
                 const Buffers<Acc>& at) {
  const int64_t inputs = io.inputs;
  const Left<Acc> left{grad_hidden, io.rank, rows};
  const T* onto = io.onto_x ? io.grad + begin * inputs : nullptr;
  T* to = io.grad_x ? io.grad_x + begin * inputs : nullptr;
  const auto finish = [&](int64_t row, int64_t c, auto v, int64_t n) {
    if (onto) v = read(onto + row * inputs + c, n) + v;
    write(to + row * inputs + c, v, n);
  };
  if (!io.norm.there) {
    return for_each_sum<kWide>(left, io.down, io.rank, inputs, Acc(1), finish);
  }
  for_each_sum<kWide>(left, io.down, io.rank, inputs, Acc(1),
                      [&](int64_t row, int64_t c, auto v, int64_t n) {
                        write(at.grad_z + row * inputs + c, v, n);
                      });
  if (io.grad_norm_weight) {
    add_products_by_column(at.grad_z, at.centred, rows, inputs, io.grad_norm_weight);
  }
  if (io.grad_norm_bias) add_rows(at.grad_z, rows, inputs, io.grad_norm_bias);
  if (!to) return;
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t first = row * inputs;
    through_norm(io.norm, at.centred + first, at.inverse[row], inputs, at.grad_z + first);
    for (int64_t c = 0; c < inputs; c += Vector<Acc>::lanes) {
      const int64_t n = min(inputs - c, Vector<Acc>::lanes);
      finish(row, c, read(at.grad_z + first + c, n), n);
    }
  }
}

template <typename T, typename Acc>
void backward_tile(const Backward<T, Acc>& io, int64_t begin, int64_t rows, Acc* buffer) {
  const int64_t inputs = io.inputs, rank = io.rank, outputs = io.outputs;
  const Buffers<Acc> at(io, buffer);
  const Acc* grad = as_sums(io.grad + begin * outputs, rows * outputs, at.grad);
  const Acc* hidden = io.hidden + begin * rank;
  for_each_sum<kNarrow>(
      Left<Acc>{grad, outputs, rows}, io.up, outputs, rank, Acc(1),
      [&](int64_t row, int64_t c, auto v, int64_t n) { write(at.reached + row * rank + c, v, n); });
  if (io.grad_up || io.reached) {
    activate(io.activation, hidden, rows * rank, at.active);
    drop_rows(io.drop, at.active, begin, rows, rank);
  }
  if (io.grad_up) add_outer(at.active, rank, grad, outputs, rows, io.grad_up);
  if (io.reached) {
    double total = 0;  // of one number, the error of a long sum would show
    for (int64_t row = 0; row < rows; ++row) {
      const Acc *t = at.reached + row * rank, *a = at.active + row * rank;
      total +=
          sum_of<Acc>(rank, [&](int64_t i, int64_t n) { return read(t + i, n) * read(a + i, n); });
    }
    *io.reached += static_cast<Acc>(total);
  }
  if (io.grad_bias_up) add_rows(grad, rows, outputs, io.grad_bias_up);
  drop_rows(io.drop, at.reached, begin, rows, rank);
  multiply_by_slope(io.activation, hidden, rows * rank, io.scale, at.reached);
  const Acc* grad_hidden = at.reached;
  if (io.grad_bias_down) add_rows(grad_hidden, rows, rank, io.grad_bias_down);
  const bool further = io.grad_x || io.grad_norm_weight || io.grad_norm_bias;
  if (io.grad_down || (io.norm.there && further)) {
    const Acc* z = z_of(io, io.x + begin * inputs, rows, at);
    if (io.grad_down) add_outer(grad_hidden, rank, z, inputs, rows, io.grad_down);
  }
  if (further) grad_x_tile(io, grad_hidden, begin, rows, at);
}

template <typename T, typename Acc>
void backward(const Backward<T, Acc>& io, int64_t begin, int64_t end, Acc* buffer) {
  for (int64_t row = begin; row < end; row += kTileRows) {
    backward_tile(io, row, min(end - row, kTileRows), buffer);
  }
}

}  // namespace peftkern::bottleneck::PEFTKERN_ISA
