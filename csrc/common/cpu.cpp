// The table of what families share, for one instruction set.
#include "common/elementwise.h"
#include "common/low_rank.h"

namespace peftkern::PEFTKERN_ISA {

template <typename T>
constexpr ValueKernels<T> values{dropout<T>, to_float<T>, from_float<T>};

extern const SharedKernels shared_kernels{values<float>,          values<double>,
                                          values<bf16>,           values<fp16>,
                                          {product<float>, dots}, {product<double>, dots}};

}  // namespace peftkern::PEFTKERN_ISA
