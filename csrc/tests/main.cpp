// Runs every registered test, or those whose name contains an argument. --isas prints the instruction
// sets of this library and machine, so that a script can force each in turn (FASTATTN_CPU_ISA).
#include <signal.h>
#include <unistd.h>

#include <chrono>
#include <cstdlib>
#include <cstring>

#include "check.h"
#include "fastattn.h"

extern int random_cases;

namespace {

using fastattn_test::current;

[[maybe_unused]] void on_fault(int signal_number) {
  const char text[] = "\nfault: memory outside an input or output was touched\n    in ";
  (void)!write(2, text, sizeof text - 1);
  (void)!write(2, current, strlen(current));
  (void)!write(2, "\n", 1);
  signal(signal_number, SIG_DFL);
  raise(signal_number);
}

}  // namespace

int main(int count, char** arguments) {
  if (count == 2 && strcmp(arguments[1], "--isas") == 0) return puts(fastattn_cpu_isas()) < 0;
  if (const char* cases = getenv("FASTATTN_TEST_CASES")) random_cases = atoi(cases);
#if !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
  signal(SIGSEGV, on_fault);
  signal(SIGBUS, on_fault);
#endif
  printf("%s\n", fastattn_cpu_isa());
  int passed = 0, failed = 0;
  for (const auto& test : fastattn_test::tests()) {
    bool wanted = count == 1;
    for (int i = 1; i < count; ++i) wanted |= strstr(test.name, arguments[i]) != nullptr;
    if (!wanted) continue;
    const int before = fastattn_test::failures;
    const auto start = std::chrono::steady_clock::now();
    test.run();
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
    const bool ok = fastattn_test::failures == before;
    ++(ok ? passed : failed);
    printf("  %-6s %s (%.1f s)\n", ok ? "ok" : "FAILED", test.name, seconds.count());
    fflush(stdout);
  }
  printf("%d passed, %d failed\n", passed, failed);
  return failed == 0 ? 0 : 1;
}
