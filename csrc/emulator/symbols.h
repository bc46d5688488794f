// What the program's own symbol table and debug information tell of a kernel.
#pragma once
#include <cstddef>
#include <string>
#include <vector>

namespace peftkern::emulator {

struct Array {
  std::string name;
  char* begin;
  size_t bytes;
};

struct Kernel {
  std::string name;
  std::vector<Array> shared;  // its `__shared__` variables
  size_t shared_bytes = 0;
};

// A `__shared__` variable is a static one of the function that is the kernel: its mangled name
// begins with that of the function, whatever templates it comes from. GCC drops the attribute that
// would gather them in a section of their own when it instantiates a template (bug 41091).
const Kernel& kernel_at(const void* function);

// "file:line" of the instruction before this return address, followed by the lines that it was
// inlined into.
std::string line_of(const void* address);

}  // namespace peftkern::emulator
