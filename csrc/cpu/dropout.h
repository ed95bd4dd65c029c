// The dropout stream of common/philox.h for a run of keys of one row: W counters a vector, 128 weights a
// block.
#ifndef FASTATTN_CPU_DROPOUT_H
#define FASTATTN_CPU_DROPOUT_H

#include "common/philox.h"
#include "tile.h"

namespace fastattn::FASTATTN_ISA_NS {

// A word of W counters, those of odd lanes apart: products of all lanes at once do not exist. Lanes 1, 3, ...
// of both hold nothing.
struct Words {
  vu even, odd;
};
// A word that all lanes share is a scalar, and so is what follows from such words alone.
template <class Word>
struct Product {
  Word high, low;
};
FASTATTN_ALWAYS Product<uint32_t> wide_product(uint32_t a, uint32_t b) {
  const uint64_t product = (uint64_t)a * b;
  return {(uint32_t)(product >> 32), (uint32_t)product};
}
FASTATTN_ALWAYS Product<Words> wide_product(Words a, uint32_t b) {
  const vu even = product_of_even_lanes(a.even, b), odd = product_of_even_lanes(a.odd, b);
  return {{odd_to_even(even), odd_to_even(odd)}, {even, odd}};
}
FASTATTN_ALWAYS uint32_t xor3(uint32_t a, uint32_t b, uint32_t c) { return a ^ b ^ c; }
FASTATTN_ALWAYS Words xor3(Words a, uint32_t b, uint32_t c) {
  return {a.even ^ splat(b ^ c), a.odd ^ splat(b ^ c)};
}
FASTATTN_ALWAYS Words xor3(uint32_t a, Words b, uint32_t c) { return xor3(b, a, c); }
FASTATTN_ALWAYS Words xor3(Words a, Words b, uint32_t c) {
  return {xor3(a.even, b.even, splat(c)), xor3(a.odd, b.odd, splat(c))};
}
FASTATTN_ALWAYS vu all_lanes(Words a) { return join_even_lanes(a.even, a.odd); }

struct Dropout {
  uint64_t seed;
  uint32_t threshold;
  float scale;
  bool active;
  uint32_t keys[kPhiloxRounds][2];

  Dropout(uint64_t seed, float p)
      : seed(seed), threshold(dropout_threshold(p)), scale(dropout_scale(p)), active(p > 0.0f) {
    for (uint32_t round = 0; round < kPhiloxRounds; ++round) {
      keys[round][0] = (uint32_t)seed + round * kPhiloxStep0;
      keys[round][1] = (uint32_t)(seed >> 32) + round * kPhiloxStep1;
    }
  }
  explicit Dropout(const fastattn_problem& p) : Dropout(p.dropout_seed, p.dropout_p) {}

  // philox() of common/philox.h from round kRound on. The counters of a row differ in one word, which takes
  // three rounds to reach all four: 9 of 14 products are vectors, the others scalars.
  template <int kRound = 0, class R0, class R1, class R2, class R3>
  FASTATTN_ALWAYS_MEMBER void draw(R0 r0, R1 r1, R2 r2, R3 r3, vu (&words)[4]) const {
    if constexpr (kRound == kPhiloxRounds) {
      words[0] = all_lanes(r0), words[1] = all_lanes(r1), words[2] = all_lanes(r2), words[3] = all_lanes(r3);
    } else {
      const auto product0 = wide_product(r0, kPhiloxFactor0);
      const auto product1 = wide_product(r2, kPhiloxFactor1);
      draw<kRound + 1>(xor3(product1.high, r1, keys[kRound][0]), product1.low,
                       xor3(product0.high, r3, keys[kRound][1]), product0.low, words);
    }
  }

  // keep[c] = -1 where the weight of key j + c is kept, else 0. j is a multiple of kDropoutLanes, and keep is
  // written up to the next one after n.
  void row(int64_t b, int64_t h, int64_t i, int64_t j, int n, int32_t* keep) const {
    for (int c = 0; c < n;) {
      const int64_t block = (j + c) / kDropoutBlock;
      const int slot0 = (int)((j + c) % kDropoutBlock) / kDropoutLanes;
      const int slots_left = (n - c + kDropoutLanes - 1) / kDropoutLanes;
      const int slot1 = slot0 + slots_left < kDropoutSlots ? slot0 + slots_left : kDropoutSlots;
      for (int lane = 0; lane < kDropoutLanes; lane += W) {
        vu words[4];
        const vu counters = (vu)lane_index() + (uint32_t)(block * kDropoutLanes + lane);
        draw((uint32_t)i, Words{counters, odd_to_even(counters)}, (uint32_t)h, (uint32_t)b, words);
        const auto keep_slot = [&](int slot) {
          const vu half = slot % 2 == 0 ? words[slot / 2] & 0xFFFFu : words[slot / 2] >> 16;
          store(keep + c + (slot - slot0) * kDropoutLanes + lane, (vi)half >= (int32_t)threshold);
        };
        if (slot0 == 0 && slot1 == kDropoutSlots) {
#pragma GCC unroll 8
          for (int slot = 0; slot < kDropoutSlots; ++slot) keep_slot(slot);
        } else {
          for (int slot = slot0; slot < slot1; ++slot) keep_slot(slot);
        }
      }
      c += (slot1 - slot0) * kDropoutLanes;
    }
  }
};

static_assert(W <= kDropoutLanes && kKeyTile % kDropoutBlock == 0, "a tile starts at a lane group");

}  // namespace fastattn::FASTATTN_ISA_NS

#endif  // FASTATTN_CPU_DROPOUT_H
