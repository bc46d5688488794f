// The table of linear's kernels, for one instruction set.
#include "onebit/lookup.h"
#include "onebit/panels.h"

namespace peftkern::onebit::PEFTKERN_ISA {

extern const LinearKernels linear_kernels{lay_out,
                                          product,
                                          kMost,
                                          kMostBf16,
                                          {panel<float>, finish<float>},
                                          {panel<double>, finish_double},
                                          {panel<peftkern::bf16>, finish<peftkern::bf16>}};

}  // namespace peftkern::onebit::PEFTKERN_ISA
