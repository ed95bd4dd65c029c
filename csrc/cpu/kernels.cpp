// One instruction set's kernels; compiled once for each with FASTATTN_ISA_NS, FASTATTN_ISA_NAME,
// FASTATTN_VECTOR_BYTES and perhaps FASTATTN_BF16_DOT defined by the build. FASTATTN_AMX (bf16 products in
// tiles) leaves the other dtypes to the instruction set below: dispatch.cpp puts the two together.
#include "kernels.h"

#include "backward_passes.h"
#include "bias_passes.h"
#include "decode.h"
#include "forward.h"
#include "hidden_dropout.h"
#include "linear.h"
#include "phases.h"
#include "rotary.h"

namespace fastattn::FASTATTN_ISA_NS {
namespace {

template <template <class, class> class Pass, class T, class E>
void run_units(Work* work) {
  Pass<T, E> pass(*work);
  if (!get_workspace(*work, pass)) return;
  const Phase phase(kAll);
#if defined(FASTATTN_AMX)
  const TileRegisters tiles;
#endif
  take_units(*work, work->heads, [&](const Entry& entry, int64_t head, const Entry* next, int64_t next_head) {
    pass.run(entry, head, next, next_head);
  });
}

#if !defined(FASTATTN_AMX)
void dropout_mask_row(uint64_t seed, float p, int64_t b, int64_t h, int64_t i, int64_t nk, uint8_t* keep) {
  const Dropout dropout(seed, p);
  int32_t row[kKeyTile];
  for (int64_t j = 0; j < nk; j += kKeyTile) {
    const int n = nk - j < kKeyTile ? (int)(nk - j) : kKeyTile;
    dropout.row(b, h, i, j, n, row);
    for (int c = 0; c < n; ++c) keep[j + c] = row[c] != 0;
  }
}
#endif

#if defined(FASTATTN_BF16_DOT)
typedef Pair ForBF16;
#else
typedef Single ForBF16;
#endif

}  // namespace

// Constants, nothing that runs when the library is loaded: this processor may not know these instructions.
extern const Kernels kernels;

#if defined(FASTATTN_AMX)

#define FASTATTN_BF16_PRODUCTS(Pass)                                                \
  {nullptr, nullptr, run_units<Pass, BF16, ForBF16>, run_units<Pass, F32, ForBF16>, \
   run_units<Pass, F32, Split>}

const Kernels kernels = {FASTATTN_ISA_NAME,
                         FASTATTN_BF16_PRODUCTS(Forward),
                         FASTATTN_BF16_PRODUCTS(MergePass),
                         FASTATTN_BF16_PRODUCTS(KeyPass),
                         FASTATTN_BF16_PRODUCTS(QueryPass),
                         FASTATTN_BF16_PRODUCTS(BiasPass),
                         FASTATTN_BF16_PRODUCTS(RelativePass),
                         {nullptr, nullptr, nullptr},
                         {nullptr, nullptr, nullptr},
                         nullptr,
                         nullptr};

#else

#define FASTATTN_BY_DTYPE(Pass)                                                                \
  {run_units<Pass, F32, Single>, run_units<Pass, F16, Single>, run_units<Pass, BF16, ForBF16>, \
   run_units<Pass, F32, ForBF16>, run_units<Pass, F32, Single>}

const Kernels kernels = {FASTATTN_ISA_NAME,
                         FASTATTN_BY_DTYPE(Forward),
                         FASTATTN_BY_DTYPE(MergePass),
                         FASTATTN_BY_DTYPE(KeyPass),
                         FASTATTN_BY_DTYPE(QueryPass),
                         FASTATTN_BY_DTYPE(BiasPass),
                         FASTATTN_BY_DTYPE(RelativePass),
                         {hidden_dropout<F32>, hidden_dropout<F16>, hidden_dropout<BF16>},
                         {rotary<F32>, rotary<F16>, rotary<BF16>},
                         linear,
                         dropout_mask_row};

#endif

}  // namespace fastattn::FASTATTN_ISA_NS
