// 16-bit floats as they lie in memory.
#pragma once
#include <cstdint>

namespace peftkern {

struct bf16 {
  uint16_t bits;
};
struct fp16 {
  uint16_t bits;
};

}  // namespace peftkern
