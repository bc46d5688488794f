#include "emulator/races.h"

#include <algorithm>

#include "emulator/block.h"

#if defined(PEFTKERN_RACES)

namespace peftkern::emulator::races {
namespace {

// One access to some of a word's four bytes.
struct Record {
  const void* caller;
  uint32_t epoch;  // the number of barriers and of blocks before it
  uint32_t clock;  // of its thread
  uint16_t thread;
  uint8_t bytes;
  bool write, atomic;
};

// Of more readers than this, the last ones are remembered: a writer that races with many races with
// those too, unless it is ordered after just them.
constexpr int kRecords = 6;

struct Word {
  Record records[kRecords];
  uint32_t block;           // the one that the next two are about
  uint8_t written, coming;  // bytes
  uint16_t copier;
  const void* copied_at;
};

// Time within a warp: a lane's own clock, and how much of the other lanes' it has seen.
struct Clocks {
  uint32_t seen[32];
};

std::vector<Array> watched;
std::vector<Word> words;  // of each array in turn
std::vector<Clocks> clocks;
uint32_t epoch, blocks, turn;

size_t words_of(const Array& array) { return (array.bytes + 3) / 4; }

// The first word's place, if the address lies in shared memory; and in which array.
const Array* find(const char* address, size_t& place) {
  place = 0;
  for (const Array& array : watched) {
    if (address >= array.begin && address < array.begin + array.bytes) return &array;
    place += words_of(array);
  }
  return nullptr;
}

std::string bytes_of(const Array& array, const char* address, size_t bytes) {
  const auto first = static_cast<size_t>(address - array.begin);
  return "bytes " + std::to_string(first) + " to " + std::to_string(first + bytes - 1) +
         " of shared " + array.name;
}

const char* verb(bool write) { return write ? "writes" : "reads"; }

struct Access {
  Thread& thread;
  const Array& array;
  const char* address;
  size_t size;
  bool write, atomic;
  const void* caller;

  [[noreturn]] void report(const std::string& rest) const {
    fail(verb(write) + (" " + bytes_of(array, address, size)) + " at " + line_of(caller) + ", " +
             rest,
         thread);
  }

  bool is_after(const Record& record) const {
    return record.thread / 32 == thread.number / 32 &&
           clocks[thread.number].seen[record.thread % 32] >= record.clock;
  }

  void to_word(Word& word, uint8_t bytes, bool landing) const {
    if (word.block != blocks) {
      word = {};
      word.block = blocks;
    }
    if (!landing && (word.coming & bytes)) {
      report("which a cp.async of " + name(*block.at(word.copier)) + " at " +
             line_of(word.copied_at) + " has not been waited for");
    }
    if ((!write || atomic) && (bytes & ~word.written)) report("which nobody has written");
    Record* mine = nullptr;
    for (Record& record : word.records) {
      if (record.epoch != epoch) {
        mine = &record;
      } else if (record.thread == thread.number) {
        if ((record.bytes | bytes) == bytes && (write || !record.write)) mine = &record;
      } else if ((record.bytes & bytes) && (write || record.write) && !(atomic && record.atomic) &&
                 !is_after(record)) {
        report("and " + name(*block.at(record.thread)) + " " + verb(record.write) + " them at " +
               line_of(record.caller) + ", with no barrier between");
      }
    }
    if (!mine) mine = &word.records[turn++ % kRecords];
    *mine = {caller,
             epoch,
             clocks[thread.number].seen[thread.number % 32],
             static_cast<uint16_t>(thread.number),
             bytes,
             write,
             atomic};
    if (write) word.written |= bytes;
  }

  // Calls function(word, bytes of it) for each word touched.
  template <typename Function>
  void each_word(size_t place, const Function& function) const {
    auto first = static_cast<size_t>(address - array.begin);
    const size_t end = std::min(first + size, array.bytes);
    while (first < end) {
      const size_t within = first % 4, count = std::min(end - first, 4 - within);
      function(words[place + first / 4], static_cast<uint8_t>(((1 << count) - 1) << within));
      first += count;
    }
  }
};

}  // namespace

void begin(const std::vector<Array>& arrays) {
  watched = arrays;
  size_t count = 0;
  for (const Array& array : watched) count += words_of(array);
  words.assign(count, {});
  clocks.resize(1024);
}

void begin_block() {
  ++epoch;
  ++blocks;
  for (size_t i = 0; i < clocks.size(); ++i) {
    clocks[i] = {};
    clocks[i].seen[i % 32] = 1;
  }
}

void barrier() { ++epoch; }

void syncwarp(Thread* const* lanes, uint32_t mask) {
  Clocks joined{};
  for (unsigned i = 0; i < 32; ++i) {
    if (!(mask >> i & 1)) continue;
    const Clocks& mine = clocks[lanes[i]->number];
    for (int k = 0; k < 32; ++k) joined.seen[k] = std::max(joined.seen[k], mine.seen[k]);
  }
  for (unsigned i = 0; i < 32; ++i) {
    if (!(mask >> i & 1)) continue;
    clocks[lanes[i]->number] = joined;
    ++clocks[lanes[i]->number].seen[i];
  }
}

void access(Thread& thread, const void* address, size_t bytes, bool write, bool atomic,
            const void* caller) {
  size_t place;
  const auto* begin = static_cast<const char*>(address);
  const Array* array = find(begin, place);
  if (!array) return;
  const Access access{thread, *array, begin, bytes, write, atomic, caller};
  access.each_word(place, [&](Word& word, uint8_t mask) { access.to_word(word, mask, false); });
}

// A copy writes from the moment that it starts, and its bytes are nobody's until it was waited for.
void begin_copy(void* to, const void* caller) {
  access(*current, to, 16, true, false, caller);
  size_t place;
  const Array* array = find(static_cast<char*>(to), place);
  if (!array) fail("copies to memory that is not shared, at " + line_of(caller));
  const Access access{*current, *array, static_cast<char*>(to), 16, true, false, caller};
  access.each_word(place, [&](Word& word, uint8_t mask) {
    word.coming |= mask;
    word.copier = static_cast<uint16_t>(current->number);
    word.copied_at = caller;
  });
}

void end_copy(void* to, const void* caller) {
  size_t place;
  const Array* array = find(static_cast<char*>(to), place);
  const Access access{*current, *array, static_cast<char*>(to), 16, true, false, caller};
  access.each_word(place, [&](Word& word, uint8_t mask) {
    access.to_word(word, mask, true);
    word.coming &= static_cast<uint8_t>(~mask);
  });
}

}  // namespace peftkern::emulator::races
#endif

namespace peftkern::emulator {

void note_atomic(const void* address, size_t bytes, const void* caller) {
  races::access(*current, address, bytes, true, true, caller);
}

}  // namespace peftkern::emulator
