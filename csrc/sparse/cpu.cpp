// The kernels' table, for one instruction set.
#include "sparse/gather.h"
#include "sparse/matmul.h"
#include "sparse/sddmm.h"

namespace peftkern::sparse::PEFTKERN_ISA {

template <typename T, typename A>
constexpr TypedKernels<T, A> typed{sddmm<T, A>,    conv2d_sddmm<T, A>, matmul<T, A>,
                                   matmul_t<T, A>, gather<T, A>,       scatter<T, A>};

extern const Kernels kernels{typed<float, float>, typed<double, double>,
                             typed<peftkern::bf16, float>, typed<peftkern::fp16, float>, holds};

}  // namespace peftkern::sparse::PEFTKERN_ISA
