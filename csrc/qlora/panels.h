// A product with the decoded weight, a panel at a time; part of the binding.
#pragma once
#include "qlora/problem.h"

namespace peftkern::qlora {

// to = from W^T where rows of W are cut, from W where columns are; on top of what
// start(begin, end, out) has put into columns [begin, end) of `to`, where it says that it has. Each
// element of `to` is rounded once.
template <typename Start>
void by_panels(const Problem& p, int64_t expert, Side side, const Matrix& from, const Matrix& to,
               const Start& start) {
  Scratch scratch;
  const Matrix left = as_dtype(from, p.product, scratch);
  const int64_t width = p.base.panel_width(side, p.product);
  const bool direct = to.dtype == p.product;
  void* buffer = direct ? nullptr : scratch.take_bytes(to.rows * width * size_of(p.product));
  for (int64_t begin = 0; begin < to.columns; begin += width) {
    const int64_t end = std::min(begin + width, to.columns);
    const Matrix target = to.part(0, to.rows, begin, end);
    const Matrix out = direct ? target : Matrix::dense(buffer, p.product, to.rows, end - begin);
    const bool started = start(begin, end, out);
    Scratch piece;
    multiply(out, left, p.base.panel(expert, side, begin, end, p.product, piece), started ? 1 : 0);
    if (!direct) convert(out, target);
  }
}

}  // namespace peftkern::qlora
