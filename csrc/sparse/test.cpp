// sparse's kernels without torch.
#include "sparse/test_adamw.h"
#include "sparse/test_products.h"
#include "sparse/test_select.h"

int main() {
  using namespace peftkern;
  using namespace peftkern::sparse;
  for (int isa = 0; isa <= static_cast<int>(best_isa()); ++isa) {
    current_isa() = static_cast<Isa>(isa);
    std::printf("%s\n", kIsaNames[isa]);
    RUN(a_step_moves_what_is_old_enough_and_writes_where_it_belongs);
    RUN(any_range_of_entries_makes_the_same_step);
    RUN(the_gradient_of_a_small_layer_is_right);
    RUN(any_range_gives_the_same_bits);
    RUN(values_go_and_come_back);
    RUN(what_points_outside_does_not_hold);
    RUN(every_number_is_counted_once_and_a_nan_never);
    RUN(any_range_of_words_is_picked_alike_and_nothing_else_is_written);
    RUN(candidates_are_those_of_the_band);
    RUN(bits_become_columns_and_what_they_keep);
  }
}
