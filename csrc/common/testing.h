// The whole of what the C++ tests need: a check that ends the program, a name for each test, and
// numbers to work on.
#pragma once
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

#define EXPECT(condition)                                                                \
  do {                                                                                   \
    if (!(condition)) {                                                                  \
      std::fprintf(stderr, "%s:%d: %s does not hold\n", __FILE__, __LINE__, #condition); \
      std::exit(1);                                                                      \
    }                                                                                    \
  } while (0)

#define RUN(test)               \
  do {                          \
    std::printf("%s\n", #test); \
    test();                     \
  } while (0)

namespace peftkern {

// Numbers without a pattern, the same on every machine.
inline std::vector<float> numbers(int64_t count, uint32_t state = 1) {
  std::vector<float> out(static_cast<size_t>(count));
  for (float& x : out) {
    state = state * 1664525u + 1013904223u;
    x = static_cast<float>(static_cast<int32_t>(state)) / 2147483648.0f;
  }
  return out;
}

}  // namespace peftkern
