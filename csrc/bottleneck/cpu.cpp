// The kernels' table, for one instruction set.
#include "bottleneck/backward.h"
#include "bottleneck/forward.h"

namespace peftkern::bottleneck::PEFTKERN_ISA {

template <typename T, typename Acc>
constexpr TypedKernels<T, Acc> typed{forward<T, Acc>, backward<T, Acc>};

extern const Kernels kernels{
    typed<float, float>,          typed<double, double>, typed<peftkern::bf16, float>,
    typed<peftkern::fp16, float>, {pack<float>},         {pack<double>}};

}  // namespace peftkern::bottleneck::PEFTKERN_ISA
