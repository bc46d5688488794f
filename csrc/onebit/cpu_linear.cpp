// The table of linear's kernels, for one instruction set.
#include "onebit/lookup.h"

namespace peftkern::onebit::PEFTKERN_ISA {

extern const LinearKernels linear_kernels{lay_out, product, panel<float>, panel<double>,
                                          panel<peftkern::bf16>};

}  // namespace peftkern::onebit::PEFTKERN_ISA
