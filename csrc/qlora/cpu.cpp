// The kernels' table, for one instruction set.
#include "qlora/amx.h"
#include "qlora/codes.h"
#include "qlora/few_rows.h"
#include "qlora/tiles.h"

namespace peftkern::qlora::PEFTKERN_ISA {

template <typename T>
constexpr TypedKernels<T> typed{quantize<T>, quantize_rows<T>, dequantize<T>};

extern const Kernels kernels{typed<float>,
                             typed<double>,
                             typed<peftkern::bf16>,
                             typed<peftkern::fp16>,
                             {most_rows, lay_out, laid_out, few_rows, tiles, kMostFewRows},
                             kRowsBf16};

}  // namespace peftkern::qlora::PEFTKERN_ISA
