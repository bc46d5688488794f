#include "emulator/copies.h"

#include <cstdint>
#include <cstring>

#include "emulator/block.h"
#include "emulator/races.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace peftkern::emulator {
namespace {

void hide([[maybe_unused]] char* bytes) {
#if defined(__SANITIZE_ADDRESS__)
  __asan_poison_memory_region(bytes, 16);
#endif
}

void show([[maybe_unused]] char* bytes) {
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(bytes, 16);
#endif
}

void check_aligned(const void* address, const char* what, const void* caller) {
  if (reinterpret_cast<uintptr_t>(address) % 16) {
    fail(std::string("copies 16 bytes ") + what + " an address that is no multiple of 16, at " +
         line_of(caller));
  }
}

}  // namespace

void start_copy(void* to, const void* from, bool valid) {
  const void* caller = __builtin_return_address(0);
  check_aligned(to, "to", caller);
  if (valid) check_aligned(from, "from", caller);
  Copy copy{static_cast<char*>(to), {}};
  if (valid) std::memcpy(copy.data, from, 16);
  std::memset(to, 0xFF, 16);
  races::begin_copy(to, caller);
  hide(copy.to);
  current->copies.push_back(copy);
}

void commit_copies() {
  size_t committed = 0;
  for (size_t group : current->groups) committed += group;
  current->groups.push_back(current->copies.size() - committed);
}

void wait_for_copies(size_t pending) {
  std::vector<size_t>& groups = current->groups;
  std::vector<Copy>& copies = current->copies;
  if (groups.size() <= pending) return;
  const auto last = groups.end() - static_cast<std::ptrdiff_t>(pending);
  size_t done = 0;
  for (auto group = groups.begin(); group != last; ++group) done += *group;
  for (size_t i = 0; i < done; ++i) {
    show(copies[i].to);
    std::memcpy(copies[i].to, copies[i].data, 16);
    races::end_copy(copies[i].to, __builtin_return_address(0));
  }
  copies.erase(copies.begin(), copies.begin() + static_cast<std::ptrdiff_t>(done));
  groups.erase(groups.begin(), last);
}

void drop_copies(Thread& thread) {
  for (const Copy& copy : thread.copies) show(copy.to);
  thread.copies.clear();
  thread.groups.clear();
}

}  // namespace peftkern::emulator
