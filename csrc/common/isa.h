// Which instruction set the CPU kernels use. The build compiles every csrc/<family>/cpu*.cpp once
// for baseline, avx2 and avx512; the choice among them is made here, once, and tests may change it.
#pragma once
#if defined(PEFTKERN_AMX) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <atomic>

namespace peftkern {

// Ordered: each includes those before it. avx512bf16 runs the avx512 kernels and, in addition,
// lets the library multiply in bf16. amx has the matrix unit's tiles.
enum class Isa : int { baseline, avx2, avx512, avx512bf16, amx };
inline constexpr const char* kIsaNames[] = {"baseline", "avx2", "avx512", "avx512bf16", "amx"};

// Whether the build, the CPU and the operating system have the matrix unit. The system has to be
// asked for its registers, once in a process; it keeps 8 KB more for each thread that uses them.
inline bool has_amx() {
#if defined(PEFTKERN_AMX) && defined(__linux__)
  constexpr int kAskForState = 0x1023, kTileData = 18;
  return __builtin_cpu_supports("amx-bf16") &&
         syscall(SYS_arch_prctl, kAskForState, kTileData) == 0;
#else
  return false;
#endif
}

// The best that this CPU, its operating system and this build have.
inline Isa best_isa() {
#if defined(__x86_64__)
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return Isa::baseline;
  if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
      !__builtin_cpu_supports("avx512dq") || !__builtin_cpu_supports("avx512vl")) {
    return Isa::avx2;
  }
  if (!__builtin_cpu_supports("avx512bf16")) return Isa::avx512;
  return has_amx() ? Isa::amx : Isa::avx512bf16;
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
#define PEFTKERN_DECLARE_ONE(isa, Type, table) \
  namespace isa {                              \
  extern const Type table;                     \
  }
#if defined(PEFTKERN_AMX)
#define PEFTKERN_DECLARE_AMX(Type, table) PEFTKERN_DECLARE_ONE(amx, Type, table)
#define PEFTKERN_TABLE_OF_AMX(table) amx::table
#else
#define PEFTKERN_DECLARE_AMX(Type, table)
#define PEFTKERN_TABLE_OF_AMX(table) avx512::table
#endif
#if defined(__x86_64__)
#define PEFTKERN_DECLARE(Type, table)         \
  PEFTKERN_DECLARE_ONE(baseline, Type, table) \
  PEFTKERN_DECLARE_ONE(avx2, Type, table)     \
  PEFTKERN_DECLARE_ONE(avx512, Type, table)   \
  PEFTKERN_DECLARE_AMX(Type, table)
#define PEFTKERN_SELECT(table)                                                       \
  (peftkern::current_isa() >= peftkern::Isa::amx      ? PEFTKERN_TABLE_OF_AMX(table) \
   : peftkern::current_isa() >= peftkern::Isa::avx512 ? avx512::table                \
   : peftkern::current_isa() == peftkern::Isa::avx2   ? avx2::table                  \
                                                      : baseline::table)
#else
#define PEFTKERN_DECLARE(Type, table) PEFTKERN_DECLARE_ONE(baseline, Type, table)
#define PEFTKERN_SELECT(table) baseline::table
#endif
