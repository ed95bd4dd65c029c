// The small kernels around attention itself: one pass over rows each.
#pragma once

#include <cuda_runtime_api.h>

#include "params.h"

namespace fastattn {

// Copies `batch` x `heads` x `rows` rows of `dim` elements to contiguous rows of `padded` >= dim elements,
// zeros behind them.
cudaError_t launch_pack(const TensorArg& from, void* to, int element_bytes, int64_t batch, int64_t heads,
                        int64_t rows, int dim, int padded, cudaStream_t stream);

// RowStatistics of every query row (p.rows) from lse, out, dout and dlse.
cudaError_t launch_row_statistics(const Params& p, int dtype, cudaStream_t stream);

// Merges the partial results of p.splits splits into out and lse: (o, lse) pairs are merged as weighted
// means.
cudaError_t launch_combine(const Params& p, int dtype, cudaStream_t stream);

// Packed layout: `value` in the rows of `x` that belong to no sequence, before cu[0] and from cu[batch] on.
cudaError_t launch_fill_outside(const TensorArg& x, int element_bytes, uint32_t value, const int32_t* cu,
                                int batch, int64_t total, int heads, int dim, cudaStream_t stream);

// drelative_bias from the partial sums of score_gradient.
cudaError_t launch_finish_relative_bias(const Params& p, cudaStream_t stream);

}  // namespace fastattn
