#include "emulator/run.h"

#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <numeric>
#include <random>

#include "emulator/races.h"
#include "emulator/shared.h"
#include "emulator/symbols.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

namespace peftkern::emulator {
namespace {

const Kernel* running;
uint64_t seed;

std::string scene(const Thread& thread) {
  const auto triple = [](const auto& v) {
    return "(" + std::to_string(v.x) + ", " + std::to_string(v.y) + ", " + std::to_string(v.z) +
           ")";
  };
  return "in " + running->name + ", block " + triple(blockIdx) + ", " + name(thread) + ", seed " +
         std::to_string(seed);
}

uint64_t draw_seed() {
  static uint64_t launches;
  const char* chosen = std::getenv("PEFTKERN_EMULATOR_SEED");
  return chosen ? std::strtoull(chosen, nullptr, 10) : ++launches;
}

#if defined(__SANITIZE_ADDRESS__)
// A sanitizer ends the process; this is said before it does.
void say_where() {
  if (current) std::fprintf(stderr, "%s\n", scene(*current).c_str());
}
#endif

bool exceeds_limits(dim3 grid, dim3 block) {
  const auto threads = uint64_t{block.x} * block.y * block.z;
  return !grid.x || !grid.y || !grid.z || grid.x > kMaxX || grid.y > kMaxGridYZ ||
         grid.z > kMaxGridYZ || !threads || block.x > kMaxThreads || block.y > kMaxThreads ||
         block.z > kMaxBlockZ || threads > kMaxThreads;
}

}  // namespace

void fail(const std::string& what, const Thread& thread) {
  throw Fault(name(thread) + " " + what + "\n  " + scene(thread));
}

cudaError_t run(const void* kernel, dim3 grid, dim3 dimensions, size_t shared,
                const std::function<void()>& body) {
  static std::mutex one_at_a_time;
  const std::lock_guard lock(one_at_a_time);
  if (exceeds_limits(grid, dimensions)) return cudaErrorInvalidConfiguration;
  running = &kernel_at(kernel);
  if (running->shared_bytes > kMaxStaticShared) return cudaErrorInvalidValue;
  if (running->shared_bytes + shared > kMaxShared) return cudaErrorInvalidValue;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_set_death_callback(say_where);
#endif
  seed = draw_seed();
  std::mt19937_64 lot(seed);
  const SharedMemory memory(*running, shared);
  races::begin(memory.arrays());
  gridDim = grid;
  blockDim = dimensions;
  const uint64_t blocks = uint64_t{grid.x} * grid.y * grid.z;
  // Odd steps through a power of two reach every block once.
  const uint64_t steps = std::bit_ceil(blocks), step = lot() | 1, first = lot();
  for (uint64_t i = 0; i < steps; ++i) {
    const uint64_t b = (first + i * step) & (steps - 1);
    if (b >= blocks) continue;
    blockIdx = {static_cast<unsigned>(b % grid.x), static_cast<unsigned>(b / grid.x % grid.y),
                static_cast<unsigned>(b / grid.x / grid.y)};
    memory.poison();
    races::begin_block();
    block.run(body, lot());
  }
  return cudaSuccess;
}

}  // namespace peftkern::emulator
