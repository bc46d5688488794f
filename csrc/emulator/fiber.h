// A stack of its own for every thread of a block, and the way from one to another.
#pragma once
#include <cstddef>

namespace peftkern::emulator {

struct Fiber {
  void* stack = nullptr;  // its lowest address
  size_t bytes = 0;
  void* top = nullptr;   // where it goes on
  void* fake = nullptr;  // AddressSanitizer's record of it
};

// The next `go` to this fiber calls `entry`, which must never return. A stack is made once and
// kept.
void prepare(Fiber& fiber, void (*entry)());

// Leaves `from`, which somebody may go to later; `ended` says that nobody will.
void go(Fiber& from, Fiber& to, bool ended = false);

// For stacks that were left in the middle of a function: AddressSanitizer forgets what lay on them.
void forget(Fiber& fiber);

}  // namespace peftkern::emulator
