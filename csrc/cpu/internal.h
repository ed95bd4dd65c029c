// What the parts outside the kernels share: errors, dispatch, threads, validation.
#ifndef FASTATTN_CPU_INTERNAL_H
#define FASTATTN_CPU_INTERNAL_H

#include "kernels.h"

namespace fastattn {

// Remembers the sentence for fastattn_last_error() and returns `status`.
fastattn_status fail(fastattn_status status, const char* format, ...) __attribute__((format(printf, 2, 3)));

// The kernels of the best instruction set, or of the one FASTATTN_CPU_ISA names; nullptr after fail().
const Kernels* select_kernels(fastattn_status* status);

fastattn_status validate_forward(const fastattn_problem* p, const fastattn_forward_result* r);
fastattn_status validate_backward(const fastattn_problem* p, const fastattn_backward_io* io);
fastattn_status validate_hidden_dropout(const fastattn_hidden_dropout* io);
fastattn_status validate_rotary(const fastattn_rotary* io);
fastattn_status validate_linear(const fastattn_linear* io);
fastattn_status validate_executor(const fastattn_executor* e);
fastattn_status validate_dropout_p(float p);
fastattn_status validate_dropout_mask(float p, int64_t batch, int64_t num_heads, int64_t seqlen_q,
                                      int64_t seqlen_k, const uint8_t* keep);

// Runs worker(work) on the executor's threads and returns when all are done.
void run_on_threads(const fastattn_executor* executor, Worker worker, Work* work);

// Sums that several threads form; nullptr if there is no memory, else freed by free().
float* allocate_sums(int64_t count);

}  // namespace fastattn

#endif  // FASTATTN_CPU_INTERNAL_H
