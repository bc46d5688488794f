// onebit's kernels without torch.
#include "onebit/test_linear.h"

int main() {
  using namespace peftkern;
  using namespace peftkern::onebit;
  for (int isa = 0; isa <= static_cast<int>(best_isa()); ++isa) {
    current_isa() = static_cast<Isa>(isa);
    std::printf("%s\n", kIsaNames[isa]);
    RUN(lookups_are_the_product);
    RUN(panels_are_levels_and_touch_nothing_else);
  }
}
