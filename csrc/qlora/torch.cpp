// The binding of quantize and dequantize.
#include "qlora/base.h"

namespace peftkern::qlora {

// Codes of 4 bits; `tables`: the thresholds, and the codes of the ranks between them.
std::tuple<Tensor, Tensor> quantize_blocks(const Tensor& weight, const std::vector<Tensor>& tables,
                                           int64_t block) {
  STD_TORCH_CHECK(is_block_size(block), "block_size must be a power of two");
  STD_TORCH_CHECK(tables.size() == 2, "tables must be thresholds and codes");
  check_count(tables[0], "thresholds", 15);
  check_dtype(tables[0], "thresholds", ScalarType::Float);
  check_count(tables[1], "codes", 16);
  check_dtype(tables[1], "codes", ScalarType::Byte);
  const int64_t count = weight.numel(), blocks = (count + block - 1) / block;
  Tensor packed = empty({(count + 1) / 2, 1}, ScalarType::Byte);
  Tensor absmax = empty({blocks}, ScalarType::Float);
  ask_for_huge_pages(packed.mutable_data_ptr(), packed.numel());
  const Rounding rounding{tables[0].const_data_ptr<float>(), tables[1].const_data_ptr<uint8_t>()};
  with_kernels(kernels(), weight.scalar_type(), [&](const auto& typed, auto* type) {
    const auto* from = static_cast<decltype(type)>(const_cast<void*>(weight.const_data_ptr()));
    uint8_t* to = packed.mutable_data_ptr<uint8_t>();
    float* scales = absmax.mutable_data_ptr<float>();
    parallel(blocks, block, [&](int64_t begin, int64_t end) {
      typed.quantize(from, count, rounding, block, begin, end, to, scales);
    });
  });
  return {packed, absmax};
}

// Codes of 8 bits.
std::tuple<Tensor, Tensor> quantize_rows(const Tensor& weight) {
  STD_TORCH_CHECK(weight.dim() > 0, "weight must have shape [..., in]");
  const std::vector<int64_t> shape(weight.sizes().begin(), weight.sizes().end());
  const std::vector<int64_t> leading(shape.begin(), shape.end() - 1);
  Tensor packed = empty(shape, ScalarType::Char);
  Tensor absmax = empty(leading, ScalarType::Float);
  with_kernels(kernels(), weight.scalar_type(), [&](const auto& typed, auto* type) {
    const auto* from = static_cast<decltype(type)>(const_cast<void*>(weight.const_data_ptr()));
    int8_t* to = packed.mutable_data_ptr<int8_t>();
    float* scales = absmax.mutable_data_ptr<float>();
    parallel(absmax.numel(), shape.back(), [&](int64_t begin, int64_t end) {
      typed.quantize_rows(from, shape.back(), begin, end, to, scales);
    });
  });
  return {packed, absmax};
}

std::tuple<Tensor, Tensor> quantize(const Tensor& weight, std::vector<Tensor> tables, int64_t block,
                                    int64_t bits) {
  check_dense(weight, "weight");
  STD_TORCH_CHECK(bits == 4 || bits == 8, "bits must be 4 or 8");
  return bits == 4 ? quantize_blocks(weight, tables, block) : quantize_rows(weight);
}

void dequantize(std::vector<Tensor> weight, std::vector<int64_t> layout, Tensor out) {
  // What exceeds the caches is written past them: reading it first would double the traffic.
  constexpr int64_t kPastCaches = int64_t{32} << 20, kPiece = 4096;
  const Base base(weight, layout);
  const int64_t count = base.experts * base.rows * base.columns;
  check_count(out, "out", count);
  STD_TORCH_CHECK(!base.is_dense(), "weight must be quantised");
  const bool past_caches = count * size_of(out.scalar_type()) > kPastCaches;
  with_kernels(kernels(), out.scalar_type(), [&](const auto& typed, auto* type) {
    auto* to = static_cast<decltype(type)>(out.mutable_data_ptr());
    parallel((count + kPiece - 1) / kPiece, kPiece, [&](int64_t begin, int64_t end) {
      typed.dequantize(base.codes, begin * kPiece, std::min(end * kPiece, count), past_caches,
                       to + begin * kPiece);
    });
  });
}

PEFTKERN_OPS(CPU, m) {
  m.impl("qlora_quantize", TORCH_BOX(&quantize));
  m.impl("qlora_dequantize", TORCH_BOX(&dequantize));
}

}  // namespace peftkern::qlora
