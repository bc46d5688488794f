// One block at a time: its threads as fibers, each running until it has to wait for another; who
// goes on then is drawn by lot, so that no order of threads is relied upon.
#pragma once
#include <cstdint>
#include <exception>
#include <functional>
#include <string>
#include <vector>

#include "emulator/fiber.h"
#include "emulator/vectors.h"
#include "emulator/warp.h"

inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;
inline constexpr int warpSize = 32;

namespace peftkern::emulator {

// A copy under way: what it brings is seen in `to` only once it was waited for.
struct Copy {
  char* to;
  char data[16];
};

struct Thread {
  Fiber fiber;
  uint3 index;
  unsigned number;
  bool exited, at_barrier;
  Place place;                 // of what it waits for
  const Operation* operation;  // the meeting it waits in, or null
  uint32_t mask;
  Lane lane;
  std::vector<Copy> copies;
  std::vector<size_t> groups;  // how many copies each group that was committed has
};

class Block {
 public:
  // Runs `body` once for each of blockDim's threads; what one of them throws comes out here.
  void run(const std::function<void()>& body, uint64_t seed);
  void barrier(const Place& place);
  void meet(const Operation& operation, uint32_t mask, Lane& lane, const Place& place);
  Thread* at(unsigned number) { return number < count_ ? &threads_[number] : nullptr; }

 private:
  static void enter();
  void live();
  void leave();
  void pause();
  Fiber& next();
  [[noreturn]] void name_the_stuck();

  std::vector<Thread> threads_;  // more than this block has, when another had more
  std::vector<Thread*> ready_;
  unsigned count_ = 0, arrived_ = 0, exited_ = 0;
  uint64_t state_ = 0;  // of the lot
  Fiber outside_;
  const std::function<void()>* body_ = nullptr;
  std::exception_ptr fault_;
};

extern Block block;
extern Thread* current;  // null outside kernels

std::string name(const Thread& thread);
std::string name(const Place& place);

// The thread's fault, said with kernel, block, thread and seed.
[[noreturn]] void fail(const std::string& what, const Thread& thread);
[[noreturn]] inline void fail(const std::string& what) { fail(what, *current); }

}  // namespace peftkern::emulator

inline void __syncthreads(const std::source_location& where = std::source_location::current()) {
  peftkern::emulator::block.barrier({where});
}
inline void __threadfence() {}
inline void __threadfence_block() {}
