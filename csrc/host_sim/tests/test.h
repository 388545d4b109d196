// A test is a function; the program runs those named on its command line, or lists all.
#pragma once

#include <cstdio>
#include <cstring>
#include <functional>
#include <stdexcept>
#include <string>
#include <vector>

#include "host_sim/simulator.h"

struct Test {
  const char* name;
  void (*run)();
};
inline std::vector<Test>& tests() {
  static std::vector<Test> all;
  return all;
}

#define TEST(name)                                                              \
  static void name();                                                           \
  static const bool name##_is_known = (tests().push_back({#name, name}), true); \
  static void name()

#define CHECK(condition)                                                                \
  do {                                                                                  \
    if (!(condition))                                                                   \
      throw std::runtime_error(std::string(__FILE__) + ":" + std::to_string(__LINE__) + \
                               ": " #condition);                                        \
  } while (0)

// Runs `body`, which must raise a `host_sim::Error` with `part` in its message.
inline void check_error(const std::string& part, const std::function<void()>& body) {
  try {
    body();
  } catch (const host_sim::Error& error) {
    if (std::string(error.what()).find(part) == std::string::npos) {
      throw std::runtime_error("expected an error with '" + part + "', found: " + error.what());
    }
    return;
  }
  throw std::runtime_error("expected an error with '" + part + "', found none");
}

inline int run_tests(int argc, char** argv) {
  int failures = 0, found = 0;
  for (const Test& test : tests()) {
    if (argc == 1) std::puts(test.name);
    for (int i = 1; i < argc; ++i) {
      if (std::strcmp(argv[i], test.name) != 0) continue;
      ++found;
      try {
        test.run();
      } catch (const std::exception& error) {
        std::printf("%s: %s\n", test.name, error.what());
        ++failures;
      }
    }
  }
  return failures != 0 || found != argc - 1;
}
