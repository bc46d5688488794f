// onebit's kernels without torch.
#include "onebit/test_codes.h"
#include "onebit/test_linear.h"

int main() {
  using namespace peftkern;
  using namespace peftkern::onebit;
  for (int isa = 0; isa <= static_cast<int>(best_isa()); ++isa) {
    current_isa() = static_cast<Isa>(isa);
    std::printf("%s\n", kIsaNames[isa]);
    RUN(bytes_come_back_and_nothing_else_is_touched);
    RUN(a_tie_takes_the_lower_code_and_what_is_no_number_the_lowest);
    RUN(any_range_is_quantised_alike);
    RUN(sums_take_every_element_once);
    RUN(slopes_are_the_closed_form);
    RUN(lookups_are_the_product);
    RUN(panels_are_levels_and_touch_nothing_else);
  }
}
