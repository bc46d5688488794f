// bottleneck's kernels on values that can be checked by eye, on every instruction set.
#include <cmath>
#include <vector>

#include "bottleneck/bottleneck.h"
#include "common/kernels.h"
#include "common/testing.h"

namespace {
using namespace peftkern;
using namespace peftkern::bottleneck;

std::vector<float> packed(const std::vector<float>& from, int64_t row, int64_t column,
                          int64_t depth, int64_t columns, int64_t width) {
  std::vector<float> to(static_cast<size_t>(packed_size(depth, columns, width)), NAN);
  kernels().pack_f32.pack({from.data(), row, column, depth, columns, width}, 0,
                          panels_of(columns, width), to.data());
  return to;
}

// An adapter, its operands and its results, without biases and norm.
struct Adapter {
  int64_t rows, inputs, rank, outputs;
  std::vector<float> x, down, up, hidden, y, packed_down, packed_up;
  Forward<float, float> io{};

  Adapter(int64_t rows, int64_t inputs, int64_t rank, int64_t outputs)
      : rows(rows),
        inputs(inputs),
        rank(rank),
        outputs(outputs),
        x(numbers(rows * inputs, 2)),
        down(numbers(rank * inputs, 3)),
        up(numbers(outputs * rank, 4)),
        hidden(static_cast<size_t>(rows * rank), NAN),
        y(static_cast<size_t>(rows * outputs), NAN) {
    io.x = x.data();
    io.hidden = hidden.data();
    io.y = y.data();
    io.inputs = inputs;
    io.rank = rank;
    io.outputs = outputs;
    io.scale = 2;
    io.activation = Activation::relu;
  }

  void run(bool few, int64_t step) {
    packed_down = few ? down : packed(down, 1, inputs, inputs, rank, kNarrow);
    packed_up = few ? up : packed(up, 1, rank, rank, outputs, kWide);
    io.down = packed_down.data();
    io.up = packed_up.data();
    io.few = few;
    std::vector<float> buffer(static_cast<size_t>(forward_buffer(inputs, rank, outputs, few)), NAN);
    for (int64_t row = 0; row < rows; row += step) {
      kernels().f32.forward(io, row, row + step < rows ? row + step : rows, buffer.data());
    }
  }
};

void a_factor_is_packed_in_panels_with_zeros_at_the_end() {
  const std::vector<float> to = packed({1, 2, 3, 4, 5, 6}, 3, 1, 2, 3, 2);
  const std::vector<float> wanted{1, 2, 4, 5, 3, 0, 6, 0};
  EXPECT(to == wanted);
  EXPECT(packed({1, 4, 2, 5, 3, 6}, 1, 2, 2, 3, 2) == wanted);
}

void y_is_the_branch(bool few) {
  for (int64_t rank : {1, 9, 32, 70}) {
    Adapter a(61, 37, rank, 83);
    a.io.residual = a.y.data();  // in place: what is read of it is read before it is written
    a.y.assign(a.y.size(), 3);
    a.run(few, 61);
    for (int64_t m = 0; m < a.rows; ++m) {
      std::vector<double> active;
      for (int64_t j = 0; j < rank; ++j) {
        double h = 0;
        for (int64_t k = 0; k < a.inputs; ++k) {
          h += double{a.x[m * a.inputs + k]} * a.down[j * a.inputs + k];
        }
        EXPECT(std::fabs(a.hidden[m * rank + j] - h) < 1e-5);
        active.push_back(h > 0 ? h : 0);
      }
      for (int64_t n = 0; n < a.outputs; ++n) {
        double sum = 0;
        for (int64_t j = 0; j < rank; ++j) sum += active[j] * a.up[n * rank + j];
        EXPECT(std::fabs(a.y[m * a.outputs + n] - (3 + 2 * sum)) < 1e-4);
      }
    }
  }
}

void y_is_the_branch_of_few_rows_and_of_many() {
  y_is_the_branch(true);
  y_is_the_branch(false);
}

void any_split_of_the_rows_gives_the_same_bits() {
  for (bool few : {false, true}) {
    Adapter whole(100, 300, 33, 70), parts(100, 300, 33, 70);
    whole.run(few, 100);
    parts.run(few, 7);
    EXPECT(whole.y == parts.y && whole.hidden == parts.hidden);
  }
}

void the_products_are_the_shared_ones_to_the_bit() {
  Adapter a(64, 700, 24, 10);
  a.run(false, 64);
  std::vector<float> across(a.down.size()), hidden(a.hidden.size());
  for (int64_t j = 0; j < a.rank; ++j) {
    for (int64_t k = 0; k < a.inputs; ++k) across[k * a.rank + j] = a.down[j * a.inputs + k];
  }
  shared_kernels().sums_f32.product({a.x.data(), a.inputs, 1, across.data(), a.rank, hidden.data(),
                                     a.rank, a.rows, a.inputs, a.rank, 1, false});
  EXPECT(hidden == a.hidden);
}

// The worked example: x = [1, -2], down = 1, up = [[1, 2], [3, 4]], scale 2, onto x, g = [1, 1].
void the_gradient_by_hand() {
  const std::vector<float> x{1, -2}, hidden{1, -2}, grad{1, 1}, eye{1, 0, 0, 1}, up{1, 2, 3, 4};
  const std::vector<float> up_packed = packed(up, 2, 1, 2, 2, kNarrow),
                           down_packed = packed(eye, 2, 1, 2, 2, kWide);
  std::vector<float> grad_x(2), grad_down(4), grad_up(4), bias_down(2), bias_up(2);
  float reached = 0;
  Backward<float, float> io{};
  io.grad = grad.data();
  io.x = x.data();
  io.hidden = hidden.data();
  io.up = up_packed.data();
  io.down = down_packed.data();
  io.grad_x = grad_x.data();
  io.grad_down = grad_down.data();
  io.grad_up = grad_up.data();
  io.grad_bias_down = bias_down.data();
  io.grad_bias_up = bias_up.data();
  io.reached = &reached;
  io.inputs = io.rank = io.outputs = 2;
  io.scale = 2;
  io.activation = Activation::relu;
  io.onto_x = true;
  std::vector<float> buffer(static_cast<size_t>(backward_buffer(2, 2, 2)), NAN);
  kernels().f32.backward(io, 0, 1, buffer.data());
  EXPECT((grad_x == std::vector<float>{9, 1}));
  EXPECT((grad_down == std::vector<float>{8, -16, 0, 0}));
  EXPECT((grad_up == std::vector<float>{1, 1, 0, 0}));  // transposed, and without the scale
  EXPECT((bias_down == std::vector<float>{8, 0}));
  EXPECT((bias_up == std::vector<float>{1, 1}));
  EXPECT(reached == 4);
}

}  // namespace

int main() {
  for (int isa = 0; isa <= static_cast<int>(best_isa()); ++isa) {
    current_isa() = static_cast<Isa>(isa);
    std::printf("%s\n", kIsaNames[isa]);
    RUN(a_factor_is_packed_in_panels_with_zeros_at_the_end);
    RUN(y_is_the_branch_of_few_rows_and_of_many);
    RUN(any_split_of_the_rows_gives_the_same_bits);
    RUN(the_products_are_the_shared_ones_to_the_bit);
    RUN(the_gradient_by_hand);
  }
}
