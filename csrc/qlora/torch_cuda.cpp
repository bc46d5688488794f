// The bindings of the CUDA kernels: quantize, dequantize, and linear for few rows.
#include "common/cuda_binding.h"
#include "qlora/qlora.h"
#include "qlora/qlora_cuda.h"

namespace peftkern::qlora {
namespace {

int64_t blocks_of(int64_t count, int64_t block) { return (count + block - 1) / block; }

// The buffers of a quantised weight of any number of experts, checked.
DeviceWeight weight_of(const CudaScope& scope, const std::vector<Tensor>& weight,
                       const std::vector<int64_t>& layout) {
  STD_TORCH_CHECK(layout.size() == 5 && std::min({layout[0], layout[1], layout[2]}) >= 0,
                  "layout must be experts, rows, columns, block size, bits");
  const int64_t bits = layout[4];
  STD_TORCH_CHECK(
      bits == 4 ? weight.size() == 3 || weight.size() == 6 : bits == 8 && weight.size() == 2,
      "weight must be the buffers of a quantised one");
  const auto take = [&]<typename T>(size_t i, const char* name, int64_t count, ScalarType dtype,
                                    const T*& pointer) {
    check_count(scope, weight[i], name, count);
    check_dtype(weight[i], name, dtype);
    pointer = static_cast<const T*>(weight[i].const_data_ptr());
  };
  DeviceWeight w{};
  w.rows = layout[0] * layout[1];
  w.columns = layout[2];
  w.block = bits == 4 ? layout[3] : w.columns;
  w.bits = bits;
  const int64_t count = w.rows * w.columns;
  if (bits == 8) {
    take(0, "packed", count, ScalarType::Char, w.packed);
    take(1, "absmax", w.rows, ScalarType::Float, w.absmax);
    return w;
  }
  STD_TORCH_CHECK(is_block_size(w.block), "block_size must be a power of two, 16 to 4096");
  const int64_t blocks = blocks_of(count, w.block);
  take(0, "packed", blocks_of(count, 2), ScalarType::Byte, w.packed);
  take(2, "codebook", 16, ScalarType::Float, w.codebook);
  if (weight.size() == 3) {
    take(1, "absmax", blocks, ScalarType::Float, w.absmax);
    return w;
  }
  take(1, "absmax", blocks, ScalarType::Byte, w.codes);
  take(3, "nested_absmax", blocks_of(blocks, kNestedBlock), ScalarType::Float, w.nested_absmax);
  take(4, "nested_map", 256, ScalarType::Float, w.map);
  take(5, "nested_offset", 1, ScalarType::Float, w.offset);
  return w;
}

std::tuple<Tensor, Tensor> quantize_rows(const CudaScope& scope, const Tensor& weight) {
  STD_TORCH_CHECK(weight.dim() > 0, "weight must have shape [..., in]");
  const std::vector<int64_t> shape(weight.sizes().begin(), weight.sizes().end());
  Tensor packed = scope.empty(shape, ScalarType::Char);
  Tensor absmax = scope.empty({shape.begin(), shape.end() - 1}, ScalarType::Float);
  const cudaError_t status = with_type(weight.scalar_type(), [&]<typename T>(T*) {
    return quantize_rows_cuda(static_cast<const T*>(weight.const_data_ptr()), absmax.numel(),
                              shape.back(), packed.mutable_data_ptr<int8_t>(),
                              absmax.mutable_data_ptr<float>(), scope.stream);
  });
  check_status(status, "qlora_quantize");
  return {packed, absmax};
}

// `tables` of 4 bits: the thresholds, and the codes of the ranks between them.
std::tuple<Tensor, Tensor> quantize(const Tensor& weight, std::vector<Tensor> tables, int64_t block,
                                    int64_t bits) {
  const CudaScope scope(weight);
  check_count(scope, weight, "weight", weight.numel());
  STD_TORCH_CHECK(bits == 4 || bits == 8, "bits must be 4 or 8");
  if (bits == 8) return quantize_rows(scope, weight);
  STD_TORCH_CHECK(is_block_size(block), "block_size must be a power of two, 16 to 4096");
  STD_TORCH_CHECK(tables.size() == 2, "tables must be thresholds and codes");
  check_count(scope, tables[0], "thresholds", 15);
  check_dtype(tables[0], "thresholds", ScalarType::Float);
  check_count(scope, tables[1], "codes", 16);
  check_dtype(tables[1], "codes", ScalarType::Byte);
  const int64_t count = weight.numel();
  Tensor packed = scope.empty({blocks_of(count, 2), 1}, ScalarType::Byte);
  Tensor absmax = scope.empty({blocks_of(count, block)}, ScalarType::Float);
  const cudaError_t status = with_type(weight.scalar_type(), [&]<typename T>(T*) {
    return quantize_cuda(static_cast<const T*>(weight.const_data_ptr()), count,
                         tables[0].const_data_ptr<float>(), tables[1].const_data_ptr<uint8_t>(),
                         block, packed.mutable_data_ptr<uint8_t>(),
                         absmax.mutable_data_ptr<float>(), scope.stream);
  });
  check_status(status, "qlora_quantize");
  return {packed, absmax};
}

void dequantize(std::vector<Tensor> weight, std::vector<int64_t> layout, Tensor out) {
  const CudaScope scope(out);
  const DeviceWeight w = weight_of(scope, weight, layout);
  check_count(scope, out, "out", w.rows * w.columns);
  const cudaError_t status = with_type(out.scalar_type(), [&]<typename T>(T*) {
    return dequantize_cuda(w, static_cast<T*>(out.mutable_data_ptr()), scope.stream);
  });
  check_status(status, "qlora_dequantize");
}

Tensor decode(const Tensor& x, std::vector<Tensor> weight, std::vector<int64_t> layout,
              const MaybeTensor& bias, const MaybeTensor& down, const MaybeTensor& lora_b,
              double scale) {
  const CudaScope scope(x);
  const DeviceWeight w = weight_of(scope, weight, layout);
  STD_TORCH_CHECK(layout[0] == 1, "weight must be of one expert");
  STD_TORCH_CHECK(x.dim() == 2 && x.size(0) <= kMostInputs,
                  "x must have shape [rows, in] of at most ", kMostInputs, " rows");
  STD_TORCH_CHECK(down.has_value() == lora_b.has_value(), "lora_b must come with down");
  const int64_t inputs = x.size(0), rank = down ? down->size(-1) : 0;
  check_count(scope, x, "x", inputs * w.columns);
  if (bias) check_count(scope, *bias, "bias", w.rows);
  if (down) {
    check_count(scope, *down, "down", inputs * rank);
    check_dtype(*down, "down", ScalarType::Float);
    check_count(scope, *lora_b, "lora_b", w.rows * rank);
  }
  Tensor y = scope.empty({inputs, w.rows}, x.scalar_type());
  if (y.numel() == 0) return y;
  const int64_t splits = decode_splits(w, inputs, scope.multiprocessors("qlora_decode"));
  const Tensor workspace = scope.empty({decode_workspace(w, inputs, splits)}, ScalarType::Float);
  const cudaError_t status = with_type(x.scalar_type(), [&]<typename T>(T*) {
    if constexpr (std::is_same_v<T, double>) {
      STD_TORCH_CHECK(false, "x must be float32, bfloat16 or float16");
      return cudaSuccess;
    } else {
      Decode<T> io{};
      io.x = static_cast<const T*>(x.const_data_ptr());
      io.y = static_cast<T*>(y.mutable_data_ptr());
      io.inputs = inputs;
      io.rank = rank;
      io.splits = splits;
      io.scale = static_cast<float>(scale);
      if (down) {
        io.down = down->const_data_ptr<float>();
        io.lora_b = lora_b->const_data_ptr();
        io.lora_b_type = float_type(lora_b->scalar_type());
      }
      if (bias) {
        io.bias = bias->const_data_ptr();
        io.bias_type = float_type(bias->scalar_type());
      }
      return decode_cuda(w, io, static_cast<float*>(workspace.mutable_data_ptr()), scope.stream);
    }
  });
  check_status(status, "qlora_decode");
  return y;
}

}  // namespace

PEFTKERN_CUDA_OPS(m) {
  if (!torch_has_cuda()) return;
  m.impl("qlora_quantize", TORCH_BOX(&quantize));
  m.impl("qlora_dequantize", TORCH_BOX(&dequantize));
  m.impl("qlora_decode", TORCH_BOX(&decode));
}

}  // namespace peftkern::qlora
