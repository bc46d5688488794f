// cp.async: copies of 16 bytes that a thread starts, commits in groups and waits for.
#pragma once
#include <cstddef>

namespace peftkern::emulator {

struct Thread;

// Until the thread has waited, `to` holds poison: AddressSanitizer stops whoever touches it, the
// race detector too, and without either it is NaN.
void start_copy(void* to, const void* from, bool valid);
void commit_copies();
void wait_for_copies(size_t pending);
void drop_copies(Thread& thread);

}  // namespace peftkern::emulator
