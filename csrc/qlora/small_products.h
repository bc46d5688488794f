// The low-rank term's products over whole matrices, tile by tile; part of the binding.
#pragma once
#include "qlora/problem.h"

namespace peftkern::qlora {

inline constexpr int64_t kTileRows = 64, kTileColumns = 256;

// Calls f(kernels, typed null pointer) of the sums' dtype.
template <typename Function>
void with_sums(ScalarType sums, const Function& f) {
  if (sums == ScalarType::Double) return f(kernels().sums_f64, static_cast<double*>(nullptr));
  f(kernels().sums_f32, static_cast<float*>(nullptr));
}

// out = scale * x p, or on top of it. All of the sums' dtype; x may be transposed.
inline void product(const Matrix& out, const Matrix& x, const Matrix& p, double scale, bool add) {
  with_sums(out.dtype, [&](const auto& typed, auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    typed.product({static_cast<const T*>(x.at(0, 0)), x.row_stride, x.column_stride,
                   static_cast<const T*>(p.at(0, 0)), p.row_stride, static_cast<T*>(out.at(0, 0)),
                   out.row_stride, x.rows, x.columns, p.columns, static_cast<T>(scale), add});
  });
}

// out = x a^T, all of the sums' dtype.
inline void dots(const Matrix& out, const Matrix& x, const Matrix& a) {
  with_sums(out.dtype, [&](const auto& typed, auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    typed.dots({static_cast<const T*>(x.at(0, 0)), x.row_stride, static_cast<const T*>(a.at(0, 0)),
                static_cast<T*>(out.at(0, 0)), out.row_stride, x.rows, a.rows, x.columns});
  });
}

// Calls f(tile of `from` in the sums' dtype, its first row) for rows [begin, end), in parallel.
template <typename Function>
void for_row_tiles(const Problem& p, const Matrix& from, int64_t begin, int64_t end, bool drop,
                   const Function& f) {
  const int64_t rows = std::min(kTileRows, std::max<int64_t>(1, (end - begin + 1) / 2));
  parallel((end - begin + rows - 1) / rows, rows * from.columns * p.rank,
           [&](int64_t i, int64_t n) {
             for (; i < n; ++i) {
               Scratch scratch;
               const int64_t first = begin + i * rows, last = std::min(first + rows, end);
               f(p.tile(from, first, last, 0, from.columns, drop, scratch), first);
             }
           });
}

// Calls f(tile, its first row, its first column) for rows [begin, end), in order of the rows for
// each column; columns in parallel.
template <typename Function>
void for_column_tiles(const Problem& p, const Matrix& from, int64_t begin, int64_t end, bool drop,
                      const Function& f) {
  const int64_t tiles = (from.columns + kTileColumns - 1) / kTileColumns;
  parallel(tiles, (end - begin) * kTileColumns * std::max<int64_t>(p.rank, 1),
           [&](int64_t i, int64_t n) {
             for (; i < n; ++i) {
               const int64_t column = i * kTileColumns;
               const int64_t stop = std::min(column + kTileColumns, from.columns);
               for (int64_t row = begin; row < end; row += kTileRows) {
                 Scratch scratch;
                 f(p.tile(from, row, std::min(row + kTileRows, end), column, stop, drop, scratch),
                   row, column);
               }
             }
           });
}

}  // namespace peftkern::qlora
