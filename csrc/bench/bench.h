// bench: what the machine can do, as the floors of every benchmark.
//   read(buffer)  = sum of buffer[i], modulo 2^64: every byte is loaded once and nothing is stored
//   write(buffer) : buffer[i] = kFill: every byte is stored once and nothing is loaded
// buffer [words], 64-bit words, dense. The sum does not depend on how a caller splits the buffer.
// Both are serial over the words they are given: threads belong to the caller.
#pragma once
#include <cstdint>

#include "common/isa.h"

namespace peftkern::bench {

// Read as float32 this is 0.747: no slow denormals for whoever computes with the buffer afterwards.
inline constexpr uint64_t kFill = 0x3f3f3f3f3f3f3f3f;

struct Table {
  uint64_t (*read)(const uint64_t* buffer, int64_t words);
  void (*write)(uint64_t* buffer, int64_t words);
};

PEFTKERN_DECLARE(Table, table)

}  // namespace peftkern::bench
