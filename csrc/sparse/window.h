// A convolution's operands, filled in as its outputs see them: the unfolded input is never whole.
#pragma once
#include "sparse/turned.h"

namespace peftkern::sparse::PEFTKERN_ISA {

// Calls f(first of them, how many, image, row, column) for tokens of one row of an image at a time.
template <typename Function>
PEFTKERN_INLINE void for_each_run(int64_t token, int64_t tokens, int64_t height, int64_t width,
                                  const Function& f) {
  int64_t column = token % width, row = token / width % height, image = token / width / height;
  for (int64_t m = 0; m < tokens;) {
    const int64_t count = min(width - column, tokens - m);
    f(m, count, image, row, column);
    m += count;
    column = 0;
    if (++row == height) {
      row = 0;
      ++image;
    }
  }
}

template <typename T, typename A>
PEFTKERN_INLINE void copy(const T* from, int64_t stride, int64_t count, A* to) {
  for (int64_t i = 0; i < count; ++i) to[i] = widen_one(from[i * stride]);
}
template <typename T>
PEFTKERN_INLINE void copy(const T* from, int64_t stride, int64_t count, float* to) {
  if (stride != 1) {
    for (int64_t i = 0; i < count; ++i) to[i] = widen_one(from[i * stride]);
    return;
  }
  int64_t i = 0;
  for (; i + W <= count; i += W) store(to + i, load(from + i));
  if (i < count) write(to + i, read(from + i, count - i), count - i);
}

template <typename T, typename A>
inline void fill(const Images<T>& grad, int64_t token, int64_t tokens, int64_t row, int64_t rows,
                 int64_t length, A* to) {
  for (int64_t i = 0; i < rows; ++i, to += length) {
    const T* plane = grad.data + (row + i) * grad.channel_stride;
    for_each_run(
        token, tokens, grad.out_height, grad.out_width,
        [&](int64_t m, int64_t count, int64_t image, int64_t p, int64_t q) {
          copy(plane + image * grad.image_stride + p * grad.row_stride + q * grad.column_stride,
               grad.column_stride, count, to + m);
        });
    for (int64_t m = tokens; m < round_up(tokens); ++m) to[m] = 0;
  }
}

// The outputs of [begin, end) at which a tap lies inside of an axis: place = output * step +
// offset.
PEFTKERN_INLINE void clip(int64_t step, int64_t offset, int64_t size, int64_t& begin,
                          int64_t& end) {
  if (offset < 0) begin = max(begin, (-offset + step - 1) / step);
  end = size > offset ? min(end, (size - 1 - offset) / step + 1) : begin;
  end = max(begin, end);
}

template <typename T, typename A>
inline void fill(const Window<T>& x, int64_t token, int64_t tokens, int64_t column, int64_t columns,
                 int64_t length, A* to) {
  const int64_t taps = x.kernel_height * x.kernel_width;
  for (int64_t j = column; j < column + columns; ++j, to += length) {
    const int64_t channel = j / taps, r = j % taps / x.kernel_width, s = j % x.kernel_width;
    const int64_t off_row = r * x.down - x.above, off_column = s * x.right - x.left;
    const T* plane = x.data + channel * x.channel_stride;
    for_each_run(token, tokens, x.out_height, x.out_width,
                 [&](int64_t m, int64_t count, int64_t image, int64_t p, int64_t q) {
                   const int64_t row = p * x.step_down + off_row;
                   int64_t begin = q, end = q + count;
                   clip(x.step_right, off_column, x.width, begin, end);
                   if (row < 0 || row >= x.height) begin = end;
                   begin = min(begin, q + count), end = min(end, q + count);
                   for (int64_t i = q; i < begin; ++i) to[m + i - q] = 0;
                   if (begin < end) {
                     copy(plane + image * x.image_stride + row * x.row_stride +
                              (begin * x.step_right + off_column) * x.column_stride,
                          x.step_right * x.column_stride, end - begin, to + m + begin - q);
                   }
                   for (int64_t i = end; i < q + count; ++i) to[m + i - q] = 0;
                 });
    for (int64_t m = tokens; m < round_up(tokens); ++m) to[m] = 0;
  }
}

}  // namespace peftkern::sparse::PEFTKERN_ISA
