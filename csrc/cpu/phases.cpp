// The counters of phases.h, in the build that has them.
#include "phases.h"

#if defined(FASTATTN_PHASES)

namespace fastattn {
uint64_t phase_ticks[kPhaseCount];
}

extern "C" void fastattn_cpu_take_phases(uint64_t* ticks) {
  for (int i = 0; i < fastattn::kPhaseCount; ++i)
    ticks[i] = __atomic_exchange_n(&fastattn::phase_ticks[i], 0, __ATOMIC_RELAXED);
}

#endif
