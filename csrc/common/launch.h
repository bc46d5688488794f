// The only way a kernel starts: on a GPU, or, in a build for the emulator, on the host.
#pragma once
#include <cuda_runtime.h>

#include <cstddef>

#if defined(PEFTKERN_EMULATED)
#include "emulator/run.h"
#endif

namespace peftkern {

// What a block may take of shared memory without being asked; more has to be allowed first.
inline constexpr size_t kPlainShared = size_t{48} << 10;

// Starts `kernel` on this stream of the current device, and does not wait for it. `shared`: bytes
// of dynamic shared memory (ptx::dynamic_shared()). Arguments are converted to the parameters'
// types. A grid of zero blocks is an error.
template <typename... Params, typename... Args>
cudaError_t launch(void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared,
                   cudaStream_t stream, Args... args) {
#if defined(PEFTKERN_EMULATED)
  static_cast<void>(stream);  // a launch is over when it returns
  return emulator::run(kernel, grid, block, shared, args...);
#else
  if (shared > kPlainShared) {
    const cudaError_t status = cudaFuncSetAttribute(
        kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
    if (status != cudaSuccess) return status;
  }
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared;
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, args...);
#endif
}

}  // namespace peftkern
