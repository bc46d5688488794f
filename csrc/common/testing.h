// The whole of what the C++ tests need: a check that ends the program, and a name for each test.
#pragma once
#include <cstdio>
#include <cstdlib>

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
