// What the lanes of a warp do together. Every lane of the mask has to come, with the same mask, to
// the same place; only then does any of them go on.
#pragma once
#include <bit>
#include <cstdint>
#include <cstring>
#include <source_location>
#include <type_traits>

namespace peftkern::emulator {

// Where a thread waits: a line, or the address that the emulator returns to, from which comes one.
struct Place {
  std::source_location line;
  const void* caller = nullptr;
};

// What a lane brings to a meeting, and what it takes away.
struct Lane {
  uint32_t in[12];
  uint32_t out[4];
};

struct Thread;
// `perform` runs once all have come: lanes[i] of those in the mask.
struct Operation {
  const char* name;
  void (*perform)(Thread* const* lanes, uint32_t mask);
};
extern const Operation kSyncwarp, kShuffle, kShuffleUp, kShuffleDown, kShuffleXor, kBallot, kAny,
    kAll, kReduceAdd, kReduceMin, kReduceMax, kReduceAnd, kReduceOr, kReduceXor;

unsigned lane_number();
void meet(const Operation& operation, uint32_t mask, Lane& lane, const Place& place);

// `source`: the lane whose value is taken, or one's own where it lies beyond the segment.
template <typename T>
T shuffle(const Operation& operation, uint32_t mask, T value, unsigned source, const Place& place) {
  static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= 8);
  Lane lane{};
  std::memcpy(lane.in, &value, sizeof(T));
  lane.in[2] = source;
  meet(operation, mask, lane, place);
  std::memcpy(&value, lane.out, sizeof(T));
  return value;
}

inline uint32_t vote(const Operation& operation, uint32_t mask, uint32_t value,
                     const Place& place) {
  Lane lane{};
  lane.in[0] = value;
  meet(operation, mask, lane, place);
  return lane.out[0];
}

}  // namespace peftkern::emulator

inline void __syncwarp(unsigned mask = 0xFFFFFFFFu,
                       const std::source_location& where = std::source_location::current()) {
  peftkern::emulator::vote(peftkern::emulator::kSyncwarp, mask, 0, {where});
}

template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32,
              const std::source_location& where = std::source_location::current()) {
  using namespace peftkern::emulator;
  const unsigned segment = lane_number() & ~static_cast<unsigned>(width - 1);
  const unsigned lane =
      segment | (static_cast<unsigned>(source) & static_cast<unsigned>(width - 1));
  return shuffle(kShuffle, mask, value, lane, {where});
}

template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32,
                 const std::source_location& where = std::source_location::current()) {
  using namespace peftkern::emulator;
  const unsigned lane = lane_number(), place = lane & static_cast<unsigned>(width - 1);
  return shuffle(kShuffleUp, mask, value, place >= delta ? lane - delta : lane, {where});
}

template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32,
                   const std::source_location& where = std::source_location::current()) {
  using namespace peftkern::emulator;
  const unsigned lane = lane_number(), place = lane & static_cast<unsigned>(width - 1);
  const bool within = place + delta < static_cast<unsigned>(width);
  return shuffle(kShuffleDown, mask, value, within ? lane + delta : lane, {where});
}

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32,
                  const std::source_location& where = std::source_location::current()) {
  using namespace peftkern::emulator;
  const unsigned lane = lane_number(), last = lane | static_cast<unsigned>(width - 1);
  const unsigned other = lane ^ static_cast<unsigned>(bits);
  return shuffle(kShuffleXor, mask, value, other <= last ? other : lane, {where});
}

inline unsigned __ballot_sync(unsigned mask, int predicate,
                              const std::source_location& where = std::source_location::current()) {
  return peftkern::emulator::vote(peftkern::emulator::kBallot, mask, predicate != 0, {where});
}
inline int __any_sync(unsigned mask, int predicate,
                      const std::source_location& where = std::source_location::current()) {
  return peftkern::emulator::vote(peftkern::emulator::kAny, mask, predicate != 0, {where}) != 0;
}
inline int __all_sync(unsigned mask, int predicate,
                      const std::source_location& where = std::source_location::current()) {
  return peftkern::emulator::vote(peftkern::emulator::kAll, mask, predicate != 0, {where}) != 0;
}

// Reductions of 32-bit integers; the order of minimum and maximum is the type's.
#define PEFTKERN_REDUCE(name, type, operation)                                                    \
  inline type __reduce_##name##_sync(                                                             \
      unsigned mask, type value,                                                                  \
      const std::source_location& where = std::source_location::current()) {                      \
    constexpr uint32_t flip = std::is_signed_v<type> && operation##Flips ? 0x80000000u : 0;       \
    return static_cast<type>(flip ^ peftkern::emulator::vote(peftkern::emulator::operation, mask, \
                                                             flip ^ static_cast<uint32_t>(value), \
                                                             {where}));                           \
  }
// A signed order is the unsigned one of numbers with their first bit flipped.
inline constexpr bool kReduceAddFlips = false, kReduceMinFlips = true, kReduceMaxFlips = true,
                      kReduceAndFlips = false, kReduceOrFlips = false, kReduceXorFlips = false;
PEFTKERN_REDUCE(add, int, kReduceAdd)
PEFTKERN_REDUCE(add, unsigned, kReduceAdd)
PEFTKERN_REDUCE(min, int, kReduceMin)
PEFTKERN_REDUCE(min, unsigned, kReduceMin)
PEFTKERN_REDUCE(max, int, kReduceMax)
PEFTKERN_REDUCE(max, unsigned, kReduceMax)
PEFTKERN_REDUCE(and, unsigned, kReduceAnd)
PEFTKERN_REDUCE(or, unsigned, kReduceOr)
PEFTKERN_REDUCE(xor, unsigned, kReduceXor)
#undef PEFTKERN_REDUCE
