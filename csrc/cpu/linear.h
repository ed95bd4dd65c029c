// A linear layer in fp32, out = f(x w^T + bias): the product of gemm.h on the weight as it lies.
//
// A unit is a block of rows by a block of columns. Of the weight it packs the panels of its columns, some
// hundred features at a time, and multiplies them by rows of x where they lie; out collects the sums. Bias
// and GELU follow the last of them, while the block is still in cache. Every element is summed in one order,
// whatever the blocks.
#ifndef FASTATTN_CPU_LINEAR_H
#define FASTATTN_CPU_LINEAR_H

#include "math.h"
#include "pack.h"
#include "unit.h"

namespace fastattn::FASTATTN_ISA_NS {

constexpr int64_t kRowsInCache = 384;

struct LinearBlock {
  int64_t row, rows, column, columns;
};

// B of the product: `depth` features from `feature` on, of the block's columns.
inline void pack_weight(const fastattn_linear& io, const LinearBlock& block, int64_t feature, int64_t depth,
                        float* panels) {
  if (io.transposed == 0) {
    Panels<F32, Single>::pack(io.weight + block.column * io.stride_weight + feature, io.stride_weight,
                              block.columns, depth, nullptr, panels, nullptr);
    return;
  }
  for (int64_t n = 0; n < block.columns; n += kNR) {
    const int64_t width = block.columns - n < kNR ? block.columns - n : kNR;
    Packer<F32, Single>::rows(io.weight + feature * io.stride_weight + block.column + n, io.stride_weight,
                              depth, width, nullptr, panels + n * depth, kNR, width);
  }
}

// f(out + bias) of a tile that has just been summed.
FASTATTN_ALWAYS void finish_tile(const fastattn_linear& io, int64_t rows, int64_t column, int64_t columns,
                                 float* out) {
  for (int64_t n = 0; n < columns; n += W) {
    const vf bias = io.bias != nullptr ? load(io.bias + column + n) : vf{};
    for (int64_t i = 0; i < rows; ++i) {
      float* at = out + i * io.stride_out + n;
      const vf y = load(at) + bias;
      store(at, io.gelu != 0 ? gelu(y) : y);
    }
  }
}

inline void linear_block(const fastattn_linear& io, const LinearBlock& block, float* panels) {
  const int64_t step = ceil_div(io.in_features, ceil_div(io.in_features, kLinearDepth));
  for (int64_t feature = 0; feature < io.in_features; feature += step) {
    const int64_t depth = io.in_features - feature < step ? io.in_features - feature : step;
    const bool last = feature + depth == io.in_features,
               finish = last && (io.bias != nullptr || io.gelu != 0);
    pack_weight(io, block, feature, depth, panels);
    for (int64_t first = 0; first < block.rows; first += kRowsInCache) {
      const int64_t end = block.rows - first < kRowsInCache ? block.rows : first + kRowsInCache;
      for (int64_t n = 0; n < block.columns; n += kNR) {
        const int64_t columns = block.columns - n < kNR ? block.columns - n : kNR;
        for (int64_t i = first; i < end;) {
          const int rows = block_rows((int)(end - i));
          const float* x = io.x + (block.row + i) * io.stride_x + feature;
          float* out = io.out + (block.row + i) * io.stride_out + block.column + n;
          MicroKernels<Single, false>::table[columns / W - 1][rows - 1](
              depth, x, io.stride_x, panels + n * depth, kNR, out, io.stride_out, feature > 0);
          if (finish) finish_tile(io, rows, block.column + n, columns, out);
          i += rows;
        }
      }
    }
  }
}

inline void linear(Work* work) {
  const fastattn_linear& io = *work->linear;
  float* panels = (float*)thread_workspace((size_t)(work->block_columns * kLinearDepth) * sizeof(float));
  if (panels == nullptr) {
    __atomic_store_n(&work->out_of_memory, 1, __ATOMIC_RELAXED);
    return;
  }
  const int64_t across = ceil_div(io.out_features, work->block_columns);
  take_ranges(*work, [&](int64_t first, int64_t last) {
    for (int64_t u = first; u < last; ++u) {
      const int64_t row = u / across * work->block_rows, column = u % across * work->block_columns;
      const int64_t rows = io.rows - row, columns = io.out_features - column;
      linear_block(io,
                   {row, rows < work->block_rows ? rows : work->block_rows, column,
                    columns < work->block_columns ? columns : work->block_columns},
                   panels);
    }
  });
}

}  // namespace fastattn::FASTATTN_ISA_NS

#endif  // FASTATTN_CPU_LINEAR_H
