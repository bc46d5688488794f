// The binding of the optimiser's step: all tensors of a model at once, cut into ranges of entries.
#include <cmath>
#include <limits>

#include "sparse/adamw.h"
#include "sparse/operands.h"

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
struct Steps {
  Table<A> table;
  Adamw<A> by;

  Steps(const Rates& rates, bool all_ages)
      : table(rates, all_ages),
        by{static_cast<A>(1 - rates.lr * rates.weight_decay),
           static_cast<A>(rates.beta2),
           static_cast<A>(1 - rates.beta1),
           static_cast<A>(1 - rates.beta2),
           static_cast<A>(rates.eps),
           rates.step,
           table.corrections()} {}
};

struct Lists {
  const std::vector<Tensor>&weights, &values, &grads, &exp_avg, &exp_avg_sq, &born;
  std::vector<Pattern> patterns;  // of the weights, or none

  Lists(const std::vector<Tensor>& weights, const std::vector<Tensor>& values,
        const std::vector<Tensor>& grads, const std::vector<Tensor>& exp_avg,
        const std::vector<Tensor>& exp_avg_sq, const std::vector<Tensor>& born,
        const std::vector<Tensor>& tensors, const std::vector<int64_t>& layouts)
      : weights(weights),
        values(values),
        grads(grads),
        exp_avg(exp_avg),
        exp_avg_sq(exp_avg_sq),
        born(born) {
    for (const auto* list : {&grads, &exp_avg, &exp_avg_sq, &weights, &born}) {
      const bool may_be_none = list == &weights || list == &born;
      STD_TORCH_CHECK(list->size() == values.size() || (may_be_none && list->empty()),
                      "lists must be as long as values");
    }
    STD_TORCH_CHECK(tensors.size() == 2 * weights.size() && layouts.size() == 4 * weights.size(),
                    "patterns and layouts must be those of the weights");
    for (size_t i = 0; i < values.size(); ++i) check_packed(i);
    for (size_t i = 0; i < weights.size(); ++i) {
      patterns.push_back(pattern_of({tensors[2 * i], tensors[2 * i + 1]},
                                    {layouts.begin() + 4 * i, layouts.begin() + 4 * (i + 1)}));
      check_count(weights[i], "a weight", patterns[i].rows * patterns[i].columns);
      check_count(values[i], "values", patterns[i].nnz);
      STD_TORCH_CHECK(values[i].scalar_type() == sums_of(weights[i].scalar_type()),
                      "values must be float32, or float64 where the weight is");
    }
  }

  void check_packed(size_t i) const {
    const int64_t count = values[i].numel();
    check_dense(values[i], "values");
    const std::pair<const std::vector<Tensor>&, const char*> lists[] = {
        {grads, "grads"}, {exp_avg, "exp_avg"}, {exp_avg_sq, "exp_avg_sq"}};
    for (const auto& [list, name] : lists) {
      check_count(list[i], name, count);
      check_dtype(list[i], name, values[i].scalar_type());
    }
    if (born.empty()) return;
    check_count(born[i], "born", count);
    check_dtype(born[i], "born", ScalarType::Int);
  }

  template <typename T>
  Packed<T, SumOf<T>> packed(size_t i) const {
    using A = SumOf<T>;
    Packed<T, A> io{};
    io.values = values[i].mutable_data_ptr<A>();
    io.grad = grads[i].const_data_ptr<A>();
    io.exp_avg = exp_avg[i].mutable_data_ptr<A>();
    io.exp_avg_sq = exp_avg_sq[i].mutable_data_ptr<A>();
    if (!born.empty()) io.born = born[i].const_data_ptr<int32_t>();
    if (weights.empty()) return io;
    io.pattern = patterns[i];
    io.weight = static_cast<T*>(weights[i].mutable_data_ptr());
    return io;
  }
};

void adamw(std::vector<Tensor> weights, std::vector<Tensor> values, std::vector<Tensor> grads,
           std::vector<Tensor> exp_avg, std::vector<Tensor> exp_avg_sq, std::vector<Tensor> born,
           std::vector<Tensor> patterns, std::vector<int64_t> layouts, int64_t step, double lr,
           double beta1, double beta2, double eps, double weight_decay) {
  constexpr int64_t kWork = 16;  // of an entry, in what `parallel` counts
  STD_TORCH_CHECK(step >= 1, "step must be positive");
  const Lists of(weights, values, grads, exp_avg, exp_avg_sq, born, patterns, layouts);
  const Rates rates{lr, beta1, beta2, eps, weight_decay, step};
  const Steps<float> single(rates, !born.empty());
  const Steps<double> wide(rates, !born.empty());
  std::vector<int64_t> first{0};  // entry of each tensor, in one row of all
  for (const Tensor& one : values) first.push_back(first.back() + one.numel());
  parallel(first.back(), kWork, [&](int64_t begin, int64_t end) {
    const auto holder = std::upper_bound(first.begin(), first.end(), begin) - 1;
    for (size_t i = static_cast<size_t>(holder - first.begin()); first[i] < end; ++i) {
      const int64_t from = std::max(begin, first[i]), to = std::min(end, first[i + 1]);
      const auto& typed_like = weights.empty() ? values[i] : weights[i];
      with_kernels(optimizer_kernels(), typed_like.scalar_type(),
                   [&](const auto& typed, auto* type) {
                     using T = std::remove_pointer_t<decltype(type)>;
                     const auto& steps = std::get<const Steps<SumOf<T>>&>(std::tie(single, wide));
                     typed.adamw(of.packed<T>(i), steps.by, from - first[i], to - first[i]);
                   });
    }
  });
}

}  // namespace

PEFTKERN_OPS(CPU, m) { m.impl("sparse_adamw_", TORCH_BOX(&adamw)); }

}  // namespace peftkern::sparse
