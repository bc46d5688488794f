// The only way a kernel starts: on a GPU, or, in a build for the emulator, on the host.
#pragma once
#include <cuda_runtime.h>

#include <cstddef>

#if defined(PEFTKERN_EMULATED)
#include "emulator/run.h"
#endif

namespace peftkern {

// What a block may take of shared memory without being asked; more has to be allowed first, up to
// what a block may have on sm_86, sm_89 and sm_120, the least of all that we build for.
inline constexpr size_t kPlainShared = size_t{48} << 10, kMostShared = size_t{99} << 10;

// Starts `kernel` on this stream of the current device, and does not wait for it. `shared`: bytes
// of dynamic shared memory (ptx::dynamic_shared()), beside which a kernel has no other where they
// are more than kPlainShared. Arguments are converted to the parameters' types. A grid of zero
// blocks is an error.
template <typename... Params, typename... Args>
cudaError_t launch(void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared,
                   cudaStream_t stream, Args... args) {
#if defined(PEFTKERN_EMULATED)
  static_cast<void>(stream);  // a launch is over when it returns
  return emulator::run(kernel, grid, block, shared, args...);
#else
  if (shared > kPlainShared) {
    // The limit is the kernel's, so it is one for all: who lowered it would fail the launch that
    // another thread is at.
    const cudaError_t status = cudaFuncSetAttribute(
        kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(kMostShared));
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
