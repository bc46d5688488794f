// Shared memory of the block that runs.
#pragma once
#include <cstddef>
#include <vector>

#include "emulator/symbols.h"

namespace peftkern::emulator {

// The kernel's own arrays, and a dynamic one of exactly so many bytes. AddressSanitizer lays red
// zones around each.
class SharedMemory {
 public:
  SharedMemory(const Kernel& kernel, size_t dynamic_bytes);
  ~SharedMemory();
  SharedMemory(const SharedMemory&) = delete;
  SharedMemory& operator=(const SharedMemory&) = delete;

  const std::vector<Array>& arrays() const { return arrays_; }
  void poison() const;  // NaN in every float type, so that what a block did not write shows

 private:
  std::vector<Array> arrays_;
};

void* dynamic_shared();

}  // namespace peftkern::emulator
