// Threads: one work item for each, because torch's parallel_for splits its range statically; the real units
// are handed out by a counter inside the worker.
#include <pthread.h>

#include "internal.h"

namespace fastattn {
namespace {

struct Job {
  Worker worker;
  Work* work;
};

void run_range(int64_t begin, int64_t end, void* context) {
  const Job* job = (const Job*)context;
  for (int64_t i = begin; i < end; ++i) job->worker(job->work);
}

void* run_thread(void* context) {
  run_range(0, 1, context);
  return nullptr;
}

// Without a caller's pool: threads that live for one call, so that nothing survives into a forked child. A
// thread that cannot be started is no error: the others take its units.
void run_on_own_threads(int32_t count, Job* job) {
  enum { kMost = 256 };
  pthread_t threads[kMost];
  int started = 0;
  while (started < count - 1 && started < kMost) {
    if (pthread_create(&threads[started], nullptr, run_thread, job) != 0) break;
    ++started;
  }
  run_range(0, 1, job);
  for (int i = 0; i < started; ++i) pthread_join(threads[i], nullptr);
}

}  // namespace

void run_on_threads(const fastattn_executor* executor, Worker worker, Work* work) {
  Job job = {worker, work};
  const int64_t takes = (work->unit_count + work->grain - 1) / work->grain;
  int32_t count = executor == nullptr ? 1 : executor->num_threads;
  if (count > takes) count = (int32_t)takes;
  if (count <= 1) {
    run_range(0, 1, &job);
  } else if (executor->parallel_for == nullptr) {
    run_on_own_threads(count, &job);
  } else if (executor->parallel_for(0, count, 1, run_range, &job) != 0) {
    run_range(0, 1,
              &job);  // the pool refused; whatever it did run has taken its units, the rest is done here
  }
}

}  // namespace fastattn
