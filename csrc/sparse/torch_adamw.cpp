// The binding of the optimiser's step: all tensors of a model at once, cut into ranges of entries.
#include <cmath>
#include <limits>

#include "common/convert.h"
#include "sparse/adamw.h"

namespace peftkern::sparse {
namespace {

struct Rates {
  double lr, beta1, beta2, eps, weight_decay;
  int64_t step;
};

// What the steps of a tensor are corrected by, in the type of its values.
template <typename A>
class Table {
 public:
  // Of all ages there are; or, where all entries are as old as the optimiser, of that one.
  Table(const Rates& by, bool all_ages) {
    if (!all_ages) {
      add(by, std::pow(by.beta1, by.step), std::pow(by.beta2, by.step));
      return;
    }
    // From some age on a correction is 1, and so are all that follow.
    constexpr double kNothing = std::numeric_limits<A>::epsilon() / 8;
    double power1 = 1, power2 = 1;
    for (int64_t age = 1; age <= by.step && std::max(power1, power2) > kNothing; ++age) {
      power1 *= by.beta1;
      power2 *= by.beta2;
      add(by, power1, power2);
    }
  }
  Corrections<A> corrections() const {
    return {rate_.data(), spread_.data(), static_cast<int64_t>(rate_.size()) - 1};
  }

 private:
  void add(const Rates& by, double power1, double power2) {
    rate_.push_back(static_cast<A>(by.lr / (1 - power1)));
    spread_.push_back(static_cast<A>(1 / std::sqrt(1 - power2)));
  }
  std::vector<A> rate_{0}, spread_{0};  // nobody is of age 0
};

template <typename A>
struct Everyone {
  Table<A> now, ages;
  Adamw<A> by;

  Everyone(const Rates& rates, bool born)
      : now(rates, false),
        ages(rates, born),
        by{static_cast<A>(1 - rates.lr * rates.weight_decay),
           static_cast<A>(rates.beta2),
           static_cast<A>(1 - rates.beta1),
           static_cast<A>(1 - rates.beta2),
           static_cast<A>(rates.eps),
           rates.step,
           now.corrections()} {}
  Adamw<A> of(bool born) const {
    Adamw<A> found = by;
    if (born) found.corrections = ages.corrections();
    return found;
  }
};

Places places_of(const Tensor& first, const Tensor& second, const int64_t* layout) {
  Places at{};
  at.bitmap = layout[0] == 1;
  at.rows = layout[1];
  at.columns = layout[2];
  at.entries = layout[3];
  STD_TORCH_CHECK(layout[0] == 0 || layout[0] == 1, "a pattern must be csr or a bitmap");
  STD_TORCH_CHECK(at.rows >= 0 && at.columns >= 0 && at.entries >= 0,
                  "a layout must not be below 0");
  at.wide_start = (at.bitmap ? second : first).scalar_type() == ScalarType::Long;
  const ScalarType starts = at.wide_start ? ScalarType::Long : ScalarType::Int;
  if (at.bitmap) {
    const int64_t words = (at.columns + 31) / 32,
                  tiles = (at.columns + kTileColumns - 1) / kTileColumns;
    check_count(first, "bits", at.rows * words);
    check_dtype(first, "bits", ScalarType::Int);
    check_count(second, "prefix", at.rows * tiles);
    check_dtype(second, "prefix", starts);
    at.bits = reinterpret_cast<const uint32_t*>(first.const_data_ptr<int32_t>());
    at.start = second.const_data_ptr();
    return at;
  }
  check_count(first, "row_start", at.rows + 1);
  check_dtype(first, "row_start", starts);
  check_count(second, "columns", at.entries);
  at.wide_column = second.scalar_type() == ScalarType::Int;
  if (!at.wide_column) check_dtype(second, "columns", ScalarType::UInt16);
  at.start = first.const_data_ptr();
  at.column = second.const_data_ptr();
  return at;
}

struct Lists {
  const std::vector<Tensor>&weights, &values, &grads, &exp_avg, &exp_avg_sq, &born, &patterns;
  const std::vector<int64_t>& layouts;
};

void check(const Lists& of) {
  const size_t count = of.values.size();
  STD_TORCH_CHECK(of.grads.size() == count && of.exp_avg.size() == count &&
                      of.exp_avg_sq.size() == count &&
                      (of.weights.empty() || of.weights.size() == count) &&
                      (of.born.empty() || of.born.size() == count),
                  "lists must be as long as values");
  STD_TORCH_CHECK(
      of.patterns.size() == 2 * of.weights.size() && of.layouts.size() == 4 * of.weights.size(),
      "patterns and layouts must be those of the weights");
  for (size_t i = 0; i < count; ++i) {
    const Tensor& values = of.values[i];
    check_dense(values, "values");
    for (const auto& [list, name] : {std::pair{&of.grads, "grads"},
                                     {&of.exp_avg, "exp_avg"},
                                     {&of.exp_avg_sq, "exp_avg_sq"}}) {
      check_count((*list)[i], name, values.numel());
      check_dtype((*list)[i], name, values.scalar_type());
    }
    if (!of.born.empty()) {
      check_count(of.born[i], "born", values.numel());
      check_dtype(of.born[i], "born", ScalarType::Int);
    }
  }
}

template <typename T, typename A>
Packed<T, A> packed(const Lists& of, size_t i) {
  Packed<T, A> io{};
  io.values = of.values[i].mutable_data_ptr<A>();
  io.grad = of.grads[i].const_data_ptr<A>();
  io.exp_avg = of.exp_avg[i].mutable_data_ptr<A>();
  io.exp_avg_sq = of.exp_avg_sq[i].mutable_data_ptr<A>();
  if (!of.born.empty()) io.born = of.born[i].const_data_ptr<int32_t>();
  if (of.weights.empty()) return io;
  io.places = places_of(of.patterns[2 * i], of.patterns[2 * i + 1], of.layouts.data() + 4 * i);
  STD_TORCH_CHECK(io.places.entries == of.values[i].numel(),
                  "values must be the pattern's entries");
  check_count(of.weights[i], "a weight", io.places.rows * io.places.columns);
  io.weight = static_cast<T*>(of.weights[i].mutable_data_ptr());
  return io;
}

// Calls f(kernel, entries of tensor i, all steps of its type) with what the types of i ask for.
template <typename Function>
void with_types(const Lists& of, size_t i, const Everyone<float>& single,
                const Everyone<double>& wide, const Function& f) {
  const ScalarType sums = of.values[i].scalar_type();
  const ScalarType dtype = of.weights.empty() ? sums : of.weights[i].scalar_type();
  STD_TORCH_CHECK(sums == (dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float),
                  "values must be float32, or float64 where the weight is");
  with_kernels(optimizer_kernels(), dtype, [&](const auto& typed, auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    if constexpr (std::is_same_v<T, double>) {
      f(typed, packed<T, double>(of, i), wide);
    } else {
      f(typed, packed<T, float>(of, i), single);
    }
  });
}

void adamw(std::vector<Tensor> weights, std::vector<Tensor> values, std::vector<Tensor> grads,
           std::vector<Tensor> exp_avg, std::vector<Tensor> exp_avg_sq, std::vector<Tensor> born,
           std::vector<Tensor> patterns, std::vector<int64_t> layouts, int64_t step, double lr,
           double beta1, double beta2, double eps, double weight_decay) {
  constexpr int64_t kWork = 16;  // of an entry, in what `parallel` counts
  const Lists of{weights, values, grads, exp_avg, exp_avg_sq, born, patterns, layouts};
  check(of);
  STD_TORCH_CHECK(step >= 1, "step must be positive");
  const Rates rates{lr, beta1, beta2, eps, weight_decay, step};
  const Everyone<float> single(rates, !born.empty());
  const Everyone<double> wide(rates, !born.empty());
  std::vector<int64_t> first{0};  // entry of each tensor, in one row of all
  for (size_t i = 0; i < values.size(); ++i) {
    with_types(of, i, single, wide, [](const auto&, const auto&, const auto&) {});  // refuses now
    first.push_back(first.back() + values[i].numel());
  }
  parallel(first.back(), kWork, [&](int64_t begin, int64_t end) {
    size_t i = static_cast<size_t>(std::upper_bound(first.begin(), first.end(), begin) -
                                   first.begin() - 1);
    for (; i < values.size() && first[i] < end; ++i) {
      const int64_t from = std::max(begin, first[i]), to = std::min(end, first[i + 1]);
      if (from >= to) continue;
      with_types(of, i, single, wide, [&](const auto& kernel, const auto& io, const auto& all) {
        kernel.adamw(io, all.of(io.born != nullptr), from - first[i], to - first[i]);
      });
    }
  });
}

}  // namespace

PEFTKERN_OPS(CPU, m) { m.impl("sparse_adamw_", TORCH_BOX(&adamw)); }

}  // namespace peftkern::sparse
