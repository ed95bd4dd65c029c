// Where the time of the kernels goes. A developer's build (-DFASTATTN_PHASES=ON) counts the cycles between a
// Phase's begin and end; in every other build these are empty and cost nothing. Counters are shared by all
// threads, so that shares mean something on one thread.
#ifndef FASTATTN_CPU_PHASES_H
#define FASTATTN_CPU_PHASES_H

#include <stdint.h>

#include "fastattn.h"

#if defined(FASTATTN_PHASES) && defined(__x86_64__)
#include <x86intrin.h>
#endif

namespace fastattn {

// The names are those of fastattn/bench/phases.py, in this order.
enum PhaseName {
  kPacking,      // q, k, v and dout to operands
  kScores,       // S = Q K^T
  kRows,         // softmax and its derivative: maximum, exponential, sums, masks, biases, dropout
  kValues,       // O += P V
  kWeightGrads,  // dP = dO V^T
  kToKeys,       // dV += P^T dO, dK += dS^T Q
  kToQueries,    // dQ += dS K
  kAll,          // a worker from its first unit to its last, the above included
  kPhaseCount
};

#if defined(FASTATTN_PHASES)

static inline uint64_t phase_clock() {
#if defined(__x86_64__)
  return __rdtsc();
#else
  uint64_t ticks;
  asm volatile("mrs %0, cntvct_el0" : "=r"(ticks));
  return ticks;
#endif
}

extern uint64_t phase_ticks[kPhaseCount];

class Phase {
 public:
  __attribute__((always_inline)) explicit Phase(PhaseName name) : name_(name), start_(phase_clock()) {}
  __attribute__((always_inline)) ~Phase() {
    __atomic_fetch_add(&phase_ticks[name_], phase_clock() - start_, __ATOMIC_RELAXED);
  }

 private:
  PhaseName name_;
  uint64_t start_;
};

#else

struct Phase {
  explicit Phase(PhaseName) {}
};

#endif

}  // namespace fastattn

#if defined(FASTATTN_PHASES)
// Ticks of each phase since the last call, kPhaseCount of them.
extern "C" FASTATTN_API void fastattn_cpu_take_phases(uint64_t* ticks);
#endif

#endif  // FASTATTN_CPU_PHASES_H
