// The binding of the adapter: bottleneck's passes on two weights that are quantised into scratch.
#include "bottleneck/problem.h"
#include "onebit/latents.h"

namespace peftkern::onebit {
namespace {

using bottleneck::Gradients;
using bottleneck::Options;
using bottleneck::Problem;

class Pair {
 public:
  Pair(const Tensor& down, const Tensor& up, const Tensor& statistics, int64_t bits)
      : down_(matrix_of(down, "down")),
        up_(matrix_of(up, "up")),
        latents_({down_, up_}, statistics, bits) {}

  Problem problem(const Tensor& x, double scale, int64_t activation, const MaybeTensor& residual,
                  bool onto_x, double dropout, const MaybeTensor& seed, Scratch& scratch) const {
    const Matrix down = room(down_, down_.dtype, scratch), up = room(up_, up_.dtype, scratch);
    latents_.quantize({down.data, up.data});
    const MaybeTensor none;
    const Options options{none,     none,   none, scale, activation,
                          residual, onto_x, none, none,  std::nullopt};
    return bottleneck::problem_of(x, down, up, options, Dropout(dropout, seed));
  }

  // Room for the gradients of the two quantised, in the type of the latents' sums; and from these
  // on to the latents'.
  Matrix grad_down(Scratch& scratch) const { return room(down_, sums_of(down_.dtype), scratch); }
  Matrix grad_up(Scratch& scratch) const { return room(up_, sums_of(up_.dtype), scratch); }
  void slope(const Gradients& grads, void* down, void* up) const {
    latents_.slope({grads.down.data, grads.up.data}, {down, up});
  }

 private:
  static Matrix room(const Matrix& like, ScalarType dtype, Scratch& scratch) {
    void* memory = scratch.take_bytes(like.rows * like.columns * size_of(dtype));
    return Matrix::dense(memory, dtype, like.rows, like.columns);
  }

  Matrix down_, up_;
  Latents latents_;
};

std::tuple<Tensor, Tensor> adapter(const Tensor& x, const Tensor& down, const Tensor& up,
                                   const Tensor& statistics, int64_t bits, double scale,
                                   int64_t activation, const MaybeTensor& residual, bool onto_x,
                                   double dropout, const MaybeTensor& seed) {
  const Pair pair(down, up, statistics, bits);
  Scratch scratch;
  const Problem p = pair.problem(x, scale, activation, residual, onto_x, dropout, seed, scratch);
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  shape.back() = p.up.rows;
  Tensor y = empty(shape, x.scalar_type());
  Tensor hidden = empty({p.x.rows, p.down.rows}, p.sums());
  bottleneck::forward(p, Matrix::of(hidden, p.x.rows, p.down.rows),
                      Matrix::of(y, p.x.rows, p.up.rows));
  return {y, hidden};
}

// `needs` and the result: x, down, up; only what is needed is returned.
std::vector<Tensor> adapter_bwd(const Tensor& grad, const Tensor& x, const Tensor& hidden,
                                const Tensor& down, const Tensor& up, const Tensor& statistics,
                                int64_t bits, double scale, int64_t activation, bool onto_x,
                                double dropout, const MaybeTensor& seed, std::vector<bool> needs) {
  STD_TORCH_CHECK(needs.size() == 3, "needs must have 3 elements, got ", needs.size());
  const Pair pair(down, up, statistics, bits);
  Scratch scratch;
  const MaybeTensor no_residual;
  const Problem p = pair.problem(x, scale, activation, no_residual, onto_x, dropout, seed, scratch);
  const int64_t rows = p.x.rows;
  check_count(grad, "grad", rows * p.up.rows);
  check_dtype(grad, "grad", p.x.dtype);
  check_count(hidden, "hidden", rows * p.down.rows);
  check_dtype(hidden, "hidden", p.sums());
  std::vector<Tensor> out;
  const auto gradient = [&](size_t i, const Tensor& of) -> void* {
    if (!needs[i]) return nullptr;
    out.push_back(empty_as(of));
    return out.back().mutable_data_ptr();
  };
  Gradients wanted;
  if (void* to = gradient(0, x)) wanted.x = Matrix::dense(to, p.x.dtype, rows, p.x.columns);
  void* const to_down = gradient(1, down);
  void* const to_up = gradient(2, up);
  if (to_down) wanted.down = pair.grad_down(scratch);
  if (to_up) wanted.up = pair.grad_up(scratch);
  bottleneck::backward(p, Matrix::of(grad, rows, p.up.rows), Matrix::of(hidden, rows, p.down.rows),
                       wanted);
  pair.slope(wanted, to_down, to_up);
  return out;
}

}  // namespace

PEFTKERN_OPS(CPU, m) {
  m.impl("onebit_adapter", TORCH_BOX(&adapter));
  m.impl("onebit_adapter_bwd", TORCH_BOX(&adapter_bwd));
}

}  // namespace peftkern::onebit
