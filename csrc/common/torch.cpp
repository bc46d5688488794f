// The binding of what concerns every family: the choice of the instruction set, and the poison.
#include "common/binding.h"
#include "common/isa.h"

namespace peftkern {

int64_t isa() { return static_cast<int64_t>(current_isa().load()); }
int64_t best() { return static_cast<int64_t>(best_isa()); }
void use_isa(int64_t isa) {
  STD_TORCH_CHECK(isa >= 0 && isa <= best(), "this CPU lacks the instruction set asked for");
  current_isa() = static_cast<Isa>(isa);
}

void set_poison(bool on) { poison() = on; }

PEFTKERN_OPS(CompositeExplicitAutograd, m) {
  m.impl("isa", TORCH_BOX(&isa));
  m.impl("best_isa", TORCH_BOX(&best));
  m.impl("use_isa", TORCH_BOX(&use_isa));
  m.impl("poison", TORCH_BOX(&set_poison));
}

}  // namespace peftkern
