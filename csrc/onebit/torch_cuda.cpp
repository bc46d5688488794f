// The binding of the CUDA kernel: linear on packed codes, for few rows.
#include "common/cuda_binding.h"
#include "onebit/onebit_cuda.h"

namespace peftkern::onebit {
namespace {

DeviceBits weight_of(const CudaScope& scope, const Tensor& laid_out, const Tensor& statistics,
                     int64_t bits, int64_t rows, int64_t columns) {
  STD_TORCH_CHECK(is_bits(bits), "bits must be 1, 2 or 4");
  STD_TORCH_CHECK(rows >= 0, "rows must not be negative");
  check_count(scope, laid_out, "laid_out", laid_out_bytes(rows, columns, bits));
  check_dtype(laid_out, "laid_out", ScalarType::Byte);
  check_count(scope, statistics, "statistics", 2);
  check_dtype(statistics, "statistics", ScalarType::Float);
  return {static_cast<const uint8_t*>(laid_out.const_data_ptr()),
          statistics.const_data_ptr<float>(), rows, columns, bits};
}

Tensor decode(const Tensor& x, const Tensor& laid_out, const Tensor& statistics, int64_t bits,
              int64_t rows, const MaybeTensor& bias) {
  const CudaScope scope(x);
  STD_TORCH_CHECK(x.dim() == 2 && x.size(0) <= kMostInputs,
                  "x must have shape [rows, in] of at most ", kMostInputs, " rows");
  const int64_t inputs = x.size(0);
  const DeviceBits w = weight_of(scope, laid_out, statistics, bits, rows, x.size(1));
  check_count(scope, x, "x", inputs * w.columns);
  if (bias) check_count(scope, *bias, "bias", rows);
  Tensor y = scope.empty({inputs, rows}, x.scalar_type());
  if (y.numel() == 0) return y;
  const int64_t splits = decode_splits(w, inputs, static_cast<int64_t>(x.element_size()),
                                       scope.multiprocessors("onebit_decode"));
  const Tensor workspace = scope.empty({decode_workspace(w, inputs, splits)}, ScalarType::Float);
  const cudaError_t status = with_type(x.scalar_type(), [&]<typename T>(T*) {
    if constexpr (std::is_same_v<T, double>) {
      STD_TORCH_CHECK(false, "x must be float32, bfloat16 or float16");
      return cudaSuccess;
    } else {
      FewRows<T> io{};
      io.x = static_cast<const T*>(x.const_data_ptr());
      io.y = static_cast<T*>(y.mutable_data_ptr());
      io.inputs = inputs;
      io.splits = splits;
      if (bias) {
        io.bias = bias->const_data_ptr();
        io.bias_type = float_type(bias->scalar_type());
      }
      return decode_cuda(w, io, static_cast<float*>(workspace.mutable_data_ptr()), scope.stream);
    }
  });
  check_status(status, "onebit_decode");
  return y;
}

}  // namespace

PEFTKERN_CUDA_OPS(m) {
  if (!torch_has_cuda()) return;
  m.impl("onebit_decode", TORCH_BOX(&decode));
}

}  // namespace peftkern::onebit
