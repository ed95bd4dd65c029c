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

// Packed layout: what other kernels leave undone in the rows of queries (or keys) of `x`. Rows that belong to
// no sequence get `outside`; those of a sequence that is longer than p.len_q or p.len_k, which only the
// device can tell, NaN.
cudaError_t launch_fill_rest(const Params& p, const TensorArg& x, bool queries, int heads, int dim,
                             int element_bytes, uint32_t outside, cudaStream_t stream);

// drelative_bias from the partial sums of score_gradient.
cudaError_t launch_finish_relative_bias(const Params& p, cudaStream_t stream);

}  // namespace fastattn
