// The binding of what lies between latent weights and their codes.
#include "onebit/latents.h"

namespace peftkern::onebit {
namespace {

std::vector<Matrix> matrices_of(const std::vector<Tensor>& weights) {
  std::vector<Matrix> found;
  for (const Tensor& weight : weights) found.push_back(matrix_of(weight, "a weight"));
  return found;
}

std::vector<Tensor> outputs_for(const std::vector<Tensor>& weights, std::vector<void*>& memory) {
  std::vector<Tensor> out;
  for (const Tensor& weight : weights) {
    out.push_back(empty_as(weight));
    memory.push_back(out.back().mutable_data_ptr());
  }
  return out;
}

Tensor statistics(std::vector<Tensor> weights) {
  STD_TORCH_CHECK(!weights.empty(), "weights must hold a tensor at least");
  const ScalarType dtype = sums_of(weights[0].scalar_type());
  for (const Tensor& weight : weights) {
    STD_TORCH_CHECK(sums_of(weight.scalar_type()) == dtype, "weights must all be float64, or none");
  }
  Tensor out = empty({static_cast<int64_t>(weights.size()), 2}, dtype);
  Latents(matrices_of(weights)).measure(out.mutable_data_ptr());
  return out;
}

std::vector<Tensor> quantize(std::vector<Tensor> weights, const Tensor& statistics, int64_t bits) {
  std::vector<void*> memory;
  std::vector<Tensor> out = outputs_for(weights, memory);
  Latents(matrices_of(weights), statistics, bits).quantize(memory);
  return out;
}

std::vector<Tensor> quantize_bwd(std::vector<Tensor> grads, std::vector<Tensor> weights,
                                 const Tensor& statistics, int64_t bits) {
  STD_TORCH_CHECK(grads.size() == weights.size(), "grads must be as many as weights");
  const std::vector<Matrix> latents = matrices_of(weights);
  Scratch scratch;
  std::vector<const void*> wide;
  for (size_t m = 0; m < grads.size(); ++m) {
    check_count(grads[m], "a gradient", latents[m].rows * latents[m].columns);
    const Matrix grad = Matrix::of(grads[m], latents[m].rows, latents[m].columns);
    wide.push_back(as_dtype(grad, sums_of(latents[m].dtype), scratch).data);
  }
  std::vector<void*> memory;
  std::vector<Tensor> out = outputs_for(weights, memory);
  Latents(latents, statistics, bits).slope(wide, memory);
  return out;
}

// Calls f(kernels, quantiser, typed null pointer) for a dtype of weights, the statistics being one
// matrix's; their own type may be another.
template <typename Function>
void with_quantizer(const Tensor& statistics, int64_t bits, ScalarType dtype, const Function& f) {
  check_bits(bits);
  check_count(statistics, "statistics", 2);
  with_kernels(kernels(), dtype, [&](const auto& typed, auto* type) {
    using A = SumOf<std::remove_pointer_t<decltype(type)>>;
    if (statistics.scalar_type() == ScalarType::Double) {
      const auto by = quantizer(statistics.const_data_ptr<double>(), bits);
      f(typed, as<A>(by), type);
    } else {
      check_dtype(statistics, "statistics", ScalarType::Float);
      f(typed, as<A>(quantizer(statistics.const_data_ptr<float>(), bits)), type);
    }
  });
}

Tensor encode(const Tensor& weight, const Tensor& statistics, int64_t bits) {
  const Matrix from = matrix_of(weight, "weight");
  check_dtype(statistics, "statistics", sums_of(from.dtype));
  check_bits(bits);
  Tensor packed = empty({from.rows, bytes_of(from.columns, bits)}, ScalarType::Byte);
  uint8_t* to = packed.mutable_data_ptr<uint8_t>();
  with_quantizer(statistics, bits, from.dtype, [&](const auto& typed, const auto& by, auto* type) {
    const auto* data = static_cast<decltype(type)>(from.at(0, 0));
    parallel(from.rows, from.columns, [&](int64_t begin, int64_t end) {
      typed.encode(data, by, from.columns, begin, end, to);
    });
  });
  return packed;
}

Tensor dequantize(const Tensor& packed, const Tensor& statistics, int64_t bits, int64_t width,
                  ScalarType dtype) {
  check_dense(packed, "packed");
  check_dtype(packed, "packed", ScalarType::Byte);
  check_bits(bits);
  STD_TORCH_CHECK(packed.dim() == 2 && width >= 0 && packed.size(1) == bytes_of(width, bits),
                  "packed must be rows of the width's bytes");
  const int64_t rows = packed.size(0);
  Tensor out = empty({rows, width}, dtype);
  const uint8_t* from = packed.const_data_ptr<uint8_t>();
  with_quantizer(statistics, bits, dtype, [&](const auto& typed, const auto& by, auto* type) {
    auto* to = static_cast<decltype(type)>(out.mutable_data_ptr());
    parallel(rows, width, [&](int64_t begin, int64_t end) {
      typed.dequantize(from, by, width, begin, end, to);
    });
  });
  return out;
}

// Calls f(row, codes before it, how many) over rows of `width` codes; those that fill their last
// byte are one long row, which threads cut where a byte begins.
template <typename Function>
void for_each_row(int64_t rows, int64_t width, int64_t bits, const Function& f) {
  constexpr int64_t kCut = 1 << 14;
  if (width * bits % 8 == 0) {
    const int64_t count = rows * width;
    parallel((count + kCut - 1) / kCut, kCut / 4, [&](int64_t begin, int64_t end) {
      f(begin * kCut, begin * kCut * bits / 8, std::min(end * kCut, count) - begin * kCut);
    });
    return;
  }
  parallel(rows, width / 4, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) f(row * width, row * bytes_of(width, bits), width);
  });
}

// As `from`, but with rows of `width`; and how many rows there are.
Tensor rows_of(const Tensor& from, const char* name, int64_t width, int64_t& rows) {
  check_dense(from, name);
  check_dtype(from, name, ScalarType::Byte);
  STD_TORCH_CHECK(from.dim() > 0, name, " must have a width");
  std::vector<int64_t> shape(from.sizes().begin(), from.sizes().end());
  shape.back() = width;
  rows = 1;
  for (size_t d = 0; d + 1 < shape.size(); ++d) rows *= shape[d];
  return empty(shape, ScalarType::Byte);
}

Tensor pack(const Tensor& codes, int64_t bits) {
  check_bits(bits);
  const int64_t width = codes.dim() ? codes.size(-1) : 0;
  int64_t rows;
  Tensor packed = rows_of(codes, "codes", bytes_of(width, bits), rows);
  const uint8_t* from = codes.const_data_ptr<uint8_t>();
  uint8_t* to = packed.mutable_data_ptr<uint8_t>();
  for_each_row(rows, width, bits, [&](int64_t code, int64_t byte, int64_t count) {
    kernels().pack(from + code, count, bits, to + byte);
  });
  return packed;
}

Tensor unpack(const Tensor& packed, int64_t bits, int64_t width) {
  check_bits(bits);
  STD_TORCH_CHECK(packed.dim() > 0 && width >= 0 && packed.size(-1) == bytes_of(width, bits),
                  "packed must have rows of the width's bytes");
  int64_t rows;
  Tensor codes = rows_of(packed, "packed", width, rows);
  const uint8_t* from = packed.const_data_ptr<uint8_t>();
  uint8_t* to = codes.mutable_data_ptr<uint8_t>();
  for_each_row(rows, width, bits, [&](int64_t code, int64_t byte, int64_t count) {
    kernels().unpack(from + byte, count, bits, to + code);
  });
  return codes;
}

}  // namespace

PEFTKERN_OPS(CPU, m) {
  m.impl("onebit_statistics", TORCH_BOX(&statistics));
  m.impl("onebit_quantize", TORCH_BOX(&quantize));
  m.impl("onebit_quantize_bwd", TORCH_BOX(&quantize_bwd));
  m.impl("onebit_encode", TORCH_BOX(&encode));
  m.impl("onebit_dequantize", TORCH_BOX(&dequantize));
  m.impl("onebit_pack", TORCH_BOX(&pack));
  m.impl("onebit_unpack", TORCH_BOX(&unpack));
}

}  // namespace peftkern::onebit
