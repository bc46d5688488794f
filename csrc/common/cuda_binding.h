// What every torch_cuda.cpp stands on: a call's device and stream, its checks, fresh memory there,
// and the status of a launch.
//
// No symbol of libtorch's CUDA side is needed at load, so the one library serves a torch that is
// built without CUDA too: its CUDA ops are registered only where libtorch_cuda.so is there. It is
// not in a torch for AMD, which calls its devices cuda and cannot run these kernels.
//
// With PEFTKERN_EMULATED the same bindings serve kernels that run on the host: on CPU tensors, in a
// namespace of their own, in a library for tests (csrc/emulator).
#pragma once
#include <cuda_runtime.h>

#include "common/binding.h"
#include "common/half.h"

#if defined(PEFTKERN_EMULATED)
// Spelled once more, in peftkern/_native.py.
#define PEFTKERN_CUDA_OPS(m) STABLE_TORCH_LIBRARY_IMPL(peftkern_emulated, CPU, m)
#else
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#define PEFTKERN_CUDA_OPS(m) PEFTKERN_OPS(CUDA, m)
#endif

namespace peftkern {

inline void check_status(cudaError_t status, const char* op) {
#if !defined(PEFTKERN_EMULATED)
  STD_TORCH_CHECK(
      status != cudaErrorNoKernelImageForDevice && status != cudaErrorInvalidDeviceFunction, op,
      " must be built for this GPU, got a build for others: build peftkern with its compute "
      "capability in TORCH_CUDA_ARCH_LIST, or with PEFTKERN_CUDA=off");
#endif
  STD_TORCH_CHECK(status == cudaSuccess, op, " must start on the GPU, got '",
                  cudaGetErrorString(status), "'");
}

#if defined(PEFTKERN_EMULATED)

inline bool torch_has_cuda() { return true; }

class CudaScope {
 public:
  const cudaStream_t stream{};

  explicit CudaScope(const Tensor&) {}

  bool holds(const Tensor& tensor) const { return tensor.is_cpu(); }

  // Few, so that small operands are enough to have work split among them.
  int64_t multiprocessors(const char*) const { return 4; }

  // The library is for tests: what is fresh is NaN.
  Tensor empty(const std::vector<int64_t>& shape, ScalarType dtype) const {
    Tensor tensor = peftkern::empty(shape, dtype);
    const auto bytes = tensor.numel() * static_cast<int64_t>(tensor.element_size());
    if (bytes) std::memset(tensor.mutable_data_ptr(), 0xFF, static_cast<size_t>(bytes));
    return tensor;
  }
};

#else

// Of the shim, and the one function of it that lies in libtorch_cuda.so.
using CurrentStream = AOTITorchError (*)(int32_t device_index, void** stream);

inline CurrentStream current_stream() {
  static const auto found = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    void* symbol = library ? dlsym(library, "aoti_torch_get_current_cuda_stream") : nullptr;
    return reinterpret_cast<CurrentStream>(symbol);
  }();
  return found;
}

inline bool torch_has_cuda() { return current_stream() != nullptr; }

// For its length the tensor's device is the current one. CUDA's runtime is this library's own, but
// both find the current device in the driver, where torch's guard leaves it.
class CudaScope {
  const int32_t index_;
  const torch::stable::accelerator::DeviceGuard guard_;

 public:
  const cudaStream_t stream;  // on which torch's own kernels run now

  explicit CudaScope(const Tensor& tensor)
      : index_(tensor.get_device_index()), guard_(index_), stream(stream_of(index_)) {}

  bool holds(const Tensor& tensor) const {
    return tensor.is_cuda() && tensor.get_device_index() == index_;
  }

  int64_t multiprocessors(const char* op) const {
    int count = 0;
    check_status(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, index_), op);
    return count;
  }

  // From torch's allocator, on that device and, for the allocator's books, on that stream.
  Tensor empty(const std::vector<int64_t>& shape, ScalarType dtype) const {
    Tensor tensor = allocate(shape, dtype, aoti_torch_device_type_cuda(), index_);
    const auto bytes = tensor.numel() * static_cast<int64_t>(tensor.element_size());
    if (poison() && bytes) {
      cudaMemsetAsync(tensor.mutable_data_ptr(), 0xFF, static_cast<size_t>(bytes), stream);
    }
    return tensor;
  }

 private:
  static cudaStream_t stream_of(int32_t index) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(current_stream()(index, &stream));
    return static_cast<cudaStream_t>(stream);
  }
};

#endif

// The safety net of common/binding.h, for tensors of this scope's device.
inline void check_count(const CudaScope& scope, const Tensor& tensor, const char* name,
                        int64_t count) {
  STD_TORCH_CHECK(scope.holds(tensor), name, " must be on the device of the other operands");
  STD_TORCH_CHECK(tensor.is_contiguous(), name, " must be contiguous");
  STD_TORCH_CHECK(tensor.numel() == count, name, " must have ", count, " elements, got ",
                  tensor.numel());
}

// Calls f with a pointer of the dtype's type, null.
template <typename Function>
cudaError_t with_type(ScalarType dtype, const Function& f) {
  switch (dtype) {
    case ScalarType::Double:
      return f(static_cast<double*>(nullptr));
    case ScalarType::BFloat16:
      return f(static_cast<bf16*>(nullptr));
    case ScalarType::Half:
      return f(static_cast<fp16*>(nullptr));
    default:
      STD_TORCH_CHECK(dtype == ScalarType::Float, "a tensor must be of a float dtype");
      return f(static_cast<float*>(nullptr));
  }
}

inline Float float_type(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Double:
      return Float::f64;
    case ScalarType::BFloat16:
      return Float::bf16;
    case ScalarType::Half:
      return Float::fp16;
    default:
      STD_TORCH_CHECK(dtype == ScalarType::Float, "a tensor must be of a float dtype");
      return Float::f32;
  }
}

}  // namespace peftkern
