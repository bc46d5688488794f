// What the bindings of sparse take: patterns, and the memory that a call works in.
#pragma once
#include <atomic>
#include <numeric>

#include "common/convert.h"
#include "sparse/sparse.h"

namespace peftkern::sparse {

inline ScalarType sums_of(ScalarType dtype) {
  return dtype == ScalarType::Double ? dtype : ScalarType::Float;
}
template <typename T>
using SumOf = std::conditional_t<std::is_same_v<T, double>, double, float>;

// A pattern of an op's arguments, read through once: what it says decides where kernels write.
inline Pattern pattern_of(const std::vector<Tensor>& tensors, const std::vector<int64_t>& layout) {
  STD_TORCH_CHECK(tensors.size() == 2 && layout.size() == 4,
                  "pattern must be two tensors, and its "
                  "layout four numbers");
  const int64_t kind = layout[0], rows = layout[1], columns = layout[2], nnz = layout[3];
  STD_TORCH_CHECK((kind == 0 || kind == 1) && rows >= 0 && columns >= 0 && nnz >= 0,
                  "layout must be a kind, rows, columns and a number of entries");
  const Tensor& positions = tensors[kind == 0 ? 0 : 1];
  const Tensor& places = tensors[kind == 0 ? 1 : 0];
  const bool wide = nnz >= int64_t{1} << 31;
  check_dtype(positions, "a pattern's positions", wide ? ScalarType::Long : ScalarType::Int);
  check_count(positions, "a pattern's positions", kind == 0 ? rows + 1 : rows * tiles_of(columns));
  const bool small = kind == 0 && is_small(columns);
  check_dtype(places, "a pattern's places", small ? ScalarType::UInt16 : ScalarType::Int);
  check_count(places, "a pattern's places", kind == 0 ? nnz : rows * words_of(columns));
  const Pattern pattern{
      kind == 1, rows, columns, nnz, places.const_data_ptr(), positions.const_data_ptr(), wide};
  std::atomic<bool> holds{true};
  const int64_t work = (kind == 0 ? nnz : rows * words_of(columns)) / std::max<int64_t>(1, rows);
  parallel(rows, work / 8 + 1, [&](int64_t begin, int64_t end) {
    if (!kernels().holds(pattern, begin, end)) holds = false;
  });
  STD_TORCH_CHECK(holds, "pattern must have its entries inside of the matrix and in order");
  return pattern;
}

template <typename A>
const A* values_of(const Tensor& values, const Pattern& pattern) {
  check_count(values, "values", pattern.nnz);
  check_dtype(values, "values", std::is_same_v<A, double> ? ScalarType::Double : ScalarType::Float);
  return static_cast<const A*>(values.const_data_ptr());
}

// How a matrix of outputs is cut: so that the operand of a block of columns stays in a core's own
// cache, and so that every thread has as many blocks as the others.
class Plan {
 public:
  int64_t length;               // tokens of a block
  int64_t width;                // columns of a block
  int64_t blocks, parts, part;  // of columns; of rows; rows of a part

  static constexpr int64_t kPanel = int64_t{1} << 20, kLength = 128, kListed = int64_t{1} << 19;

  Plan(int64_t rows, int64_t columns, int64_t tokens, int64_t size) {
    length = std::min(kLength, std::max(kLanes, round_up(tokens, kLanes)));
    const int64_t most = std::max(kTile, kPanel / (length * size) / kTile * kTile);
    blocks = std::max<int64_t>(1, (columns + most - 1) / most);
    width = std::max(kTile, round_up((columns + blocks - 1) / blocks, kTile));
    blocks = std::max<int64_t>(1, (columns + width - 1) / width);
    const int64_t threads = torch::stable::get_num_threads();
    parts = std::max<int64_t>(1, std::min(threads / std::gcd(threads, blocks), rows / kStrip));
    part = round_up((rows + parts - 1) / parts, kStrip);
  }

  // For the library: the same cuts for any number of threads, and more than one, so that each
  // product runs in one thread and its bits depend on none.
  static Plan dense(int64_t rows, int64_t columns, int64_t tokens) {
    Plan plan;
    plan.length = std::min<int64_t>(512, std::max(kLanes, round_up(tokens, kLanes)));
    plan.width = std::min<int64_t>(1024, std::max(kTile, round_up(columns, kTile)));
    plan.blocks = std::max<int64_t>(1, (columns + plan.width - 1) / plan.width);
    plan.part = std::max<int64_t>(1, std::min<int64_t>(512, (rows + 1) / 2));
    plan.parts = (rows + plan.part - 1) / plan.part;
    return plan;
  }

  static int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
  int64_t tasks() const { return blocks * parts; }
  Block block(int64_t task, int64_t rows, int64_t columns) const {
    const int64_t row = task % parts * part, column = task / parts * width;
    return {std::min(row, rows), std::min(row + part, rows), column,
            std::min(column + width, columns)};
  }

 private:
  Plan() = default;
};

// The room of one thread; `listed` is that of as many entries of a bitmap.
template <typename A>
Room<A> room_for(int64_t length, int64_t width, int64_t listed, Scratch& scratch) {
  return {length,
          scratch.take<A>(width * length),
          scratch.take<A>(kStrip * length),
          scratch.take<uint32_t>(Plan::round_up(width, kWord) + kLanes),
          listed ? scratch.take<uint16_t>(listed + kLanes) : nullptr,
          listed ? scratch.take<uint32_t>(kListedRows + 1) : nullptr,
          listed};
}

}  // namespace peftkern::sparse
