// The kernels' table, for one instruction set.
#include "sparse/gather.h"
#include "sparse/matmul.h"
#include "sparse/sddmm.h"

namespace peftkern::sparse::PEFTKERN_ISA {

// Measured with 512 tokens, 4096 x 4096: from here on the library's product is faster.
#if defined(__AVX512F__)
inline constexpr double kDenseFrom = 0.4;
#elif defined(__AVX2__)
inline constexpr double kDenseFrom = 0.3;
#else
inline constexpr double kDenseFrom = 0.1;
#endif
inline constexpr double kDenseFromDouble = 0.06;

template <typename T, typename A>
constexpr TypedKernels<T, A> typed{sddmm<T, A>,
                                   conv2d_sddmm<T, A>,
                                   sizeof(A) == 8 ? kDenseFromDouble : kDenseFrom,
                                   turned<Operand<T>, A>,
                                   turned<Window<T>, A>,
                                   turned<Images<T>, A>,
                                   collect<A>,
                                   matmul<T, A>,
                                   matmul_t<T, A>,
                                   gather<T, A>,
                                   scatter<T, A>};

extern const Kernels kernels{typed<float, float>, typed<double, double>,
                             typed<peftkern::bf16, float>, typed<peftkern::fp16, float>, holds};

}  // namespace peftkern::sparse::PEFTKERN_ISA
