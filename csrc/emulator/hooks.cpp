// What -fsanitize=thread calls: the race detector's eyes, where the compiler's own runtime is not
// linked. Host code compiled along with kernels calls them too, and is not looked at.
#if defined(PEFTKERN_RACES)
#include "emulator/block.h"
#include "emulator/races.h"

using namespace peftkern::emulator;

namespace {

void look(const void* address, size_t bytes, size_t alignment, bool write, const void* caller) {
  if (reinterpret_cast<uintptr_t>(address) % alignment) {
    fail(std::string(write ? "writes " : "reads ") + std::to_string(bytes) +
         " bytes at an address that is no multiple of it, at " + line_of(caller));
  }
  races::access(*current, address, bytes, write, false, caller);
}

// The compiler believes that its hooks throw nothing, so nothing may pass through a kernel from
// here.
void note(const void* address, size_t bytes, size_t alignment, bool write, const void* caller) {
  if (!current) return;
  std::exception_ptr fault;
  try {
    look(address, bytes, alignment, write, caller);
  } catch (...) {
    fault = std::current_exception();
  }
  if (fault) block.stop(fault);
}

}  // namespace

extern "C" {

void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void*, void*) {}
void __tsan_vptr_read(void*) {}

#define PEFTKERN_HOOKS(bytes)                                        \
  void __tsan_read##bytes(void* address) {                           \
    note(address, bytes, bytes, false, __builtin_return_address(0)); \
  }                                                                  \
  void __tsan_write##bytes(void* address) {                          \
    note(address, bytes, bytes, true, __builtin_return_address(0));  \
  }                                                                  \
  void __tsan_volatile_read##bytes(void* address) {                  \
    note(address, bytes, bytes, false, __builtin_return_address(0)); \
  }                                                                  \
  void __tsan_volatile_write##bytes(void* address) {                 \
    note(address, bytes, bytes, true, __builtin_return_address(0));  \
  }
PEFTKERN_HOOKS(1)
PEFTKERN_HOOKS(2)
PEFTKERN_HOOKS(4)
PEFTKERN_HOOKS(8)
PEFTKERN_HOOKS(16)

void __tsan_read_range(void* address, size_t bytes) {
  note(address, bytes, 1, false, __builtin_return_address(0));
}
void __tsan_write_range(void* address, size_t bytes) {
  note(address, bytes, 1, true, __builtin_return_address(0));
}
}
#endif
