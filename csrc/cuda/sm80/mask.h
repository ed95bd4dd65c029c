// Which keys a query sees, and which tiles need to ask.
#pragma once

#include <stddef.h>

#include "sequence.h"

namespace fastattn {

// Key j is visible to query i when i + low <= j <= i + high (causal and window, bottom-right aligned).
struct Band {
  int low, high;
  __device__ __forceinline__ Band(const Params& p, const Sequence& s)
      : low(s.len_k - s.len_q - p.left), high(s.len_k - s.len_q + p.right) {}
  __device__ __forceinline__ bool contains(int i, int j) const { return j >= i + low && j <= i + high; }
};

// The order in which a block steps through tiles [begin, end): those outside [full_begin, full_end), in which
// some element is masked, come first, so that the loop over the others tests nothing.
struct TileWalk {
  int begin, full_begin, full_end, end;

  __device__ __forceinline__ int masked() const { return (full_begin - begin) + (end - full_end); }
  __device__ __forceinline__ int count() const { return end - begin; }
  __device__ __forceinline__ int at(int step) const {
    const int tile = begin + step;
    const int skip = step < masked() ? full_end - full_begin : full_end - end;
    return tile + (tile < full_begin ? 0 : skip);
  }
  __device__ __forceinline__ void mask_all() { full_begin = full_end = end; }
  // The part of the walk that split `index` of `splits` takes.
  __device__ __forceinline__ void take_split(int index, int splits) {
    const int total = count(), share = ceil_div(total, splits);
    const int first = begin + min(index * share, total), last = begin + min((index + 1) * share, total);
    begin = first, end = last;
    full_begin = max(first, min(full_begin, last));
    full_end = max(full_begin, min(full_end, last));
  }

  // [visible_first, visible_last] holds every visible element of the other axis, [full_first, full_last]
  // those visible to all of the block's own.
  template <int kTile>
  __device__ __forceinline__ void set(int visible_first, int visible_last, int full_first, int full_last) {
    begin = max(0, visible_first) / kTile;
    end = visible_last < 0 ? 0 : visible_last / kTile + 1;
    end = max(begin, end);
    full_begin = max(begin, min(ceil_div(max(0, full_first), kTile), end));
    full_end = max(full_begin, min((max(-1, full_last) + 1) / kTile, end));
  }
};

// Key tiles that queries [first, first + rows) of a sequence step through.
template <int kTile>
__device__ __forceinline__ TileWalk walk_keys(const Params& p, const Sequence& s, const Band& band, int first,
                                              int rows) {
  const int last = min(first + rows, s.len_q) - 1;
  TileWalk walk;
  walk.set<kTile>(first + band.low, min(s.len_k - 1, last + band.high), last + band.low,
                  min(s.len_k - 1, first + band.high));
  if (p.key_mask != nullptr) walk.mask_all();
  return walk;
}

// Query tiles that keys [first, first + rows) step through. A key mask concerns the block's own rows: the
// caller knows whether all are visible.
template <int kTile>
__device__ __forceinline__ TileWalk walk_queries(const Sequence& s, const Band& band, int first, int rows,
                                                 bool all_keys_visible) {
  const int last = min(first + rows, s.len_k) - 1;
  TileWalk walk;
  walk.set<kTile>(first - band.high, min(s.len_q - 1, last - band.low), last - band.high,
                  min(s.len_q - 1, first - band.low));
  if (!all_keys_visible) walk.mask_all();
  return walk;
}

// Where the keys and values of a head lie: addresses.
struct KeyPointers {
  int64_t k, v;
};

// Keys and values of the steps of a walk, as one thread copies them. Next to an unmasked step is one a tile
// further, and all its rows exist.
template <typename KTile, int kThreads>
class KeySource {
  using T = typename KTile::T;

 public:
  __device__ __forceinline__ KeySource(const Params& p, const Sequence& s, int kv_head)
      : k_(key_matrix<const T>(p.k, s, kv_head, p.load_dim)),
        v_(key_matrix<const T>(p.v, s, kv_head, p.load_dim_v)) {}

  // Where they lie to shared memory, before a barrier; and back from there, so that nothing is held in
  // between.
  __device__ __forceinline__ void keep(KeyPointers* at) const {
    if (threadIdx.x == 0) *at = {reinterpret_cast<int64_t>(k_.data), reinterpret_cast<int64_t>(v_.data)};
  }
  __device__ __forceinline__ void recall(const KeyPointers* at) {
    const uint32_t from = ptx::shared_address(at);
    k_.data = reinterpret_cast<const T*>(ptx::load_shared_s64(from + offsetof(KeyPointers, k)));
    v_.data = reinterpret_cast<const T*>(ptx::load_shared_s64(from + offsetof(KeyPointers, v)));
  }

  // To neighbouring tiles; `next` as in Pipeline.
  template <typename Next>
  __device__ __forceinline__ void load(uint32_t k_tile, const TileWalk& walk, int step, Next next) {
    int first = 0;
    if constexpr (next.value) {
      k_at_.next_tile(k_.stride), v_at_.next_tile(v_.stride);
    } else {
      first = walk.at(step) * KTile::kRows;
      k_at_.seek(k_, first), v_at_.seek(v_, first);
    }
    k_at_.template load<!next.value>(k_tile, k_, first);
    v_at_.template load<!next.value>(k_tile + KTile::kBytes, v_, first);
  }

 private:
  Matrix<const T> k_, v_;
  TileSource<KTile, kThreads, const T> k_at_, v_at_;
};

// One bit for each of kKeys keys from `first` on: it exists and the key mask lets it through. All lanes of a
// warp hold all bits.
template <int kKeys>
struct KeyBits {
  static constexpr int kWords = (kKeys + 31) / 32;
  uint32_t words[kWords];

  __device__ __forceinline__ KeyBits(const Params& p, const Sequence& s, int first) {
    const uint8_t* mask = p.key_mask == nullptr ? nullptr : p.key_mask + s.batch * p.key_mask_stride_b;
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
      const int j = first + 32 * w + threadIdx.x % 32;
      const bool visible = j < s.len_k && (mask == nullptr || mask[j] != 0);
      words[w] = __ballot_sync(0xffffffffu, visible);
    }
  }
  __device__ __forceinline__ bool test(int key) const { return words[key / 32] >> (key % 32) & 1; }
};

}  // namespace fastattn
