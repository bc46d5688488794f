// Runs a CUDA kernel on the host, unmodified. To use it: `make emulated`, or after a change
//   cmake --build build/tests --target peftkern_emulated_races
//   PEFTKERN_EMULATED_LIBRARY=build/tests/_emulated_races.so python -m pytest -k emulated
//
// A fault is thrown as a Fault whose text names kernel, block, thread, lines and seed. Threads take
// turns by lot: PEFTKERN_EMULATOR_SEED=<seed of the report> gives every launch those same turns.
// Blocks run one after another, in an order drawn as well: what waits for another waits forever.
#pragma once
#include <cuda_runtime.h>

#include <cstddef>
#include <functional>
#include <stdexcept>
#include <tuple>

namespace peftkern::emulator {

struct Fault : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Limits of the devices that we build for, each the least among them (sm_80 to sm_100).
inline constexpr unsigned kMaxThreads = 1024, kMaxGridYZ = 65535;
inline constexpr unsigned kMaxX = 0x7FFFFFFF, kMaxBlockZ = 64;
inline constexpr size_t kMaxShared = size_t{99} << 10, kMaxStaticShared = size_t{48} << 10;

// `body` is the call of one thread; `kernel` names it in reports.
cudaError_t run(const void* kernel, dim3 grid, dim3 block, size_t shared,
                const std::function<void()>& body);

template <typename... Params, typename... Args>
cudaError_t run(void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared, Args... args) {
  const std::tuple<Params...> converted(static_cast<Params>(args)...);
  return run(reinterpret_cast<const void*>(kernel), grid, block, shared,
             [&] { std::apply(kernel, converted); });
}

}  // namespace peftkern::emulator
