// Products of two operands where a pattern asks for them.
#pragma once
#include "sparse/entries.h"
#include "sparse/window.h"

namespace peftkern::sparse::PEFTKERN_ISA {

// values[r] = scale * sum_m grad[m] x[columns[r], m] of R entries, or on top of them.
template <int R, typename A, typename Column>
PEFTKERN_INLINE void dots_of(const A* grad, const A* x, const Column* columns, int64_t length,
                             int64_t tokens, A scale, bool add, A* values) {
  typedef typename Vector<A>::type X;
  const A* at[R];
  X total[R]{};
  PEFTKERN_UNROLL
  for (int r = 0; r < R; ++r) at[r] = x + static_cast<int64_t>(columns[r]) * length;
  for (int64_t m = 0; m < tokens; m += Vector<A>::lanes) {
    const X by = whole(grad + m);
    PEFTKERN_UNROLL
    for (int r = 0; r < R; ++r) total[r] = fma(by, whole(at[r] + m), total[r]);
  }
  A sums[R];
  sums_of(total, sums);
  PEFTKERN_UNROLL
  for (int r = 0; r < R; ++r) values[r] = (add ? values[r] : A(0)) + scale * sums[r];
}

template <typename A, typename Column>
PEFTKERN_INLINE void dots(const A* grad, const A* x, const Column* columns, int64_t count,
                          int64_t length, int64_t tokens, A scale, bool add, A* values) {
  int64_t k = 0;
  for (; k + 8 <= count; k += 8) {
    dots_of<8>(grad, x, columns + k, length, tokens, scale, add, values + k);
  }
  if (count - k >= 4) {
    dots_of<4>(grad, x, columns + k, length, tokens, scale, add, values + k);
    k += 4;
  }
  if (count - k >= 2) {
    dots_of<2>(grad, x, columns + k, length, tokens, scale, add, values + k);
    k += 2;
  }
  if (k < count) dots_of<1>(grad, x, columns + k, length, tokens, scale, add, values + k);
}

// Rows of one block whose entries are at hand. X and G know how to fill a panel: matrices, or a
// convolution's window and its outputs.
template <typename X, typename G, typename A>
PEFTKERN_INLINE void sample_rows(const Pattern& pattern, const Block& block, const X& x,
                                 const G& grad, const Sampled<A>& io, const Room<A>& room) {
  const int64_t width = block.column_end - block.column_begin;
  bool add = io.add;
  int64_t token = 0;
  do {  // once without any token, for values that are zero then
    const int64_t tokens = min(room.length, io.tokens - token);
    fill(x, token, tokens, block.column_begin, width, room.length, room.panel);
    for (int64_t row = block.row_begin; row < block.row_end; row += kStrip) {
      const int64_t rows = min(kStrip, block.row_end - row);
      fill(grad, token, tokens, row, rows, room.length, room.strip);
      for (int64_t i = 0; i < rows; ++i) {
        const auto dot = [&](const auto* columns, int64_t base, int64_t count, int64_t first) {
          const A* panel = room.panel + (base - block.column_begin) * room.length;
          dots(room.strip + i * room.length, panel, columns, count, room.length, round_up(tokens),
               io.scale, add, io.values + first);
        };
        if (pattern.is_bitmap) {
          const uint32_t* at = room.listed + row + i - block.row_begin;
          const int64_t tile = (row + i) * tiles_of(pattern.columns) + block.column_begin / kTile;
          dot(room.list + at[0], block.column_begin, at[1] - at[0], position(pattern, tile));
        } else {
          with_entries(pattern, row + i, block.column_begin, block.column_end, room.places, dot);
        }
      }
    }
    add = true;
    token += room.length;
  } while (token < io.tokens);
}

template <typename X, typename G, typename A>
PEFTKERN_INLINE void sample(const Pattern& pattern, const Block& block, const X& x, const G& grad,
                            const Sampled<A>& io, const Room<A>& room) {
  for (int64_t row = block.row_begin; row < block.row_end;) {
    const int64_t end = pattern.is_bitmap ? list_rows(pattern, block, row, room) : block.row_end;
    sample_rows(pattern, {row, end, block.column_begin, block.column_end}, x, grad, io, room);
    row = end;
  }
}

template <typename T, typename A>
void sddmm(const Pattern& pattern, const Block& block, const Operand<T>& x, const Operand<T>& grad,
           const Sampled<A>& io, const Room<A>& room) {
  sample(pattern, block, x, grad, io, room);
}

template <typename T, typename A>
void conv2d_sddmm(const Pattern& pattern, const Block& block, const Window<T>& x,
                  const Images<T>& grad, const Sampled<A>& io, const Room<A>& room) {
  sample(pattern, block, x, grad, io, room);
}

// Where a product is dense: one operand of a panel; and what a pattern takes of the panel.
template <typename X, typename A>
void turned(const X& x, int64_t token, int64_t tokens, int64_t first, int64_t count, int64_t length,
            A* to) {
  fill(x, token, tokens, first, count, length, to);
}

template <typename A>
void collect(const Pattern& pattern, const Block& block, const A* panel, const Sampled<A>& io,
             uint32_t* places) {
  const int64_t width = block.column_end - block.column_begin;
  for (int64_t row = block.row_begin; row < block.row_end; ++row, panel += width) {
    with_entries(pattern, row, block.column_begin, block.column_end, places,
                 [&](const auto* columns, int64_t base, int64_t count, int64_t first) {
                   const A* from = panel + base - block.column_begin;
                   A* to = io.values + first;
                   for (int64_t k = 0; k < count; ++k) {
                     to[k] = (io.add ? to[k] : A(0)) + io.scale * from[columns[k]];
                   }
                 });
  }
}

}  // namespace peftkern::sparse::PEFTKERN_ISA
