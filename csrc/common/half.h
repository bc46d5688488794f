// 16-bit floats as they lie in memory, and the names of all.
#pragma once
#include <cstdint>

namespace peftkern {

struct bf16 {
  uint16_t bits;
};
struct fp16 {
  uint16_t bits;
};

// What a tensor of the caller's choice holds.
enum class Float : int32_t { f32, f64, bf16, fp16 };

}  // namespace peftkern
