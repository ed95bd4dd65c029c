// A test is a function registered by TEST; CHECK notes a failure and goes on, so that one run shows all.
#pragma once

#include <cstdarg>
#include <cstdio>
#include <string>
#include <vector>

namespace fastattn_test {

struct Test {
  const char* name;
  void (*run)();
};

inline std::vector<Test>& tests() {
  static std::vector<Test> all;
  return all;
}

struct Registration {
  Registration(const char* name, void (*run)()) { tests().push_back({name, run}); }
};

// What is under test right now; the handler of SIGSEGV prints it when a guard page was hit.
inline char current[512] = "";
inline int failures = 0;

__attribute__((format(printf, 1, 2))) inline void say_current(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(current, sizeof current, format, arguments);
  va_end(arguments);
}

__attribute__((format(printf, 3, 4))) inline void fail(const char* file, int line, const char* format, ...) {
  if (++failures > 40) return;  // the first ones tell the story
  fprintf(stderr, "%s:%d: ", file, line);
  va_list arguments;
  va_start(arguments, format);
  vfprintf(stderr, format, arguments);
  va_end(arguments);
  fprintf(stderr, "\n    in %s\n", current);
}

}  // namespace fastattn_test

#define TEST(name)                                                        \
  static void name();                                                     \
  static fastattn_test::Registration registration_of_##name(#name, name); \
  static void name()

#define CHECK(condition, ...)                                               \
  do {                                                                      \
    if (!(condition)) fastattn_test::fail(__FILE__, __LINE__, __VA_ARGS__); \
  } while (0)
