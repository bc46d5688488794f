// Which instruction set the CPU kernels use. The build compiles every csrc/<family>/cpu*.cpp once
// for baseline, avx2 and avx512; the choice among them is made here, once, and tests may change it.
#pragma once
#include <atomic>
#include <cstring>

namespace peftkern {

// Ordered: each includes those before it. avx512bf16 runs the avx512 kernels and, in addition,
// lets the library multiply in bf16.
enum class Isa : int { baseline, avx2, avx512, avx512bf16 };
inline constexpr const char* kIsaNames[] = {"baseline", "avx2", "avx512", "avx512bf16"};

// The best that this CPU, its operating system and this build have.
inline Isa best_isa() {
#if defined(__x86_64__)
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return Isa::baseline;
  if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
      !__builtin_cpu_supports("avx512dq") || !__builtin_cpu_supports("avx512vl")) {
    return Isa::avx2;
  }
  return __builtin_cpu_supports("avx512bf16") ? Isa::avx512bf16 : Isa::avx512;
#else
  return Isa::baseline;
#endif
}

// The one in use; changed only by tests and benchmarks, between calls.
inline std::atomic<Isa>& current_isa() {
  static std::atomic<Isa> isa{best_isa()};
  return isa;
}

}  // namespace peftkern

// Declares a family's kernel table, one in each instruction set's namespace; and picks the one of
// the instruction set in use.
#if defined(__x86_64__)
#define PEFTKERN_DECLARE(Type, table) \
  namespace avx2 {                    \
  extern const Type table;            \
  }                                   \
  namespace avx512 {                  \
  extern const Type table;            \
  }                                   \
  namespace baseline {                \
  extern const Type table;            \
  }
#define PEFTKERN_SELECT(table)                                      \
  (peftkern::current_isa() >= peftkern::Isa::avx512 ? avx512::table \
   : peftkern::current_isa() == peftkern::Isa::avx2 ? avx2::table   \
                                                    : baseline::table)
#else
#define PEFTKERN_DECLARE(Type, table) \
  namespace baseline {                \
  extern const Type table;            \
  }
#define PEFTKERN_SELECT(table) baseline::table
#endif
