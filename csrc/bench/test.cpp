#include <vector>

#include "bench/bench.h"
#include "common/isa.h"
#include "common/testing.h"

namespace peftkern::bench {
namespace {

const Table& kernels() { return PEFTKERN_SELECT(table); }

void read_is_the_sum_for_every_length() {
  std::vector<uint64_t> buffer;
  uint64_t sum = 0;
  for (uint64_t i = 0; i < 100; ++i) {
    EXPECT(kernels().read(buffer.data(), static_cast<int64_t>(i)) == sum);
    buffer.push_back(i * i + (i << 60));
    sum += buffer.back();
  }
}

void write_fills_its_range_and_nothing_else() {
  for (int64_t begin = 0; begin < 20; ++begin) {
    for (int64_t words = 0; words < 40; ++words) {
      std::vector<uint64_t> buffer(64, 7);
      kernels().write(buffer.data() + begin, words);
      for (int64_t i = 0; i < 64; ++i) {
        const bool inside = i >= begin && i < begin + words;
        EXPECT(buffer[static_cast<size_t>(i)] == (inside ? kFill : 7));
      }
    }
  }
}

}  // namespace
}  // namespace peftkern::bench

int main() {
  using namespace peftkern;
  const Isa best = best_isa();
  for (int isa = 0; isa <= static_cast<int>(best); ++isa) {
    current_isa() = static_cast<Isa>(isa);
    RUN(bench::read_is_the_sum_for_every_length);
    RUN(bench::write_fills_its_range_and_nothing_else);
  }
}
