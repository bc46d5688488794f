// Products with S, and with its transpose.
#pragma once
#include "sparse/entries.h"
#include "sparse/turned.h"

namespace peftkern::sparse::PEFTKERN_ISA {

template <typename A>
inline constexpr int64_t kBroad = Vector<A>::lanes == 1 ? 4 : 8;  // vectors of tokens in registers

// to[m] += scale * sum_k values[k] x[columns[k], m] for V vectors of tokens.
template <int V, typename A, typename Column>
PEFTKERN_INLINE void add_columns(const A* x, const Column* columns, const A* values, int64_t count,
                                 int64_t length, A scale, A* to) {
  typedef typename Vector<A>::type X;
  constexpr int64_t kStep = Vector<A>::lanes;
  X total[V]{};
  for (int64_t k = 0; k < count; ++k) {
    const A* at = x + static_cast<int64_t>(columns[k]) * length;
    const X by = splat(values[k]);
    PEFTKERN_UNROLL
    for (int v = 0; v < V; ++v) total[v] = fma(by, whole(at + v * kStep), total[v]);
  }
  const X factor = splat(scale);
  PEFTKERN_UNROLL
  for (int v = 0; v < V; ++v) put(to + v * kStep, whole(to + v * kStep) + factor * total[v]);
}

// out[m, c] = residual[m, c] + turned[c, m] of `tokens` and `columns`; both [tokens, width] at
// their first element.
template <typename T, typename A>
PEFTKERN_INLINE void finish_any(const A* turned, int64_t length, int64_t tokens, int64_t columns,
                                const T* residual, int64_t width, T* out) {
  for (int64_t m = 0; m < tokens; ++m) {
    for (int64_t c = 0; c < columns; ++c) {
      const A beside = residual ? widen_one(residual[m * width + c]) : A(0);
      narrow_one(beside + turned[c * length + m], out + m * width + c);
    }
  }
}

template <typename T>
inline void finish(const float* turned, int64_t length, int64_t tokens, int64_t columns,
                   const T* residual, int64_t width, T* out) {
  for (int64_t m = 0; m < tokens; m += W) {
    for (int64_t c = 0; c < columns; c += W) {
      const int64_t n = min(W, columns - c);
      F v[W];
      for (int64_t i = 0; i < W; ++i) v[i] = i < n ? load(turned + (c + i) * length + m) : F{};
      transpose(v);
      for (int64_t i = 0; i < min(W, tokens - m); ++i) {
        const int64_t at = (m + i) * width + c;
        write(out + at, residual ? read(residual + at, n) + v[i] : v[i], n);
      }
    }
  }
}
inline void finish(const double* turned, int64_t length, int64_t tokens, int64_t columns,
                   const double* residual, int64_t width, double* out) {
  finish_any(turned, length, tokens, columns, residual, width, out);
}

template <typename T, typename A>
void matmul(const Pattern& pattern, const Block& block, const Operand<T>& x, const Beside<T, A>& io,
            int64_t begin, int64_t end, const Room<A>& room) {
  for (int64_t token = begin; token < end; token += room.length) {
    const int64_t tokens = min(room.length, end - token), lanes = round_up(tokens);
    fill(x, token, tokens, 0, pattern.columns, room.length, room.panel);
    for (int64_t row = block.row_begin; row < block.row_end; row += kStrip) {
      const int64_t rows = min(kStrip, block.row_end - row);
      for (int64_t i = 0; i < rows; ++i) {
        A* to = room.strip + i * room.length;
        for (int64_t m = 0; m < lanes; ++m) to[m] = 0;
        const auto add = [&](const auto* columns, int64_t, int64_t count, int64_t first) {
          constexpr int64_t kStep = kBroad<A> * Vector<A>::lanes;
          for (int64_t k = 0; k < count; k += kSumLength) {
            const int64_t some = min(kSumLength, count - k);
            const A* values = io.values + first + k;
            int64_t m = 0;
            for (; m + kStep <= lanes; m += kStep) {
              add_columns<kBroad<A>>(room.panel + m, columns + k, values, some, room.length,
                                     io.scale, to + m);
            }
            for (; m < lanes; m += Vector<A>::lanes) {
              add_columns<1>(room.panel + m, columns + k, values, some, room.length, io.scale,
                             to + m);
            }
          }
        };
        with_entries(pattern, row + i, 0, pattern.columns, room.places, add);
      }
      const int64_t at = token * pattern.rows + row;
      finish(room.strip, room.length, tokens, rows, io.residual ? io.residual + at : nullptr,
             pattern.rows, io.out + at);
    }
  }
}

template <typename T, typename A>
void matmul_t(const Pattern& pattern, const Block& block, const Operand<T>& grad,
              const Beside<T, A>& io, int64_t begin, int64_t end, const Room<A>& room) {
  typedef typename Vector<A>::type X;
  const int64_t width = block.column_end - block.column_begin;
  for (int64_t token = begin; token < end; token += room.length) {
    const int64_t tokens = min(room.length, end - token), lanes = round_up(tokens);
    for (int64_t i = 0; i < width * room.length; ++i) room.panel[i] = 0;
    for (int64_t row = 0; row < pattern.rows; row += kStrip) {
      const int64_t rows = min(kStrip, pattern.rows - row);
      fill(grad, token, tokens, row, rows, room.length, room.strip);
      for (int64_t i = 0; i < rows; ++i) {
        const A* from = room.strip + i * room.length;
        const auto add = [&](const auto* columns, int64_t base, int64_t count, int64_t first) {
          for (int64_t k = 0; k < count; ++k) {
            const int64_t c = base + static_cast<int64_t>(columns[k]) - block.column_begin;
            const X by = splat(io.scale * io.values[first + k]);
            A* to = room.panel + c * room.length;
            for (int64_t m = 0; m < lanes; m += Vector<A>::lanes) {
              put(to + m, fma(by, whole(from + m), whole(to + m)));
            }
          }
        };
        with_entries(pattern, row + i, block.column_begin, block.column_end, room.places, add);
      }
    }
    const int64_t at = token * pattern.columns + block.column_begin;
    finish(room.panel, room.length, tokens, width, io.residual ? io.residual + at : nullptr,
           pattern.columns, io.out + at);
  }
}

}  // namespace peftkern::sparse::PEFTKERN_ISA
