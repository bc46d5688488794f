// The kernels' table, for one instruction set.
#include "onebit/quantize.h"

namespace peftkern::onebit::PEFTKERN_ISA {

template <typename T, typename A>
constexpr TypedKernels<T, A> typed{sums<T, A>,       quantize<T, A>, encode<T, A>,
                                   slope_sums<T, A>, slope<T, A>,    dequantize<T, A>};

extern const Kernels kernels{typed<float, float>,
                             typed<double, double>,
                             typed<peftkern::bf16, float>,
                             typed<peftkern::fp16, float>,
                             pack,
                             unpack};

}  // namespace peftkern::onebit::PEFTKERN_ISA
