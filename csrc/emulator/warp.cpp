// What the lanes get from each other, once all have come.
#include "emulator/warp.h"

#include <string>

#include "emulator/block.h"
#include "emulator/races.h"

namespace peftkern::emulator {
namespace {

using Lanes = Thread* const*;

template <typename Function>
void each(Lanes lanes, uint32_t mask, const Function& function) {
  for (unsigned i = 0; i < 32; ++i) {
    if (mask >> i & 1) function(i, *lanes[i]);
  }
}

void pick(Lanes lanes, uint32_t mask) {
  each(lanes, mask, [&](unsigned, Thread& thread) {
    const uint32_t source = thread.lane.in[2];
    if (!(mask >> source & 1)) {
      fail("takes lane " + std::to_string(source) + " in " + thread.operation->name + " at " +
               name(thread.place) + ", which its mask does not name",
           thread);
    }
    thread.lane.out[0] = lanes[source]->lane.in[0];
    thread.lane.out[1] = lanes[source]->lane.in[1];
  });
}

// All get the same: what `combine` makes of what each brought.
template <typename Combine>
void fold(Lanes lanes, uint32_t mask, uint32_t start, const Combine& combine) {
  each(lanes, mask,
       [&](unsigned i, Thread& thread) { start = combine(start, thread.lane.in[0], i); });
  each(lanes, mask, [&](unsigned, Thread& thread) { thread.lane.out[0] = start; });
}

void ballot(Lanes lanes, uint32_t mask) {
  fold(lanes, mask, 0, [](uint32_t a, uint32_t b, unsigned i) { return a | b << i; });
}
void bit_or(Lanes lanes, uint32_t mask) {
  fold(lanes, mask, 0, [](uint32_t a, uint32_t b, unsigned) { return a | b; });
}
void bit_and(Lanes lanes, uint32_t mask) {
  fold(lanes, mask, ~0u, [](uint32_t a, uint32_t b, unsigned) { return a & b; });
}
void bit_xor(Lanes lanes, uint32_t mask) {
  fold(lanes, mask, 0, [](uint32_t a, uint32_t b, unsigned) { return a ^ b; });
}
void sum(Lanes lanes, uint32_t mask) {
  fold(lanes, mask, 0, [](uint32_t a, uint32_t b, unsigned) { return a + b; });
}
void least(Lanes lanes, uint32_t mask) {
  fold(lanes, mask, ~0u, [](uint32_t a, uint32_t b, unsigned) { return a < b ? a : b; });
}
void greatest(Lanes lanes, uint32_t mask) {
  fold(lanes, mask, 0, [](uint32_t a, uint32_t b, unsigned) { return a > b ? a : b; });
}

}  // namespace

const Operation kSyncwarp{"__syncwarp", races::syncwarp}, kShuffle{"__shfl_sync", pick},
    kShuffleUp{"__shfl_up_sync", pick}, kShuffleDown{"__shfl_down_sync", pick},
    kShuffleXor{"__shfl_xor_sync", pick}, kBallot{"__ballot_sync", ballot},
    kAny{"__any_sync", bit_or}, kAll{"__all_sync", bit_and}, kReduceAdd{"__reduce_add_sync", sum},
    kReduceMin{"__reduce_min_sync", least}, kReduceMax{"__reduce_max_sync", greatest},
    kReduceAnd{"__reduce_and_sync", bit_and}, kReduceOr{"__reduce_or_sync", bit_or},
    kReduceXor{"__reduce_xor_sync", bit_xor};

}  // namespace peftkern::emulator
