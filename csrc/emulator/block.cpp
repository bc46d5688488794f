#include "emulator/block.h"

#include "emulator/copies.h"
#include "emulator/races.h"
#include "emulator/symbols.h"

namespace peftkern::emulator {

Block block;
Thread* current;

std::string name(const Thread& thread) {
  return "thread (" + std::to_string(thread.index.x) + ", " + std::to_string(thread.index.y) +
         ", " + std::to_string(thread.index.z) + ")";
}

std::string name(const Place& place) {
  if (place.caller) return line_of(place.caller);
  return std::string(place.line.file_name()) + ":" + std::to_string(place.line.line());
}

void Block::run(const std::function<void()>& body, uint64_t seed) {
  count_ = blockDim.x * blockDim.y * blockDim.z;
  if (threads_.size() < count_) threads_.resize(count_);
  ready_.clear();
  for (unsigned i = 0; i < count_; ++i) {
    Thread& thread = threads_[i];
    thread.index = {i % blockDim.x, i / blockDim.x % blockDim.y, i / blockDim.x / blockDim.y};
    thread.number = i;
    thread.exited = thread.at_barrier = false;
    thread.operation = nullptr;
    prepare(thread.fiber, enter);
    ready_.push_back(&thread);
  }
  arrived_ = exited_ = 0;
  state_ = seed;
  body_ = &body;
  fault_ = nullptr;
  go(outside_, next());
  if (!fault_ && exited_ < count_) {
    try {
      name_the_stuck();
    } catch (...) {
      fault_ = std::current_exception();
    }
  }
  current = nullptr;
  if (!fault_) return;
  for (unsigned i = 0; i < count_; ++i) {
    drop_copies(threads_[i]);
    forget(threads_[i].fiber);
  }
  std::rethrow_exception(fault_);
}

void Block::enter() { block.live(); }

void Block::live() {
  try {
    (*body_)();
    leave();
  } catch (...) {
    fault_ = std::current_exception();
  }
  Fiber& here = current->fiber;
  go(here, fault_ ? outside_ : next(), true);
}

void Block::leave() {
  Thread& me = *current;
  me.exited = true;
  ++exited_;
  drop_copies(me);
  for (unsigned i = 0; i < count_; ++i) {
    const Thread& other = threads_[i];
    if (other.at_barrier) {
      fail("waits in __syncthreads at " + name(other.place) + ", but " + name(me) +
               " has left the kernel without coming there",
           other);
    }
    const bool names_me = i / 32 == me.number / 32 && other.mask >> (me.number % 32) & 1;
    if (other.operation && names_me) {
      fail("waits in " + std::string(other.operation->name) + " at " + name(other.place) + " for " +
               name(me) + ", which has left the kernel",
           other);
    }
  }
}

// Who goes on: splitmix64 draws among those that can. Nobody can: whoever started the block looks
// why.
Fiber& Block::next() {
  if (ready_.empty()) return outside_;
  uint64_t draw = state_ += 0x9E3779B97F4A7C15u;
  draw = (draw ^ draw >> 30) * 0xBF58476D1CE4E5B9u;
  draw = (draw ^ draw >> 27) * 0x94D049BB133111EBu;
  const size_t chosen = (draw ^ draw >> 31) % ready_.size();
  current = ready_[chosen];
  ready_[chosen] = ready_.back();
  ready_.pop_back();
  threadIdx = current->index;
  return current->fiber;
}

void Block::pause() {
  Thread& me = *current;
  Fiber& chosen = next();
  if (&chosen != &me.fiber) go(me.fiber, chosen);
}

void Block::barrier(const Place& place) {
  Thread& me = *current;
  for (unsigned i = 0; i < count_ && (exited_ || arrived_); ++i) {
    const Thread& other = threads_[i];
    if (other.exited) {
      fail("waits in __syncthreads at " + name(place) + ", but " + name(other) +
           " has left the kernel without coming there");
    }
    if (!other.at_barrier) continue;
    if (other.place.line.line() != place.line.line()) {
      fail("comes to __syncthreads at " + name(place) + ", while " + name(other) +
           " waits in another, at " + name(other.place));
    }
    if (!exited_) break;
  }
  me.at_barrier = true;
  me.place = place;
  if (++arrived_ == count_) {
    arrived_ = 0;
    for (unsigned i = 0; i < count_; ++i) {
      threads_[i].at_barrier = false;
      ready_.push_back(&threads_[i]);
    }
    races::barrier();
  }
  pause();
}

void Block::meet(const Operation& operation, uint32_t mask, Lane& lane, const Place& place) {
  Thread& me = *current;
  const unsigned first = me.number / 32 * 32;
  const std::string called = operation.name;
  if (!(mask >> (me.number - first) & 1)) {
    fail("calls " + called + " at " + name(place) + " with a mask that lacks its own lane");
  }
  Thread* lanes[32] = {};
  bool complete = true;
  for (unsigned i = 0; i < 32; ++i) {
    if (!(mask >> i & 1)) continue;
    Thread* other = lanes[i] = at(first + i);
    if (!other || other->exited) {
      fail("calls " + called + " at " + name(place) + " with a mask that names lane " +
           std::to_string(i) + ", which " + (other ? "has left the kernel" : "the block lacks"));
    }
    if (other == &me) continue;
    complete &= other->operation != nullptr;
    if (!other->operation || !(other->mask >> (me.number - first) & 1)) continue;
    if (other->operation != &operation || other->mask != mask ||
        other->place.line.line() != place.line.line()) {
      fail("calls " + called + " at " + name(place) + ", while " + name(*other) +
           ", which its mask names, waits in " + other->operation->name + " at " +
           name(other->place));
    }
  }
  me.operation = &operation;
  me.mask = mask;
  me.place = place;
  me.lane = lane;
  if (complete) {
    operation.perform(lanes, mask);
    for (Thread* other : lanes) {
      if (!other) continue;
      other->operation = nullptr;
      ready_.push_back(other);
    }
  }
  pause();
  lane = me.lane;
}

// Nobody can go on, so everybody waits for somebody else; one of them is enough.
void Block::name_the_stuck() {
  for (unsigned i = 0; i < count_; ++i) {
    const Thread& me = threads_[i];
    if (!me.operation) continue;
    for (unsigned k = 0; k < 32; ++k) {
      const Thread* other = at(i / 32 * 32 + k);
      if (!other || !(me.mask >> k & 1) || (other->operation && other->mask == me.mask)) continue;
      fail("waits in " + std::string(me.operation->name) + " at " + name(me.place) + " for " +
               name(*other) + ", which waits in " +
               (other->operation ? other->operation->name : "__syncthreads") + " at " +
               name(other->place),
           me);
    }
  }
  fail("waits for ever", threads_[0]);
}

unsigned lane_number() { return current->number % 32; }

void meet(const Operation& operation, uint32_t mask, Lane& lane, const Place& place) {
  block.meet(operation, mask, lane, place);
}

}  // namespace peftkern::emulator
