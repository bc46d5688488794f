// The binding of what turns bitmaps into patterns, and patterns into smaller ones.
#include "common/binding.h"
#include "sparse/select.h"

namespace peftkern::sparse {
namespace {

constexpr int64_t kStep = 1 << 10;  // words that a job takes

const uint32_t* words_in(const Tensor& bits) {
  check_dense(bits, "bits");
  check_dtype(bits, "bits", ScalarType::Int);
  return reinterpret_cast<const uint32_t*>(bits.const_data_ptr<int32_t>());
}

Tensor tile_counts(const Tensor& bits) {
  const uint32_t* from = words_in(bits);
  STD_TORCH_CHECK(bits.dim() == 2, "bits must be rows of words");
  constexpr int64_t kWords = kTile / kWord;
  const int64_t rows = bits.size(0), words = bits.size(1), tiles = (words + kWords - 1) / kWords;
  Tensor counts = empty({rows, tiles}, ScalarType::Int);
  int32_t* to = counts.mutable_data_ptr<int32_t>();
  parallel(rows, words * 2, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      select_kernels().tile_counts(from + row * words, words, to + row * tiles);
    }
  });
  return counts;
}

// Calls f(index i -> int64) for a tensor of int32 or int64.
template <typename Function>
void with_starts(const Tensor& starts, const char* name, const Function& f) {
  check_dense(starts, name);
  if (starts.scalar_type() == ScalarType::Long) return f(starts.const_data_ptr<int64_t>());
  check_dtype(starts, name, ScalarType::Int);
  f(starts.const_data_ptr<int32_t>());
}

Tensor columns(const Tensor& bits, const Tensor& row_start, int64_t width, int64_t nnz) {
  const uint32_t* from = words_in(bits);
  STD_TORCH_CHECK(bits.dim() == 2 && width >= 0 && bits.size(1) == words_of(width),
                  "bits must be rows of the width's words");
  const int64_t rows = bits.size(0), words = bits.size(1);
  check_count(row_start, "row_start", rows + 1);
  STD_TORCH_CHECK(nnz >= 0, "nnz must be at least 0, got ", nnz);
  const bool narrow = width <= 65536;
  Tensor found = empty({nnz}, narrow ? ScalarType::UInt16 : ScalarType::Int);
  void* to = found.mutable_data_ptr();
  with_starts(row_start, "row_start", [&](const auto* starts) {
    parallel(rows, words * 4 + nnz / std::max<int64_t>(1, rows), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        const uint32_t* own = from + row * words;
        const int64_t first = starts[row], count = select_kernels().count(own, words);
        STD_TORCH_CHECK(first >= 0 && first + count <= nnz, "row_start must be that of the bits");
        narrow ? select_kernels().columns_u16(own, words, static_cast<uint16_t*>(to) + first)
               : select_kernels().columns_i32(own, words, static_cast<int32_t*>(to) + first);
      }
    });
  });
  return found;
}

Tensor bits(const Tensor& row_start, const Tensor& columns, int64_t width) {
  check_dense(columns, "columns");
  const bool narrow = columns.scalar_type() == ScalarType::UInt16;
  if (!narrow) check_dtype(columns, "columns", ScalarType::Int);
  const int64_t rows = row_start.numel() - 1, words = words_of(width), nnz = columns.numel();
  STD_TORCH_CHECK(rows >= 0 && width >= 0, "row_start must have an element at least");
  Tensor found = empty({rows, words}, ScalarType::Int);
  auto* to = reinterpret_cast<uint32_t*>(found.mutable_data_ptr<int32_t>());
  const void* from = columns.const_data_ptr();
  with_starts(row_start, "row_start", [&](const auto* starts) {
    parallel(rows, words + nnz / std::max<int64_t>(1, rows), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        uint32_t* own = to + row * words;
        std::fill(own, own + words, 0);
        STD_TORCH_CHECK(starts[row] >= 0 && starts[row + 1] <= nnz, "row_start must end at nnz");
        for (int64_t i = starts[row]; i < starts[row + 1]; ++i) {
          const int64_t column =
              narrow ? static_cast<const uint16_t*>(from)[i] : static_cast<const int32_t*>(from)[i];
          STD_TORCH_CHECK(column >= 0 && column < width, "columns must lie within the width");
          own[column / kWord] |= uint32_t{1} << column % kWord;
        }
      }
    });
  });
  return found;
}

void prefix_onto(Tensor counts) {
  check_dense(counts, "counts");
  check_dtype(counts, "counts", ScalarType::Int);
  int32_t* to = counts.mutable_data_ptr<int32_t>();
  uint32_t before = 0;  // which may run over where the caller has more than it said
  for (int64_t i = 0; i < counts.numel(); ++i) {
    const auto own = static_cast<uint32_t>(to[i]);
    to[i] = static_cast<int32_t>(before);
    before += own;
  }
}

// How many bits are set before a position, from counts at every kStep words.
class Ranks {
 public:
  Ranks(const uint32_t* bits, int64_t words) : bits_(bits), words_(words) {
    const int64_t steps = (words + kStep - 1) / kStep;
    before_.resize(static_cast<size_t>(steps) + 1);
    parallel(steps, kStep * 2, [&](int64_t begin, int64_t end) {
      for (int64_t s = begin; s < end; ++s) {
        before_[static_cast<size_t>(s) + 1] = count(s * kStep, std::min((s + 1) * kStep, words_));
      }
    });
    for (size_t s = 1; s < before_.size(); ++s) before_[s] += before_[s - 1];
  }

  int64_t total() const { return before_.back(); }
  int64_t at_step(int64_t step) const { return before_[static_cast<size_t>(step)]; }

  // Of positions that rise, each step's words are counted once.
  template <typename Position>
  void of(const Position* positions, int64_t begin, int64_t end, Position* ranks) const {
    int64_t word = 0, rank = 0;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t position = positions[i], wanted = position / kWord;
      STD_TORCH_CHECK(position >= 0 && wanted <= words_, "row_start must lie within kept");
      if (wanted < word || wanted / kStep > word / kStep) {
        word = wanted / kStep * kStep;
        rank = at_step(wanted / kStep);
      }
      rank += count(word, wanted);
      word = wanted;
      const uint32_t before = (uint32_t{1} << position % kWord) - 1;
      const int64_t rest = before ? __builtin_popcount(bits_[wanted] & before) : 0;
      ranks[i] = static_cast<Position>(rank + rest);
    }
  }

 private:
  int64_t count(int64_t begin, int64_t end) const {
    return select_kernels().count(bits_ + begin, end - begin);
  }

  const uint32_t* bits_;
  int64_t words_;
  std::vector<int64_t> before_;
};

Tensor new_starts(const Tensor& row_start, const Ranks& ranks) {
  Tensor found = empty_as(row_start);
  with_starts(row_start, "row_start", [&](const auto* starts) {
    using Position = std::remove_const_t<std::remove_pointer_t<decltype(starts)>>;
    auto* to = found.mutable_data_ptr<Position>();
    parallel(row_start.numel(), 64,
             [&](int64_t begin, int64_t end) { ranks.of(starts, begin, end, to); });
  });
  return found;
}

std::vector<Tensor> compact(std::vector<Tensor> packed, const Tensor& row_start, const Tensor& kept,
                            int64_t count) {
  STD_TORCH_CHECK(!packed.empty(), "packed must hold a tensor at least");
  const uint32_t* bits = words_in(kept);
  const int64_t entries = packed[0].numel(), words = words_of(entries);
  check_count(kept, "kept", words);
  const int64_t tail = entries % kWord;
  STD_TORCH_CHECK(tail == 0 || bits[words - 1] >> tail == 0, "kept must be zero behind its end");
  const Ranks ranks(bits, words);
  STD_TORCH_CHECK(ranks.total() == count, "count must be the bits of kept, ", ranks.total(),
                  ", got ", count);
  std::vector<Tensor> found{new_starts(row_start, ranks)};
  for (const Tensor& tensor : packed) {
    check_count(tensor, "a packed tensor", entries);
    const auto size = static_cast<int64_t>(tensor.element_size());
    STD_TORCH_CHECK(size <= 8, "a packed tensor must have elements of 8 bytes at most");
    found.push_back(empty({count}, tensor.scalar_type()));
    const auto* from = static_cast<const char*>(tensor.const_data_ptr());
    auto* to = static_cast<char*>(found.back().mutable_data_ptr());
    parallel((words + kStep - 1) / kStep, kStep * 8, [&](int64_t begin, int64_t end) {
      for (int64_t s = begin; s < end; ++s) {
        const int64_t first = s * kStep, last = std::min(first + kStep, words);
        select_kernels().compact(from + first * kWord * size, size, bits + first, last - first,
                                 to + ranks.at_step(s) * size);
      }
    });
  }
  return found;
}

}  // namespace

PEFTKERN_OPS(CPU, m) {
  m.impl("sparse_tile_counts", TORCH_BOX(&tile_counts));
  m.impl("sparse_columns", TORCH_BOX(&columns));
  m.impl("sparse_bits", TORCH_BOX(&bits));
  m.impl("sparse_prefix_", TORCH_BOX(&prefix_onto));
  m.impl("sparse_compact", TORCH_BOX(&compact));
}

}  // namespace peftkern::sparse
