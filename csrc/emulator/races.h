// The race detector on shared memory: two threads, one byte, at least one write, and nothing
// between that orders them. __syncthreads orders all threads of a block, __syncwarp those that its
// mask names, cp.async's wait the thread with its own copies; shuffles and votes order nothing.
//
// Kernels compiled with -fsanitize=thread call one of the compiler's hooks at every access;
// hooks.cpp has them, in place of the compiler's own runtime. Without PEFTKERN_RACES all of this is
// empty.
#pragma once
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "emulator/symbols.h"
#include "emulator/warp.h"

namespace peftkern::emulator::races {

// `caller`: the address that the hook returns to, from which a report has its line.
#if defined(PEFTKERN_RACES)
void begin(const std::vector<Array>& arrays);
void begin_block();
void barrier();
void syncwarp(Thread* const* lanes, uint32_t mask);
void access(Thread& thread, const void* address, size_t bytes, bool write, bool atomic,
            const void* caller);
void begin_copy(void* to, const void* caller);
void end_copy(void* to, const void* caller);
#else
inline void begin(const std::vector<Array>&) {}
inline void begin_block() {}
inline void barrier() {}
inline void syncwarp(Thread* const*, uint32_t) {}
inline void access(Thread&, const void*, size_t, bool, bool, const void*) {}
inline void begin_copy(void*, const void*) {}
inline void end_copy(void*, const void*) {}
#endif

}  // namespace peftkern::emulator::races
