// Dropout of hidden states: the stream of attention's dropout with h = 0, a position for the query and a
// channel for the key.
#ifndef FASTATTN_CPU_HIDDEN_DROPOUT_H
#define FASTATTN_CPU_HIDDEN_DROPOUT_H

#include "dropout.h"
#include "unit.h"

namespace fastattn::FASTATTN_ISA_NS {

template <class T>
FASTATTN_ALWAYS void drop_row(const Dropout& dropout, int64_t b, int64_t n, const typename T::Storage* x,
                              int64_t columns, typename T::Storage* out) {
  int32_t keep[kDropoutBlock];
  for (int64_t c = 0; c < columns; c += kDropoutBlock) {
    const int count = columns - c < (int64_t)kDropoutBlock ? (int)(columns - c) : (int)kDropoutBlock;
    dropout.row(b, 0, n, c, count, keep);
    int i = 0;
    for (; i + W <= count; i += W)
      T::store_to(out + c + i, as_float(as_int(T::load(x + c + i) * dropout.scale) & load_as<vi>(keep + i)));
    if (i < count) {
      const vf kept =
          as_float(as_int(load_tail<T>(x + c + i, count - i) * dropout.scale) & load_as<vi>(keep + i));
      store_tail<T>(out + c + i, kept, count - i);
    }
  }
}

// The sequence b with cu_seqlens[b] <= row < cu_seqlens[b + 1].
inline int64_t sequence_of(const fastattn_hidden_dropout& io, int64_t row) {
  int64_t low = 0, high = io.batch;
  while (high - low > 1) {
    const int64_t middle = low + (high - low) / 2;
    (io.cu_seqlens[middle] <= row ? low : high) = middle;
  }
  return low;
}

template <class T>
void hidden_dropout(Work* work) {
  typedef typename T::Storage Storage;
  const fastattn_hidden_dropout& io = *work->hidden_dropout;
  const Dropout dropout(io.seed, io.dropout_p);
  take_ranges(*work, [&](int64_t first, int64_t last) {
    int64_t b, start, end;  // the sequence of the row, and the rows it has
    if (io.cu_seqlens == nullptr) {
      b = first / io.seqlen, start = b * io.seqlen, end = start + io.seqlen;
    } else {
      b = sequence_of(io, first);
      start = io.cu_seqlens[b], end = io.cu_seqlens[b + 1];
    }
    for (int64_t r = first; r < last; ++r) {
      while (r >= end) {
        ++b, start = end;
        end = io.cu_seqlens == nullptr ? start + io.seqlen : io.cu_seqlens[b + 1];
      }
      drop_row<T>(dropout, b, r - start, (const Storage*)io.x + r * io.columns, io.columns,
                  (Storage*)io.out + r * io.columns);
    }
  });
}

}  // namespace fastattn::FASTATTN_ISA_NS

#endif  // FASTATTN_CPU_HIDDEN_DROPOUT_H
