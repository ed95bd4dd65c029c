// The CUDA calls of the ABI: choose the kernels, launch them on the caller's stream.
#include "sm90/launch.h"

#include <string.h>

#include "auxiliary.h"
#include "host.h"

#define CHECK(call) \
  if (const fastattn_status status_ = (call); status_ != FASTATTN_OK) return status_

namespace fastattn {
namespace {

constexpr uint32_t kAdditive = kFeatureBias | kFeatureRelative | kFeatureAlibi;
constexpr uint32_t kAll = kFeatureSoftcap | kAdditive | kFeatureDropout;
constexpr const char* kName = "sm_80 mma.sync";
constexpr const char* kHopperName = "sm_90a wgmma";

// Whether a variant computes what is needed. Only the variant of everything asks at run time what is there
// (variant.h); dropout does in every variant.
bool serves(uint32_t features, uint32_t needed) {
  return (features & needed) == needed &&
         (features == kAll || (features & ~kFeatureDropout) == (needed & ~kFeatureDropout));
}

// A Kernel with its Params, or those of sm90/params.h.
template <typename AnyKernel, typename AnyParams>
fastattn_status launch_kernel(const AnyKernel& kernel, int64_t blocks, const AnyParams& params,
                              cudaStream_t stream) {
  if (blocks == 0) return FASTATTN_OK;
  if (blocks > INT32_MAX)
    return fail(FASTATTN_UNSUPPORTED, "the problem needs %lld blocks; a launch has at most 2^31 - 1.",
                (long long)blocks);
  const void* function = reinterpret_cast<const void*>(kernel.function);
  CHECK(check_cuda(
      cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, kernel.shared_bytes),
      "preparing a kernel"));
  void* arguments[] = {const_cast<AnyParams*>(&params)};
  return check_cuda(cudaLaunchKernel(function, dim3(unsigned(blocks)), dim3(kernel.threads), arguments,
                                     kernel.shared_bytes, stream),
                    "launching a kernel");
}

fastattn_status device_capability(int device, int32_t& capability) {
  int major = 0, minor = 0;
  CHECK(check_cuda(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device),
                   "asking for the device"));
  CHECK(check_cuda(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device),
                   "asking for the device"));
  capability = 10 * major + minor;
  return FASTATTN_OK;
}

// Hopper's kernels, where the current device is one and they serve in the place of `set`; else null.
fastattn_status find_hopper(const KernelSet& set, const sm90::KernelSet*& hopper) {
  int device = 0, capability = 0;
  CHECK(check_cuda(cudaGetDevice(&device), "asking for the device"));
  CHECK(device_capability(device, capability));
  hopper = sm90::find_kernels(set, capability);
  return FASTATTN_OK;
}

// Launches a kernel of Hopper's, with its tensor maps.
fastattn_status launch_mapped(const sm90::Kernel& kernel, int64_t blocks, const Params& x,
                              cudaStream_t stream) {
  if (blocks == 0) return FASTATTN_OK;
  sm90::MappedParams y;
  CHECK(sm90::encode_maps(x, kernel, y));
  return launch_kernel(kernel, blocks, y, stream);
}

fastattn_status run_copies(const Plan& plan, int dtype, cudaStream_t stream) {
  for (int i = 0; i < plan.copy_count; ++i) {
    const Copy& c = plan.copies[i];
    CHECK(check_cuda(
        launch_pack(c.from, c.to, element_bytes(dtype), c.batch, c.heads, c.rows, c.dim, c.padded, stream),
        "launching a copy"));
  }
  return FASTATTN_OK;
}

fastattn_status fill_rest(const Params& p, const TensorArg& x, bool queries, int dim, int bytes,
                          uint32_t outside, cudaStream_t stream) {
  if (p.cu_q == nullptr || x.data == nullptr) return FASTATTN_OK;
  return check_cuda(
      launch_fill_rest(p, x, queries, queries ? p.heads : p.kv_heads, dim, bytes, outside, stream),
      "launching a fill");
}

fastattn_status check_launch(const fastattn_cuda_launch* launch) {
  if (launch == nullptr) return fail(FASTATTN_INVALID_ARGUMENT, "launch is a null pointer.");
  if (launch->struct_size != sizeof(*launch))
    return fail(FASTATTN_INVALID_ARGUMENT, "launch.struct_size is %u; this library's launch has %zu bytes.",
                launch->struct_size, sizeof(*launch));
  if (launch->num_splits < 1)
    return fail(FASTATTN_INVALID_ARGUMENT, "num_splits is %d; it must be positive.", launch->num_splits);
  if (reinterpret_cast<uintptr_t>(launch->workspace) % 256 != 0)
    return fail(FASTATTN_INVALID_ARGUMENT, "workspace is not aligned to 256 bytes.");
  return FASTATTN_OK;
}

fastattn_status check_workspace(const Workspace& used, const fastattn_cuda_launch& launch) {
  if (used.used() == 0 || (launch.workspace != nullptr && used.used() <= launch.workspace_bytes))
    return FASTATTN_OK;
  return fail(FASTATTN_OUT_OF_MEMORY, "the call needs %lld bytes of workspace and was given %lld.",
              (long long)used.used(), (long long)(launch.workspace != nullptr ? launch.workspace_bytes : 0));
}

bool wants_score_gradient(const fastattn_backward_io& io) {
  return io.dbias.data != nullptr || io.drelative_bias != nullptr;
}

fastattn_status check_score_gradient(const KernelSet& set, const fastattn_backward_io& io) {
  if (!wants_score_gradient(io) || set.score_gradient.function != nullptr) return FASTATTN_OK;
  return fail(FASTATTN_UNSUPPORTED,
              "the gradient of a bias is not computed in fp32 for head dimensions above 128.");
}

}  // namespace

const KernelSet* find_kernels(const fastattn_problem& p) {
  uint32_t needed = (p.softcap > 0.0f ? kFeatureSoftcap : 0) | (p.bias.data != nullptr ? kFeatureBias : 0) |
                    (p.relative_bias != nullptr ? kFeatureRelative : 0) |
                    (p.alibi_slopes != nullptr ? kFeatureAlibi : 0) |
                    (p.dropout_p > 0.0f ? kFeatureDropout : 0);
  // The plain kernels take the maximum before they scale, which is right for a positive scale only.
  if (!(p.softmax_scale * kLog2E > 1e-30f) && (needed & ~kFeatureDropout) == 0) needed = kAll;
  const int dim = int(p.head_dim > p.head_dim_v ? p.head_dim : p.head_dim_v);
  const KernelSet* best = nullptr;
  for (const KernelSet* const* at = kKernelSets; *at != nullptr; ++at) {
    const KernelSet& set = **at;
    if (set.dtype != p.dtype || set.dim < dim || !serves(set.features, needed)) continue;
    if (best == nullptr || set.dim < best->dim || (set.dim == best->dim && set.features < best->features))
      best = &set;
  }
  if (best == nullptr)
    fail(FASTATTN_UNSUPPORTED,
         "this library was built without kernels for dtype %d, head dimension %d, features %#x.", p.dtype,
         dim, needed);
  return best;
}

}  // namespace fastattn

using namespace fastattn;

extern "C" int32_t fastattn_abi_version(void) { return FASTATTN_ABI_VERSION; }

extern "C" const char* fastattn_cuda_architectures(void) { return FASTATTN_CUDA_ARCHITECTURES; }

extern "C" fastattn_status fastattn_cuda_versions(int32_t* toolkit, int32_t* driver) {
  if (toolkit == nullptr || driver == nullptr)
    return fail(FASTATTN_INVALID_ARGUMENT, "toolkit or driver is a null pointer.");
  *toolkit = CUDART_VERSION;
  return check_cuda(cudaDriverGetVersion(driver), "asking for the driver's version");
}

extern "C" fastattn_status fastattn_cuda_device(int32_t device, int32_t* capability, int32_t* num_sms) {
  if (capability == nullptr || num_sms == nullptr)
    return fail(FASTATTN_INVALID_ARGUMENT, "capability or num_sms is a null pointer.");
  CHECK(check_cuda(cudaDeviceGetAttribute(num_sms, cudaDevAttrMultiProcessorCount, device),
                   "asking for the device"));
  return device_capability(device, *capability);
}

extern "C" int32_t fastattn_cuda_num_splits(const fastattn_problem* p, int32_t num_sms) {
  if (validate_problem(p) != FASTATTN_OK) return 1;
  const KernelSet* set = find_kernels(*p);
  if (set == nullptr) return 1;
  const int64_t blocks = ceil_div64(p->seqlen_q, set->forward.block_q) * p->num_heads * p->batch;
  const int64_t steps = ceil_div64(p->seqlen_k, set->forward.block_k);
  // Below four steps a split costs more in merging than it gains.
  if (blocks == 0 || 2 * blocks > num_sms || steps < 8) return 1;
  int64_t splits = num_sms / blocks;
  if (splits > steps / 4) splits = steps / 4;
  return int32_t(splits < 128 ? splits : 128);
}

extern "C" const char* fastattn_cuda_forward_kernel(const fastattn_problem* p, int32_t capability,
                                                    int32_t num_splits) {
  if (validate_problem(p) != FASTATTN_OK) return nullptr;
  const KernelSet* set = find_kernels(*p);
  if (set == nullptr) return nullptr;
  return num_splits == 1 && sm90::find_kernels(*set, capability) != nullptr ? kHopperName : kName;
}

extern "C" const char* fastattn_cuda_backward_kernels(const fastattn_problem* p, int32_t capability) {
  if (validate_problem(p) != FASTATTN_OK) return nullptr;
  const KernelSet* set = find_kernels(*p);
  if (set == nullptr) return nullptr;
  return sm90::find_kernels(*set, capability) != nullptr ? kHopperName : kName;
}

extern "C" fastattn_status fastattn_cuda_forward_workspace(const fastattn_problem* p, int32_t num_splits,
                                                           int64_t* bytes) {
  CHECK(validate_problem(p));
  if (bytes == nullptr || num_splits < 1)
    return fail(FASTATTN_INVALID_ARGUMENT, "bytes is a null pointer, or num_splits is not positive.");
  Workspace workspace;
  plan_forward(*p, nullptr, num_splits, workspace);
  *bytes = workspace.used();
  return FASTATTN_OK;
}

extern "C" fastattn_status fastattn_cuda_backward_workspace(const fastattn_problem* p,
                                                            const fastattn_backward_io* io, int64_t* bytes) {
  CHECK(validate_backward(p, io));
  if (bytes == nullptr) return fail(FASTATTN_INVALID_ARGUMENT, "bytes is a null pointer.");
  const KernelSet* set = find_kernels(*p);
  if (set == nullptr) return FASTATTN_UNSUPPORTED;
  CHECK(check_score_gradient(*set, *io));
  Workspace workspace;
  plan_backward(*p, *io, set->score_gradient.block_q, workspace);
  *bytes = workspace.used();
  return FASTATTN_OK;
}

extern "C" fastattn_status fastattn_cuda_forward(const fastattn_problem* p, const fastattn_forward_result* r,
                                                 const fastattn_cuda_launch* launch) {
  CHECK(validate_forward(p, r));
  CHECK(check_launch(launch));
  const KernelSet* set = find_kernels(*p);
  if (set == nullptr) return FASTATTN_UNSUPPORTED;
  Workspace workspace(launch->workspace, launch->workspace_bytes);
  Plan plan = plan_forward(*p, r, launch->num_splits, workspace);
  CHECK(check_workspace(workspace, *launch));
  Params& x = plan.params;
  x.dropout_seed_device = launch->dropout_seed;

  const cudaStream_t stream = static_cast<cudaStream_t>(launch->stream);
  CHECK(run_copies(plan, p->dtype, stream));
  const sm90::KernelSet* hopper = nullptr;
  if (x.splits == 1) CHECK(find_hopper(*set, hopper));
  const auto blocks = [&](const auto& kernel) {
    return ceil_div64(p->seqlen_q, kernel.block_q) * x.splits * p->num_heads * p->batch;
  };
  CHECK(hopper != nullptr ? launch_mapped(hopper->forward, blocks(hopper->forward), x, stream)
                          : launch_kernel(set->forward, blocks(set->forward), x, stream));
  if (x.splits > 1) CHECK(check_cuda(launch_combine(x, p->dtype, stream), "launching the merge of splits"));
  CHECK(fill_rest(x, x.out, true, x.dim_v, element_bytes(p->dtype), 0, stream));
  const TensorArg lse = {x.lse.data, 0, x.lse.stride_h, 1, false};
  return fill_rest(x, lse, true, 1, 4, 0xff800000u, stream);
}

extern "C" fastattn_status fastattn_cuda_backward(const fastattn_problem* p, const fastattn_backward_io* io,
                                                  const fastattn_cuda_launch* launch) {
  CHECK(validate_backward(p, io));
  CHECK(check_launch(launch));
  const KernelSet* set = find_kernels(*p);
  if (set == nullptr) return FASTATTN_UNSUPPORTED;
  CHECK(check_score_gradient(*set, *io));
  Workspace workspace(launch->workspace, launch->workspace_bytes);
  Plan plan = plan_backward(*p, *io, set->score_gradient.block_q, workspace);
  CHECK(check_workspace(workspace, *launch));
  Params& x = plan.params;
  x.dropout_seed_device = launch->dropout_seed;

  const cudaStream_t stream = static_cast<cudaStream_t>(launch->stream);
  CHECK(run_copies(plan, p->dtype, stream));
  // delta = sum(out * dout) reads dout where the caller has it: rows of a copy may be padded, but are the
  // same.
  CHECK(check_cuda(launch_row_statistics(x, p->dtype, stream), "launching the row statistics"));

  const sm90::KernelSet* hopper;
  CHECK(find_hopper(*set, hopper));
  const auto key_blocks = [&](const auto& kernel) {
    return ceil_div64(p->seqlen_k, kernel.block_k) * p->num_kv_heads * p->batch;
  };
  const bool want_dk = x.dk.data != nullptr, want_dv = x.dv.data != nullptr;
  if (hopper != nullptr) {
    const bool together = want_dk && want_dv && hopper->dkdv.function != nullptr;
    if (together) CHECK(launch_mapped(hopper->dkdv, key_blocks(hopper->dkdv), x, stream));
    if (want_dk && !together) CHECK(launch_mapped(hopper->dk, key_blocks(hopper->dk), x, stream));
    if (want_dv && !together) CHECK(launch_mapped(hopper->dv, key_blocks(hopper->dv), x, stream));
  } else {
    if (set->dkdv.function != nullptr && (want_dk || want_dv))
      CHECK(launch_kernel(set->dkdv, key_blocks(set->dkdv), x, stream));
    if (set->dk.function != nullptr && want_dk) CHECK(launch_kernel(set->dk, key_blocks(set->dk), x, stream));
    if (set->dv.function != nullptr && want_dv) CHECK(launch_kernel(set->dv, key_blocks(set->dv), x, stream));
  }
  if (x.dq.data != nullptr) {
    const auto blocks = [&](const auto& kernel) {
      return ceil_div64(p->seqlen_q, kernel.block_q) * p->num_heads * p->batch;
    };
    CHECK(hopper != nullptr ? launch_mapped(hopper->dq, blocks(hopper->dq), x, stream)
                            : launch_kernel(set->dq, blocks(set->dq), x, stream));
  }
  CHECK(fill_rest(x, x.dq, true, x.dim, element_bytes(p->dtype), 0, stream));
  CHECK(fill_rest(x, x.dk, false, x.dim, element_bytes(p->dtype), 0, stream));
  CHECK(fill_rest(x, x.dv, false, x.dim_v, element_bytes(p->dtype), 0, stream));

  const Kernel& scores = set->score_gradient;
  if (io->dbias.data != nullptr) {
    Params y = x;
    y.drelative_partial = nullptr;
    const int64_t rows = y.dbias_q == 1 ? 1 : ceil_div64(p->seqlen_q, scores.block_q);
    const int64_t cols = y.dbias_k == 1 ? 1 : ceil_div64(p->seqlen_k, scores.block_k);
    CHECK(launch_kernel(scores, int64_t(y.dbias_batch) * y.dbias_heads * rows * cols, y, stream));
  }
  if (io->drelative_bias != nullptr) {
    CHECK(launch_kernel(scores, int64_t(x.heads) * x.diagonals, x, stream));
    CHECK(check_cuda(launch_finish_relative_bias(x, stream), "launching the sum over diagonals"));
  }
  return FASTATTN_OK;
}
