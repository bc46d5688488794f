// Products with a packed factor, in registers until the very end.
#pragma once
#include "bottleneck/bottleneck.h"
#include "common/blocks.h"
#include "common/kernels.h"

namespace peftkern::bottleneck::PEFTKERN_ISA {
using namespace peftkern::PEFTKERN_ISA;

PEFTKERN_INLINE const SumKernels<float>& sums(float) {
  return peftkern::PEFTKERN_ISA::shared_kernels.sums_f32;
}
PEFTKERN_INLINE const SumKernels<double>& sums(double) {
  return peftkern::PEFTKERN_ISA::shared_kernels.sums_f64;
}

template <typename Acc>
void pack(const Packing<Acc>& io, int64_t begin, int64_t end, Acc* packed) {
  for (int64_t panel = begin; panel < end; ++panel) {
    const int64_t first = panel * io.width, count = min(io.columns - first, io.width);
    Acc* to = packed + panel * io.depth * io.width;
    for (int64_t j = 0; j < io.depth; ++j, to += io.width) {
      const Acc* from = io.from + j * io.row + first * io.column;
      for (int64_t c = 0; c < count; ++c) to[c] = from[c * io.column];
      for (int64_t c = count; c < io.width; ++c) to[c] = 0;
    }
  }
}

// The left operand of a product: rows of Acc, which may lie apart.
template <typename Acc>
struct Left {
  const Acc* x;
  int64_t row, rows;
};

// R rows and V vectors from column c of a panel on: calls finish(row, column, sum, lanes).
template <int R, int V, typename Acc, typename Finish>
PEFTKERN_INLINE void panel_block(const Left<Acc>& left, const Acc* panel, int64_t width,
                                 int64_t depth, int64_t row, int64_t column, int64_t columns,
                                 Acc scale, const Finish& finish) {
  constexpr int64_t kLanes = Vector<Acc>::lanes;
  typename Vector<Acc>::type sum[R][V] = {};
  for (int64_t j = 0; j < depth; j += kSumLength) {
    typename Vector<Acc>::type total[R][V] = {};
    add_products_of<R, V, true>(left.x + row * left.row + j, left.row, 1, panel + j * width, width,
                                min(depth - j, kSumLength), kLanes, total);
    PEFTKERN_UNROLL
    for (int r = 0; r < R; ++r) {
      PEFTKERN_UNROLL
      for (int v = 0; v < V; ++v) {
        const auto scaled = total[r][v] * scale;
        sum[r][v] = j ? sum[r][v] + scaled : scaled;
      }
    }
  }
  PEFTKERN_UNROLL
  for (int r = 0; r < R; ++r) {
    PEFTKERN_UNROLL
    for (int v = 0; v < V; ++v) {
      finish(row + r, column + v * kLanes, sum[r][v], min(columns - column - v * kLanes, kLanes));
    }
  }
}

template <int R, int V, typename Acc, typename Finish>
PEFTKERN_INLINE void panel_rows(const Left<Acc>& left, const Acc* panel, int64_t width,
                                int64_t depth, int64_t row, int64_t column, int64_t columns,
                                Acc scale, const Finish& finish) {
  for (; row + R <= left.rows; row += R) {
    panel_block<R, V>(left, panel, width, depth, row, column, columns, scale, finish);
  }
  if constexpr (R > 1) {
    if (row < left.rows) {
      panel_rows<R / 2, V>(left, panel, width, depth, row, column, columns, scale, finish);
    }
  }
}

// Calls finish(row, column, sum, lanes) for every piece of scale * x p; sums as in `product`
// (common/kernels.h), so to the same bits.
template <int64_t kWidth, typename Acc, typename Finish>
PEFTKERN_INLINE void for_each_sum(const Left<Acc>& left, const Acc* packed, int64_t depth,
                                  int64_t columns, Acc scale, const Finish& finish) {
  constexpr int64_t kLanes = Vector<Acc>::lanes;
  for (int64_t first = 0; first < columns; first += kWidth, packed += depth * kWidth) {
    const int64_t end = min(columns, first + kWidth);
    int64_t c = first;
    if constexpr (kVectors > 1) {
      for (; c + kLanes < end; c += 2 * kLanes) {
        panel_rows<kRegisters / 2, 2>(left, packed + c - first, kWidth, depth, 0, c, columns, scale,
                                      finish);
      }
    }
    for (; c < end; c += kLanes) {
      panel_rows<kRegisters, 1>(left, packed + c - first, kWidth, depth, 0, c, columns, scale,
                                finish);
    }
  }
}

// The same of few rows, for a factor [columns, depth] as it lies; `dots` holds [rows, columns].
template <typename Acc, typename Finish>
PEFTKERN_INLINE void for_each_dot(const Left<Acc>& left, const Acc* factor, int64_t depth,
                                  int64_t columns, Acc scale, Acc* dots, const Finish& finish) {
  constexpr int64_t kLanes = Vector<Acc>::lanes;
  sums(Acc{}).dots({left.x, left.row, factor, dots, columns, left.rows, columns, depth});
  for (int64_t row = 0; row < left.rows; ++row) {
    for (int64_t c = 0; c < columns; c += kLanes) {
      const int64_t n = min(columns - c, kLanes);
      finish(row, c, read(dots + row * columns + c, n) * scale, n);
    }
  }
}

}  // namespace peftkern::bottleneck::PEFTKERN_ISA
