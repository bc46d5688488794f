#include "emulator/shared.h"

#include <cstdlib>
#include <cstring>
#include <new>

namespace peftkern::emulator {
namespace {

void* dynamic;

}  // namespace

SharedMemory::SharedMemory(const Kernel& kernel, size_t dynamic_bytes) : arrays_(kernel.shared) {
  if (posix_memalign(&dynamic, 16, dynamic_bytes)) throw std::bad_alloc();
  arrays_.push_back({"dynamic_shared()", static_cast<char*>(dynamic), dynamic_bytes});
}

SharedMemory::~SharedMemory() { std::free(dynamic); }

void SharedMemory::poison() const {
  for (const Array& array : arrays_) std::memset(array.begin, 0xFF, array.bytes);
}

void* dynamic_shared() { return dynamic; }

}  // namespace peftkern::emulator
