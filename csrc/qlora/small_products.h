// The low-rank term's products over whole matrices, tile by tile; part of the binding.
#pragma once
#include "common/products.h"
#include "qlora/problem.h"

namespace peftkern::qlora {

inline constexpr int64_t kTileRows = 64, kTileColumns = 256;

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
