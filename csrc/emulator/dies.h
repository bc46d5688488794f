// For tests of faults: a child process has to end with these words, and not well.
#pragma once
#include <sys/wait.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <exception>
#include <string>
#include <vector>

namespace peftkern::emulator {

template <typename Function>
std::string last_words(const Function& function) {
  int ends[2];
  if (pipe(ends)) std::abort();
  std::fflush(nullptr);
  const pid_t child = fork();
  if (child == 0) {
    dup2(ends[1], 2);
    try {
      function();
    } catch (const std::exception& fault) {
      std::fprintf(stderr, "%s\n", fault.what());
      _exit(1);
    }
    _exit(0);
  }
  close(ends[1]);
  std::string words;
  char part[4096];
  for (ssize_t count; (count = read(ends[0], part, sizeof part)) > 0;) {
    words.append(part, static_cast<size_t>(count));
  }
  close(ends[0]);
  int status;
  waitpid(child, &status, 0);
  return status == 0 ? "" : words;
}

}  // namespace peftkern::emulator

// Each of the words, anywhere in what the child said.
#define EXPECT_DIES(call, ...)                                                               \
  do {                                                                                       \
    const std::string said = peftkern::emulator::last_words([&] { call; });                  \
    for (const std::string& words : std::vector<std::string>{__VA_ARGS__}) {                 \
      if (said.find(words) != std::string::npos) continue;                                   \
      std::fprintf(stderr, "%s:%d: %s must end with \"%s\", got:\n%s\n", __FILE__, __LINE__, \
                   #call, words.c_str(), said.c_str());                                      \
      std::exit(1);                                                                          \
    }                                                                                        \
  } while (0)
