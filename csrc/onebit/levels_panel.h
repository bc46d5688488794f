// W as a panel of levels, transposed, for the library's product; and what makes y of that.
#pragma once
#include "onebit/laid_out.h"

namespace peftkern::onebit::PEFTKERN_ISA {

// The levels of one of a nibble's codes, rounded to T, for as many lanes as a vector has.
template <typename T>
class Values {
 public:
  explicit Values(const double* level) : table_(rounded(level).value) {}
  PEFTKERN_INLINE void put(const Values& values, U nibble, int64_t lanes, T* to) {
    store_first(to, Table::look_up(values.table_, nibble), lanes);
  }

 private:
  Table table_;
};

}  // namespace peftkern::onebit::PEFTKERN_ISA
