// sparse's CUDA kernels in the emulator, where torch cannot lead them: every block of tokens, and
// positions and columns of every width. Numbers are small and whole, so that sums are exact in any
// order.
#include <limits>
#include <numeric>
#include <vector>

#include "common/testing.h"
#include "emulator/fragments.h"
#include "sparse/sparse_cuda.h"

using namespace peftkern;
using namespace peftkern::sparse;

namespace {

// Numbers without a pattern, from 0 to below `end`.
struct Draw {
  uint32_t state = 1;
  int64_t operator()(uint32_t end) {
    state = state * 1664525u + 1013904223u;
    return (state >> 16) % end;
  }
};

float from(int64_t value, float) { return static_cast<float>(value); }
bf16 from(int64_t value, bf16) { return {emulator::to_bf16(static_cast<float>(value))}; }
fp16 from(int64_t value, fp16) { return {emulator::to_fp16(static_cast<float>(value))}; }

// Rows of so many entries each, and operands from -2 to 2 that lie apart or turned.
struct Problem {
  int64_t rows, columns, tokens;
  std::vector<int64_t> row_start{0}, places, x, grad;

  Problem(const std::vector<int64_t>& counts, int64_t columns, int64_t tokens)
      : rows(static_cast<int64_t>(counts.size())), columns(columns), tokens(tokens) {
    for (int64_t count : counts) {
      for (int64_t i = 0; i < count; ++i) places.push_back(i * columns / count);
      row_start.push_back(static_cast<int64_t>(places.size()));
    }
    Draw draw;
    for (int64_t i = 0; i < tokens * columns; ++i) x.push_back(draw(5) - 2);
    for (int64_t i = 0; i < tokens * rows; ++i) grad.push_back(draw(5) - 2);
  }

  std::vector<float> wanted(bool add) const {
    std::vector<float> out;
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t k = row_start[static_cast<size_t>(i)]; k < row_start[static_cast<size_t>(i) + 1];
           ++k) {
        int64_t sum = 0;
        for (int64_t m = 0; m < tokens; ++m) {
          sum += grad[static_cast<size_t>(m * rows + i)] *
                 x[static_cast<size_t>(m * columns + places[static_cast<size_t>(k)])];
        }
        out.push_back(0.5f * static_cast<float>(sum) + (add ? 1.0f : 0.0f));
      }
    }
    return out;
  }

  // The kernels' answer, in blocks of so many tokens. `spread`: elements from one of an operand's
  // numbers to the next.
  template <typename T, typename Position, typename Column>
  std::vector<float> found(int64_t length, bool add, bool turned, int64_t spread) const {
    const std::vector<Position> starts(row_start.begin(), row_start.end());
    const std::vector<Column> narrow(places.begin(), places.end());
    const auto nnz = static_cast<int64_t>(places.size());
    const auto lay = [&](const std::vector<int64_t>& numbers, int64_t width, std::vector<T>& to) {
      const int64_t token = turned ? spread : width * spread,
                    column = turned ? tokens * spread : spread;
      to.assign(numbers.size() * static_cast<size_t>(spread) + 1, from(99, T{}));
      for (int64_t m = 0; m < tokens; ++m) {
        for (int64_t j = 0; j < width; ++j) {
          to[static_cast<size_t>(1 + m * token + j * column)] =
              from(numbers[static_cast<size_t>(m * width + j)], T{});
        }
      }
      return Operand<T>{to.data() + 1, token, column};
    };
    std::vector<T> x_data, grad_data;
    const Operand<T> left = lay(x, columns, x_data), right = lay(grad, rows, grad_data);
    std::vector<uint4> workspace(static_cast<size_t>((rows + columns) * length) * sizeof(T) / 16);
    for (uint4& run : workspace) run = {~0u, ~0u, ~0u, ~0u};
    std::vector<float> values(static_cast<size_t>(nnz),
                              add ? 1.0f : std::numeric_limits<float>::quiet_NaN());
    const Pattern csr{
        false, rows, columns, nnz, narrow.data(), starts.data(), sizeof(Position) == 8};
    const Sampled<float> io{tokens, 0.5f, add, values.data()};
    EXPECT(sddmm_cuda(csr, left, right, io, workspace.data(), length, nullptr) == cudaSuccess);
    return values;
  }
};

// Rows that are empty, first, last and between, short, full, and longer than a warp's share.
const std::vector<int64_t> kCounts = {0, 1, 3, 0, 0, 100, 4, 5, 0, 9, 37, 0};

template <typename T>
void try_blocks() {
  const int64_t line = kLine / static_cast<int64_t>(sizeof(T));
  const Problem problem(kCounts, 100, 5 * line - 3);
  for (int64_t lines : {1, 2, 5}) {
    for (bool add : {false, true}) {
      const auto found = problem.found<T, int32_t, uint16_t>(lines * line, add, lines == 2, 1);
      EXPECT(found == problem.wanted(add));
    }
  }
}

void every_block_of_tokens_gives_the_sums() {
  try_blocks<float>();
  try_blocks<bf16>();
  try_blocks<fp16>();
}

void more_runs_than_lanes_are_taken_in_turns() {
  const Problem problem({2, 5}, 10, 700);
  const auto found = problem.found<bf16, int32_t, uint16_t>(704, false, false, 1);
  EXPECT(found == problem.wanted(false));
}

void operands_may_lie_apart() {
  const Problem problem(kCounts, 100, 70);
  for (bool turned : {false, true}) {
    const auto found = problem.found<bf16, int32_t, uint16_t>(64, false, turned, 3);
    EXPECT(found == problem.wanted(false));
  }
}

void positions_and_columns_have_every_width() {
  const Problem problem(kCounts, 100, 20), wide(kCounts, 65537, 3);
  EXPECT((problem.found<bf16, int64_t, uint16_t>(64, false, false, 1) == problem.wanted(false)));
  EXPECT((wide.found<float, int32_t, int32_t>(32, false, false, 1) == wide.wanted(false)));
}

void the_row_of_an_entry_is_found_among_many() {
  std::vector<int64_t> counts(3000);
  for (size_t i : {0u, 31u, 32u, 1023u, 1024u, 1057u, 2998u}) counts[i] = 2;
  const Problem problem(counts, 7, 5);
  EXPECT((problem.found<float, int32_t, uint16_t>(32, true, false, 1) == problem.wanted(true)));
}

void no_tokens_are_zeros() {
  const Problem problem(kCounts, 100, 0);
  for (bool add : {false, true}) {
    const auto found = problem.found<float, int32_t, uint16_t>(0, add, false, 1);
    EXPECT(found == problem.wanted(add));
  }
}

void a_workspace_stays_within_its_bound() {
  for (int64_t size : {2, 4}) {
    const int64_t line = kLine / size;
    for (int64_t rows : {int64_t{2}, int64_t{1536}, int64_t{36864}, kMostRows}) {
      for (int64_t tokens : {1, 64, 4096, 1 << 20}) {
        const int64_t length = sddmm_length(rows, tokens, size);
        EXPECT(length >= line && length % line == 0 && length < tokens + line);
        EXPECT(length * rows * size <= kMostWorkspace);
      }
    }
    EXPECT(sddmm_length(8192, 0, size) == 0);
  }
  EXPECT(sddmm_length(8192, 4096, 2) == 1024);
}

}  // namespace

int main() {
  RUN(every_block_of_tokens_gives_the_sums);
  RUN(more_runs_than_lanes_are_taken_in_turns);
  RUN(operands_may_lie_apart);
  RUN(positions_and_columns_have_every_width);
  RUN(the_row_of_an_entry_is_found_among_many);
  RUN(no_tokens_are_zeros);
  RUN(a_workspace_stays_within_its_bound);
}
