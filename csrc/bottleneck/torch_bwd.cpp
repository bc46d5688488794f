// The binding of linear's gradient. Rows are cut into chunks, each with sums of its own, which are
// added up in order: so the number of threads changes no bit.
#include "bottleneck/packed.h"

namespace peftkern::bottleneck {
namespace {

// Long enough that adding up their sums costs little, short enough that threads have some each;
// fewer where their sums would fill the memory.
constexpr int64_t kChunkRows = 192, kMostBytes = int64_t{64} << 20;

// Where the parts of a chunk's sums begin; -1 for what nobody asked for.
class Layout {
 public:
  Layout(const Problem& p, const Gradients& wanted)
      : down(place(wanted.down.data, p.down.rows * p.x.columns)),
        up(place(wanted.up.data, p.down.rows * p.up.rows)),
        bias_down(place(wanted.bias_down.data, p.down.rows)),
        bias_up(place(wanted.bias_up.data || (wanted.gate.data && p.bias_up.data), p.up.rows)),
        reached(place(wanted.gate.data, 1)),
        norm_weight(place(wanted.norm_weight.data, p.x.columns)),
        norm_bias(place(wanted.norm_bias.data, p.x.columns)) {}

 private:
  int64_t place(bool wanted, int64_t count) {
    if (!wanted) return -1;
    size += count;
    return size - count;
  }

 public:
  int64_t size = 0;
  int64_t down, up, bias_down, bias_up, reached, norm_weight, norm_bias;
};

// Adds up the chunks' sums, into the first one's.
template <typename Acc>
void add_up(Acc* sums, int64_t size, int64_t chunks) {
  parallel(size, chunks, [&](int64_t begin, int64_t end) {
    for (int64_t chunk = 1; chunk < chunks; ++chunk) {
      const Acc* from = sums + chunk * size;
      for (int64_t i = begin; i < end; ++i) sums[i] += from[i];
    }
  });
}

// What the sums say of the gradients that are asked for.
template <typename Acc>
class Results {
 public:
  Results(const Problem& p, const Layout& at, Acc* sums) : p_(p), at_(at), sums_(sums) {}

  void store(const Gradients& to) const {
    const Acc scale = static_cast<Acc>(p_.scale * p_.gate);
    const int64_t rank = p_.down.rows, inputs = p_.x.columns, outputs = p_.up.rows;
    if (to.gate.data) store_gate(to.gate);  // before a scale is put into bias_up's sum
    if (to.up.data) store_up(to.up, scale);
    for (int64_t i = 0; to.bias_up.data && i < outputs; ++i) sums_[at_.bias_up + i] *= scale;
    store_part(at_.down, rank, inputs, to.down);
    store_part(at_.bias_down, 1, rank, to.bias_down);
    store_part(at_.bias_up, 1, outputs, to.bias_up);
    store_part(at_.norm_weight, 1, inputs, to.norm_weight);
    store_part(at_.norm_bias, 1, inputs, to.norm_bias);
  }

 private:
  void store_part(int64_t begin, int64_t rows, int64_t columns, const Matrix& to) const {
    if (to.data) convert(Matrix::dense(sums_ + begin, p_.sums(), rows, columns), to);
  }

  void store_gate(const Matrix& to) const {
    Scratch scratch;
    Acc& total = sums_[at_.reached];
    if (p_.bias_up.data) {
      const Acc* bias = vector_of<Acc>(p_.bias_up, p_.sums(), scratch);
      for (int64_t i = 0; i < p_.up.rows; ++i) total += bias[i] * sums_[at_.bias_up + i];
    }
    total *= static_cast<Acc>(p_.scale);
    store_part(at_.reached, 1, 1, to);
  }

  // Its sum lies transposed.
  void store_up(const Matrix& to, Acc scale) const {
    Scratch scratch;
    const int64_t rank = p_.down.rows, outputs = p_.up.rows;
    Acc* rows = scratch.take<Acc>(outputs * rank);
    const Acc* sum = sums_ + at_.up;
    parallel(outputs, 4 * rank, [&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; ++n) {
        for (int64_t j = 0; j < rank; ++j) rows[n * rank + j] = scale * sum[j * outputs + n];
      }
    });
    convert(Matrix::dense(rows, p_.sums(), outputs, rank), to);
  }

  const Problem& p_;
  const Layout& at_;
  Acc* sums_;
};

template <typename T, typename Acc>
void run(const TypedKernels<T, Acc>& typed, const Problem& p, const Matrix& grad,
         const Matrix& hidden, const Gradients& wanted) {
  Scratch scratch;
  const int64_t rows = p.x.rows, inputs = p.x.columns, rank = p.down.rows, outputs = p.up.rows;
  const bool needs_down = wanted.x.data || wanted.norm_weight.data || wanted.norm_bias.data;
  const Acc* up = packed<Acc>(p.up, kNarrow, p.sums(), scratch);
  const Acc* down = needs_down ? packed<Acc>(p.down, kWide, p.sums(), scratch) : nullptr;
  const Norm<Acc> norm = norm_of<Acc>(p, scratch);
  const Layout at(p, wanted);
  const int64_t most =
      kMostBytes / static_cast<int64_t>(sizeof(Acc)) / std::max<int64_t>(at.size, 1);
  const int64_t chunks = std::max<int64_t>(1, std::min(rows / kChunkRows, most));
  Acc* sums = scratch.take<Acc>(chunks * at.size);
  parallel(chunks, rows / chunks * rank * (inputs + outputs), [&](int64_t begin, int64_t end) {
    Scratch piece;
    Acc* buffer = piece.take<Acc>(backward_buffer(inputs, rank, outputs));
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      Acc* own = sums + chunk * at.size;
      std::fill_n(own, at.size, Acc(0));
      const auto part = [&](int64_t offset) { return offset < 0 ? nullptr : own + offset; };
      typed.backward({reinterpret_cast<const T*>(grad.data),
                      reinterpret_cast<const T*>(p.x.data),
                      reinterpret_cast<const Acc*>(hidden.data),
                      up,
                      down,
                      reinterpret_cast<T*>(wanted.x.data),
                      part(at.down),
                      part(at.up),
                      part(at.bias_down),
                      part(at.bias_up),
                      part(at.reached),
                      part(at.norm_weight),
                      part(at.norm_bias),
                      inputs,
                      rank,
                      outputs,
                      static_cast<Acc>(p.scale * p.gate),
                      p.activation,
                      p.onto_x,
                      norm,
                      drop_of(p.dropout)},
                     rows * chunk / chunks, rows * (chunk + 1) / chunks, buffer);
    }
  });
  add_up(sums, at.size, chunks);
  Results<Acc>(p, at, sums).store(wanted);
}

}  // namespace

void backward(const Problem& problem, const Matrix& grad, const Matrix& hidden,
              const Gradients& gradients) {
  with_kernels(kernels(), problem.x.dtype,
               [&](const auto& typed, auto*) { run(typed, problem, grad, hidden, gradients); });
}

// `needs` and the result: x, down, up, bias_down, bias_up, gate, norm_weight, norm_bias; only what
// is needed is returned.
std::vector<Tensor> linear_bwd(const Tensor& grad, const Tensor& x, const Tensor& hidden,
                               const Tensor& down, const Tensor& up, const MaybeTensor& bias_down,
                               const MaybeTensor& bias_up, const MaybeTensor& gate, double scale,
                               int64_t activation, bool onto_x, const MaybeTensor& norm_weight,
                               const MaybeTensor& norm_bias, std::optional<double> eps,
                               double dropout, const MaybeTensor& seed, std::vector<bool> needs) {
  const MaybeTensor no_residual;
  const Options options{bias_down,   bias_up, gate,        scale,     activation,
                        no_residual, onto_x,  norm_weight, norm_bias, eps};
  const Problem p =
      problem_of(x, by_rows(down, "down"), by_rows(up, "up"), options, Dropout(dropout, seed));
  const int64_t rows = p.x.rows, rank = p.down.rows;
  check_count(grad, "grad", rows * p.up.rows);
  check_dtype(grad, "grad", p.x.dtype);
  check_count(hidden, "hidden", rows * rank);
  check_dtype(hidden, "hidden", p.sums());
  std::vector<Tensor> out;
  const auto gradient = [&](size_t i, const MaybeTensor& of, int64_t height, int64_t width) {
    if (!needs.at(i) || !of) return Matrix{};
    out.push_back(empty_as(*of));
    return Matrix::of(out.back(), height, width);
  };
  Gradients wanted;
  wanted.x = gradient(0, x, rows, p.x.columns);
  wanted.down = gradient(1, down, rank, p.x.columns);
  wanted.up = gradient(2, up, p.up.rows, rank);
  wanted.bias_down = gradient(3, bias_down, 1, rank);
  wanted.bias_up = gradient(4, bias_up, 1, p.up.rows);
  wanted.gate = gradient(5, gate, 1, 1);
  wanted.norm_weight = gradient(6, norm_weight, 1, p.x.columns);
  wanted.norm_bias = gradient(7, norm_bias, 1, p.x.columns);
  backward(p, Matrix::of(grad, rows, p.up.rows), Matrix::of(hidden, rows, rank), wanted);
  return out;
}

PEFTKERN_OPS(CPU, m) { m.impl("bottleneck_linear_bwd", TORCH_BOX(&linear_bwd)); }

}  // namespace peftkern::bottleneck
