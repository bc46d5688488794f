#include "emulator/fiber.h"

#include <sys/mman.h>

#include <cstdint>
#include <new>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace peftkern::emulator {
namespace {

constexpr size_t kStack = size_t{256} << 10, kGuard = size_t{4} << 10;
[[maybe_unused]] constexpr size_t kFirstFrames = size_t{4} << 10;

Fiber* leaving;            // the fiber that the last switch left
Fiber* arriving;           // and the one that it went to
void (*first_function)();  // of a fiber that starts

void arrive() {
#if defined(__SANITIZE_ADDRESS__)
  const void* stack;
  __sanitizer_finish_switch_fiber(arriving->fake, &stack, &leaving->bytes);
  leaving->stack = const_cast<void*>(stack);  // nobody else knows that of the stack of main
#endif
}

void start() {
  arrive();
  first_function();
}

}  // namespace

#if defined(__x86_64__)
// What a function has to keep lies on the stack that is left. swapcontext would save the signal
// mask as well: two system calls, a hundred times the cost.
extern "C" void peftkern_emulator_switch(void** from, void* to);
asm(R"(
.text
.type peftkern_emulator_switch, @function
.hidden peftkern_emulator_switch
.globl peftkern_emulator_switch
peftkern_emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size peftkern_emulator_switch, . - peftkern_emulator_switch
)");

void prepare_top(Fiber& fiber) {
  auto* top = reinterpret_cast<uintptr_t*>(static_cast<char*>(fiber.stack) + fiber.bytes);
  *--top = 0;  // the address that `start` would return to
  *--top = reinterpret_cast<uintptr_t>(&start);
  for (int i = 0; i < 6; ++i) *--top = 0;
  fiber.top = top;
}

void swap(Fiber& from, Fiber& to) { peftkern_emulator_switch(&from.top, to.top); }
#else
void prepare_top(Fiber& fiber) {
  auto* context = fiber.top ? static_cast<ucontext_t*>(fiber.top) : new ucontext_t;
  getcontext(context);
  context->uc_stack.ss_sp = fiber.stack;
  context->uc_stack.ss_size = fiber.bytes;
  makecontext(context, start, 0);
  fiber.top = context;
}

void swap(Fiber& from, Fiber& to) {
  if (!from.top) from.top = new ucontext_t;
  swapcontext(static_cast<ucontext_t*>(from.top), static_cast<ucontext_t*>(to.top));
}
#endif

void prepare(Fiber& fiber, void (*entry)()) {
  if (!fiber.stack) {
    void* memory = mmap(nullptr, kStack + kGuard, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    mprotect(memory, kGuard, PROT_NONE);  // a stack that overflows ends here, not in another's
    fiber.stack = static_cast<char*>(memory) + kGuard;
    fiber.bytes = kStack;
  }
#if defined(__SANITIZE_ADDRESS__)
  // The functions that a fiber ended in have never returned: their frames are still fenced off.
  __asan_unpoison_memory_region(static_cast<char*>(fiber.stack) + fiber.bytes - kFirstFrames,
                                kFirstFrames);
#endif
  fiber.fake = nullptr;
  first_function = entry;
  prepare_top(fiber);
}

void go(Fiber& from, Fiber& to, [[maybe_unused]] bool ended) {
  leaving = &from;
  arriving = &to;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(ended ? nullptr : &from.fake, to.stack, to.bytes);
#endif
  swap(from, to);
  arrive();
}

void forget([[maybe_unused]] Fiber& fiber) {
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(fiber.stack, fiber.bytes);
#endif
}

}  // namespace peftkern::emulator
