// Atomics. Fibers give way at barriers and in meetings alone, so plain accesses are atomic here;
// the race detector is told what they are.
#pragma once
#include <cstddef>
#include <type_traits>

namespace peftkern::emulator {

void note_atomic(const void* address, size_t bytes, const void* caller);

// Not inlined and not watched: its caller's line is the one that a report should name.
template <typename T, typename Function>
__attribute__((noinline, no_sanitize("thread"))) T exchange(T* address, const Function& next,
                                                            const void* caller) {
  note_atomic(address, sizeof(T), caller);
  const T before = *address;
  *address = next(before);
  return before;
}

}  // namespace peftkern::emulator

#define PEFTKERN_ATOMIC(name, next)                                                        \
  template <typename T>                                                                    \
  __attribute__((noinline, no_sanitize("thread"))) T name(T* address,                      \
                                                          std::type_identity_t<T> value) { \
    return peftkern::emulator::exchange(                                                   \
        address, [&]([[maybe_unused]] T before) { return static_cast<T>(next); },          \
        __builtin_return_address(0));                                                      \
  }
PEFTKERN_ATOMIC(atomicAdd, before + value)
PEFTKERN_ATOMIC(atomicSub, before - value)
PEFTKERN_ATOMIC(atomicMin, before < value ? before : value)
PEFTKERN_ATOMIC(atomicMax, before > value ? before : value)
PEFTKERN_ATOMIC(atomicAnd, before& value)
PEFTKERN_ATOMIC(atomicOr, before | value)
PEFTKERN_ATOMIC(atomicXor, before ^ value)
PEFTKERN_ATOMIC(atomicExch, value)
#undef PEFTKERN_ATOMIC

template <typename T>
__attribute__((noinline, no_sanitize("thread"))) T atomicCAS(T* address,
                                                             std::type_identity_t<T> expected,
                                                             std::type_identity_t<T> value) {
  return peftkern::emulator::exchange(
      address, [&](T before) { return before == expected ? value : before; },
      __builtin_return_address(0));
}
