// The table of selection's kernels, for one instruction set.
#include "sparse/bitmap.h"
#include "sparse/pick.h"

namespace peftkern::sparse::PEFTKERN_ISA {

template <typename T>
constexpr SelectKernelsOf<T> select_kernels_of{histogram<T>, pick<T>};

extern const SelectKernels select_kernels{select_kernels_of<float>,
                                          select_kernels_of<double>,
                                          select_kernels_of<peftkern::bf16>,
                                          select_kernels_of<peftkern::fp16>,
                                          count,
                                          tile_counts,
                                          columns<uint16_t>,
                                          columns<int32_t>,
                                          compact};

}  // namespace peftkern::sparse::PEFTKERN_ISA
