// sparse, selection: which scores are picked, by keys that rise with their magnitude; and bitmaps.
//
//   key      = the bits of |score| as a float, or as a double where `wide`
//            = those of infinity less them, where `largest`: the largest come first
//              that of a NaN is above infinity's in both, so it is neither counted nor picked
//   counts   [0] of keys below low, [1 + b] of those with b = (key - low) >> shift < bins,
//            [bins + 1] of those above
//   picked   keys below low; of those in [low, high), the band, what the caller chooses
//
// A bitmap has a row of words for each row of a matrix, the first column in the lowest bit; what is
// behind the last column is 0. A range of words may begin and end anywhere in a row. All is exact:
// neither threads nor instruction sets change a bit.
#pragma once
#include <cstdint>

#include "sparse/sparse.h"

namespace peftkern::sparse {

// Spelled once more, in peftkern/sparse/picking.py. As many bins and their counts pass through the
// first-level cache; a band's candidates take half a megabyte.
inline constexpr int64_t kBins = 4096, kBand = 32768;
inline constexpr uint64_t kInfinity = 0x7F800000, kWideInfinity = 0x7FF0000000000000;

struct Keys {
  bool wide, largest;
  uint64_t infinity() const { return wide ? kWideInfinity : kInfinity; }
};

struct Bins {
  Keys keys;
  uint64_t low;  // at most infinity's key + 1
  int shift;
  int64_t bins;
};

struct Candidate {
  uint64_t key;
  int64_t position;
};

// Where the candidates of a band go; several threads add to it. More than kBand are only counted.
struct Candidates {
  Candidate* list;
  int64_t count;
};

struct Picking {
  Keys keys;
  uint64_t low, high;  // at most infinity's key + 1
  int64_t columns;
};

// What a range of words had.
struct Picked {
  int64_t below, inside;  // keys below low, keys in the band
};

template <typename T>
struct SelectKernelsOf {
  // Adds to counts [bins + 2].
  void (*histogram)(const T* scores, int64_t count, const Bins& bins, int64_t* counts);
  // Writes words [begin, end): bits of the keys below low, and of the first `take` in the band.
  // Where there are `candidates`, those of the band go there, by position + their index.
  Picked (*pick)(const T* scores, const Picking& by, int64_t begin, int64_t end, int64_t take,
                 Candidates* candidates, int64_t position, uint32_t* bits);
};

struct SelectKernels {
  SelectKernelsOf<float> f32;
  SelectKernelsOf<double> f64;
  SelectKernelsOf<peftkern::bf16> bf16;
  SelectKernelsOf<peftkern::fp16> fp16;

  int64_t (*count)(const uint32_t* bits, int64_t words);
  // Of one row: how many bits are set in each tile of 128 columns.
  void (*tile_counts)(const uint32_t* bits, int64_t words, int32_t* counts);
  // The columns of one row, as many as bits are set.
  void (*columns_u16)(const uint32_t* bits, int64_t words, uint16_t* columns);
  void (*columns_i32)(const uint32_t* bits, int64_t words, int32_t* columns);
  // Elements of `size` bytes (1, 2, 4 or 8) whose bits are set, in order; -> how many.
  int64_t (*compact)(const void* from, int64_t size, const uint32_t* bits, int64_t words, void* to);
};

PEFTKERN_DECLARE(SelectKernels, select_kernels)

inline const SelectKernels& select_kernels() { return PEFTKERN_SELECT(select_kernels); }

}  // namespace peftkern::sparse
