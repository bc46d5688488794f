// The bindings of the CUDA kernels: quantize, dequantize, and linear for few rows.
#include "common/cuda_binding.h"
#include "qlora/qlora_cuda.h"

namespace peftkern::qlora {
namespace {

constexpr int64_t kMostRows = 16;

// Calls f with a null pointer to the C++ type of this dtype.
template <typename Function>
void with_type(ScalarType dtype, const Function& f) {
  switch (dtype) {
    case ScalarType::Float:
      return f(static_cast<float*>(nullptr));
    case ScalarType::BFloat16:
      return f(static_cast<bf16*>(nullptr));
    case ScalarType::Half:
      return f(static_cast<fp16*>(nullptr));
    default:
      STD_TORCH_CHECK(false, "a tensor must be float32, bfloat16 or float16");
  }
}
