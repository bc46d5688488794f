// The optimiser's table, for one instruction set.
#include "sparse/packed_step.h"

namespace peftkern::sparse::PEFTKERN_ISA {

extern const OptimizerKernels optimizer_kernels{{adamw<float, float>},
                                                {adamw<double, double>},
                                                {adamw<peftkern::bf16, float>},
                                                {adamw<peftkern::fp16, float>}};

}  // namespace peftkern::sparse::PEFTKERN_ISA
