// A product with the decoded weight, a panel at a time; part of the binding.
#pragma once
#include "qlora/problem.h"

namespace peftkern::qlora {

// One product of a sum of products.
struct Term {
  const Problem& p;
  int64_t expert;
  Matrix from;
};

// to = sum of from W^T over the terms where rows of W are cut, of from W where columns are; on top
// of what start(begin, end, out) has put into columns [begin, end) of `to`, where it says that it
// has. Terms agree in the product's dtype; each element of `to` is rounded to its own once.
template <typename Start>
void by_panels(const std::vector<Term>& terms, Side side, const Matrix& to, const Start& start) {
  Scratch scratch;
  const ScalarType product = terms[0].p.product;
  std::vector<Matrix> left;
  int64_t width = to.columns;
  for (const Term& term : terms) {
    left.push_back(as_dtype(term.from, product, scratch));
    width = std::min(width, term.p.base.panel_width(side, product));
  }
  const bool direct = to.dtype == product;
  void* buffer = direct ? nullptr : scratch.take_bytes(to.rows * width * size_of(product));
  for (int64_t begin = 0; begin < to.columns; begin += width) {
    const int64_t end = std::min(begin + width, to.columns);
    const Matrix target = to.part(0, to.rows, begin, end);
    const Matrix out = direct ? target : Matrix::dense(buffer, product, to.rows, end - begin);
    bool started = start(begin, end, out);
    for (size_t i = 0; i < terms.size(); ++i) {
      Scratch piece;
      const Base& base = terms[i].p.base;
      const Matrix panel = base.panel(terms[i].expert, side, begin, end, product, piece);
      multiply(out, left[i], panel, started ? 1 : 0);
      started = true;
    }
    if (!direct) convert(out, target);
  }
}

}  // namespace peftkern::qlora
