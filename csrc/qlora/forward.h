// The forward pass, of one problem or of several that read the same x; part of the binding.
#pragma once
#include "qlora/problem.h"

namespace peftkern::qlora {

// y = x W^T + bias + scale * down B^T, with down = D(x) A^T.
struct Forward {
  const Problem& p;
  Matrix y, down;
};
void forward(const std::vector<Forward>& problems);

}  // namespace peftkern::qlora
