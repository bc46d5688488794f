// Latent weights as the binding meets them: several at once, each with its statistics, cut into
// pieces that threads share.
#pragma once
#include <cmath>
#include <limits>
#include <type_traits>
#include <utility>

#include "common/convert.h"
#include "onebit/onebit.h"

namespace peftkern::onebit {

inline ScalarType sums_of(ScalarType dtype) {
  return dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// The type of the sums over a T.
template <typename T>
using SumOf = std::conditional_t<std::is_same_v<T, double>, double, float>;

inline void check_bits(int64_t bits) { STD_TORCH_CHECK(is_bits(bits), "bits must be 1, 2 or 4"); }

inline Matrix matrix_of(const Tensor& tensor, const char* name) {
  check_dense(tensor, name);
  STD_TORCH_CHECK(tensor.dim() == 2, name, " must have shape [out, in]");
  return Matrix::of(tensor, tensor.size(0), tensor.size(1));
}

template <typename A>
Quantizer<A> quantizer(const A* statistics, int64_t bits) {
  Quantizer<A> by{};
  const A mean = statistics[0], std = statistics[1], step = std + static_cast<A>(kEps);
  by.mean = mean;
  by.bits = bits;
  const int64_t count = int64_t{1} << bits;
  for (int64_t t = 0; t < 16; ++t) {
    const double threshold = t + 1 < count ? (level(bits, t) + level(bits, t + 1)) / 2 : 0;
    const bool none = t + 1 >= count || std == 0;
    by.limits[t] = none ? std::numeric_limits<A>::infinity() : static_cast<A>(threshold) * step;
    if (t < count) by.values[t] = mean + std * static_cast<A>(level(bits, t));
  }
  return by;
}

template <typename To, typename From>
Quantizer<To> as(const Quantizer<From>& from) {
  Quantizer<To> to{static_cast<To>(from.mean), {}, {}, from.bits};
  for (int i = 0; i < 16; ++i) {
    to.limits[i] = static_cast<To>(from.limits[i]);
    to.values[i] = static_cast<To>(from.values[i]);
  }
  return to;
}

// But for what the sums decide.
template <typename A>
Slopes<A> slopes(const A* statistics, int64_t bits) {
  Slopes<A> found{};
  for (int64_t code = 0; code < int64_t{1} << bits; ++code) {
    found.levels[code] = static_cast<A>(level(bits, code));
  }
  const double std = statistics[1], step = std + kEps;
  found.straight = static_cast<A>(std / step);
  found.along = static_cast<A>(std / step / step);
  return found;
}

// S1 and S2, over n elements.
template <typename A>
void take_sums(Slopes<A>& slopes, const A* statistics, double first, double second, int64_t n) {
  const double std = statistics[1], spread = static_cast<double>(std::max<int64_t>(n - 1, 1)) * std;
  slopes.shift = static_cast<A>(kEps / (std + kEps) * first / static_cast<double>(n));
  slopes.slope = std == 0 ? 0 : static_cast<A>(second / spread);
}

class Latents {
 public:
  // `statistics` [n, 2], a row each.
  Latents(std::vector<Matrix> weights, const Tensor& statistics, int64_t bits)
      : Latents(std::move(weights)) {
    check_bits(bits);
    check_count(statistics, "statistics", 2 * static_cast<int64_t>(weights_.size()));
    for (const Matrix& weight : weights_) {
      check_dtype(statistics, "statistics", sums_of(weight.dtype));
    }
    statistics_ = static_cast<const char*>(statistics.const_data_ptr());
    bits_ = bits;
  }
  explicit Latents(std::vector<Matrix> weights) : weights_(std::move(weights)) {
    for (const Matrix& weight : weights_) {
      first_.push_back(first_.back() + pieces_of(weight.rows * weight.columns));
    }
  }

  // statistics [n, 2], in the type of the sums.
  void measure(void* statistics) const {
    std::vector<double> sums(static_cast<size_t>(2 * first_.back()));
    const auto add = [&](bool squares, size_t m, int64_t begin, int64_t end) {
      with(m, [&](const auto& typed, auto* type) {
        using A = SumOf<std::remove_pointer_t<decltype(type)>>;
        const A mean = squares ? static_cast<const A*>(statistics)[2 * m] : 0;
        typed.sums(data<decltype(type)>(m), count(m), mean, squares, begin, end,
                   sums.data() + 2 * first_[m]);
      });
    };
    const auto finish = [&](bool squares, size_t m) {
      const double n = static_cast<double>(std::max<int64_t>(count(m), 1));
      with(m, [&](const auto&, auto* type) {
        using A = SumOf<std::remove_pointer_t<decltype(type)>>;
        A* to = static_cast<A*>(statistics) + 2 * m;
        if (!squares) to[0] = static_cast<A>(total(sums, m, 0) / n);
        if (squares) to[1] = spread(to[0], total(sums, m, 0), total(sums, m, 1), n);
      });
    };
    in_two_passes(add, finish);
  }

  // W of each into memory of its dtype.
  void quantize(const std::vector<void*>& out) const {
    for_each_part([&](size_t m, int64_t begin, int64_t end) {
      with(m, [&](const auto& typed, auto* type) {
        using A = SumOf<std::remove_pointer_t<decltype(type)>>;
        typed.quantize(data<decltype(type)>(m), quantizer(row<A>(m), bits_), begin * kPiece,
                       std::min(end * kPiece, count(m)), static_cast<decltype(type)>(out[m]));
      });
    });
  }

  // The gradient of each, into memory of its dtype, from that of W in the type of the sums; of
  // those that have one.
  void slope(const std::vector<const void*>& grads, const std::vector<void*>& out) const {
    std::vector<double> sums(static_cast<size_t>(2 * first_.back()));
    in_two_passes(
        [&](bool summed, size_t m, int64_t begin, int64_t end) {
          if (!grads[m]) return;
          with(m, [&](const auto& typed, auto* type) {
            using A = SumOf<std::remove_pointer_t<decltype(type)>>;
            const auto* weight = data<decltype(type)>(m);
            const auto* grad = static_cast<const A*>(grads[m]);
            const Quantizer<A> by = quantizer(row<A>(m), bits_);
            Slopes<A> at = slopes(row<A>(m), bits_);
            if (!summed) {
              typed.slope_sums(grad, weight, by, at, count(m), begin, end,
                               sums.data() + 2 * first_[m]);
              return;
            }
            take_sums(at, row<A>(m), total(sums, m, 0), total(sums, m, 1), count(m));
            typed.slope(grad, weight, by, at, begin * kPiece, std::min(end * kPiece, count(m)),
                        static_cast<decltype(type)>(out[m]));
          });
        },
        [](bool, size_t) {});
  }

 private:
  // f(second pass, matrix, first piece, last), and after each pass over a matrix g(second, matrix).
  // Of many, a thread has whole ones, and both passes over one follow each other: the second finds
  // it in a core's cache.
  template <typename Function, typename Finish>
  void in_two_passes(const Function& f, const Finish& g) const {
    constexpr size_t kMany = 16;
    const auto count = static_cast<int64_t>(weights_.size());
    if (weights_.size() >= kMany) {
      parallel(count, first_.back() / count * kPiece, [&](int64_t begin, int64_t end) {
        for (auto m = static_cast<size_t>(begin); m < static_cast<size_t>(end); ++m) {
          for (const bool second : {false, true}) {
            f(second, m, int64_t{0}, first_[m + 1] - first_[m]);
            g(second, m);
          }
        }
      });
      return;
    }
    for (const bool second : {false, true}) {
      for_each_part([&](size_t m, int64_t begin, int64_t end) { f(second, m, begin, end); });
      for (size_t m = 0; m < weights_.size(); ++m) g(second, m);
    }
  }

  // f(matrix, first piece, last) for parts of matrices, in parallel.
  template <typename Function>
  void for_each_part(const Function& f) const {
    parallel(first_.back(), kPiece, [&](int64_t begin, int64_t end) {
      size_t m = std::upper_bound(first_.begin(), first_.end(), begin) - first_.begin() - 1;
      for (; begin < end; ++m) {
        const int64_t stop = std::min(end, first_[m + 1]);
        if (begin < stop) f(m, begin - first_[m], stop - first_[m]);
        begin = stop;
      }
    });
  }

  template <typename Function>
  void with(size_t m, const Function& f) const {
    with_kernels(kernels(), weights_[m].dtype, f);
  }
  template <typename Pointer>
  const std::remove_pointer_t<Pointer>* data(size_t m) const {
    return static_cast<Pointer>(weights_[m].at(0, 0));
  }
  int64_t count(size_t m) const { return weights_[m].rows * weights_[m].columns; }
  template <typename A>
  const A* row(size_t m) const {
    return reinterpret_cast<const A*>(statistics_) + 2 * m;
  }
  // Of a sum of pieces, two of which go side by side.
  double total(const std::vector<double>& sums, size_t m, int64_t which) const {
    double sum = 0;
    for (int64_t p = first_[m]; p < first_[m + 1]; ++p) sum += sums[2 * p + which];
    return sum;
  }

  // The std, from the sums of w - mean and of its squares; the first is what rounding left in mean.
  template <typename A>
  static A spread(A mean, double first, double second, double n) {
    const double squares = second - first * first / n;
    const A std = static_cast<A>(std::sqrt((squares < 0 ? 0 : squares) / std::max(n - 1, 1.0)));
    const A rounding = static_cast<A>(kRounding) * std::numeric_limits<A>::epsilon();
    return std <= rounding * std::max<A>(1, std::abs(mean)) ? 0 : std;
  }

  std::vector<Matrix> weights_;
  std::vector<int64_t> first_{0};  // piece of each weight, all of them numbered on; and their end
  const char* statistics_ = nullptr;
  int64_t bits_ = 0;
};

}  // namespace peftkern::onebit
