// The binding of quantize and dequantize.
#include "qlora/base.h"

namespace peftkern::qlora {

std::tuple<Tensor, Tensor> quantize(const Tensor& weight, const Tensor& thresholds, int64_t block) {
  check_dense(weight, "weight");
  check_count(thresholds, "thresholds", 15);
  check_dtype(thresholds, "thresholds", ScalarType::Float);
  STD_TORCH_CHECK(block >= 16 && (block & (block - 1)) == 0, "block_size must be a power of two");
  const int64_t count = weight.numel(), blocks = (count + block - 1) / block;
  Tensor packed = empty({(count + 1) / 2, 1}, ScalarType::Byte);
  Tensor absmax = empty({blocks}, ScalarType::Float);
  ask_for_huge_pages(packed.mutable_data_ptr(), packed.numel());
  const float* limits = thresholds.const_data_ptr<float>();
  with_kernels(weight.scalar_type(), [&](const auto& typed, auto* type) {
    const auto* from = static_cast<decltype(type)>(const_cast<void*>(weight.const_data_ptr()));
    uint8_t* to = packed.mutable_data_ptr<uint8_t>();
    float* scales = absmax.mutable_data_ptr<float>();
    parallel(blocks, block, [&](int64_t begin, int64_t end) {
      typed.quantize(from, count, limits, block, begin, end, to, scales);
    });
  });
  return {packed, absmax};
}

void dequantize(std::vector<Tensor> weight, std::vector<int64_t> layout, Tensor out) {
  // What exceeds the caches is written past them: reading it first would double the traffic.
  constexpr int64_t kPastCaches = int64_t{32} << 20, kPiece = 4096;
  const Base base(weight, layout);
  const int64_t count = base.experts * base.rows * base.columns;
  check_count(out, "out", count);
  STD_TORCH_CHECK(!base.is_dense(), "weight must be quantised");
  const bool past_caches = count * size_of(out.scalar_type()) > kPastCaches;
  with_kernels(out.scalar_type(), [&](const auto& typed, auto* type) {
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
