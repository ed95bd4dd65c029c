// The dropout stream of common/philox.h for a run of keys of one row: W counters a vector, 128 weights a
// block.
#ifndef FASTATTN_CPU_DROPOUT_H
#define FASTATTN_CPU_DROPOUT_H

#include "common/philox.h"
#include "tile.h"

namespace fastattn::FASTATTN_ISA_NS {

struct VectorMulHi {
  FASTATTN_ALWAYS vu high(vu a, uint32_t b) { return mulhi(a, b); }
};

struct Dropout {
  uint64_t seed;
  uint32_t threshold;
  float scale;
  bool active;

  Dropout(uint64_t seed, float p)
      : seed(seed), threshold(dropout_threshold(p)), scale(dropout_scale(p)), active(p > 0.0f) {}
  explicit Dropout(const fastattn_problem& p) : Dropout(p.dropout_seed, p.dropout_p) {}

  // keep[c] = -1 where the weight of key j + c is kept, else 0. j is a multiple of kDropoutLanes, and keep is
  // written up to the next one after n.
  void row(int64_t b, int64_t h, int64_t i, int64_t j, int n, int32_t* keep) const {
    for (int c = 0; c < n;) {
      const int64_t block = (j + c) / kDropoutBlock;
      const int slot0 = (int)((j + c) % kDropoutBlock) / kDropoutLanes;
      const int slots_left = (n - c + kDropoutLanes - 1) / kDropoutLanes;
      const int slot1 = slot0 + slots_left < kDropoutSlots ? slot0 + slots_left : kDropoutSlots;
      for (int lane = 0; lane < kDropoutLanes; lane += W) {
        vu r[4] = {splat((uint32_t)i), (vu)lane_index() + (uint32_t)(block * kDropoutLanes + lane),
                   splat((uint32_t)h), splat((uint32_t)b)};
        philox<VectorMulHi>(seed, r);
        for (int slot = slot0; slot < slot1; ++slot) {
          const vu half = slot % 2 == 0 ? r[slot / 2] & 0xFFFFu : r[slot / 2] >> 16;
          store(keep + c + (slot - slot0) * kDropoutLanes + lane, (vi)half >= (int32_t)threshold);
        }
      }
      c += (slot1 - slot0) * kDropoutLanes;
    }
  }
};

static_assert(W <= kDropoutLanes && kKeyTile % kDropoutBlock == 0, "a tile starts at a lane group");

}  // namespace fastattn::FASTATTN_ISA_NS

#endif  // FASTATTN_CPU_DROPOUT_H
