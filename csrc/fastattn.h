/* The C ABI of fastattn's native libraries.
 *
 * Plain structs and status codes: no torch, no C++ across this line, so that one library serves
 * every Python and every torch, and the kernels can be tested, fuzzed and sanitised without either.
 *
 * Conventions
 *   - Every tensor is a base pointer with strides counted in elements. The last dimension of q, k, v,
 *     out and their gradients is contiguous. A null pointer means "absent" or "not wanted".
 *   - Padded layout: q is (batch, num_heads, seqlen_q, head_dim).
 *   - Packed layout (cu_seqlens_q != NULL): q is (total_q, num_heads, head_dim); sequence b owns rows
 *     cu_seqlens_q[b] .. cu_seqlens_q[b+1]-1, batch strides are ignored, seqlen_q and seqlen_k hold
 *     the longest sequence, and lse/dlse/delta are (num_heads, total_q).
 *   - The library reads and writes nothing outside the extents named here, and checks every size
 *     it can before the first access. It never aborts and never throws across the ABI.
 */
#ifndef FASTATTN_H
#define FASTATTN_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#if defined(_WIN32)
#define FASTATTN_API __declspec(dllexport)
#else
#define FASTATTN_API __attribute__((visibility("default")))
#endif

/* Raised whenever a struct below changes; Python refuses a library that answers another number. */
#define FASTATTN_ABI_VERSION 1

typedef enum {
  FASTATTN_OK = 0,
  FASTATTN_INVALID_ARGUMENT = 1, /* the problem is malformed: a caller's bug */
  FASTATTN_UNSUPPORTED = 2,      /* well-formed, but this library cannot compute it */
  FASTATTN_OUT_OF_MEMORY = 3,    /* the workspace could not be allocated */
  FASTATTN_DEVICE_ERROR = 4      /* the CUDA driver or runtime refused */
} fastattn_status;

typedef enum {
  FASTATTN_F32 = 0,
  FASTATTN_F16 = 1,
  FASTATTN_BF16 = 2,
  /* As dtype of a problem for the CPU: fp32 tensors whose products of matrices may be taken in bf16. */
  FASTATTN_F32_BF16_PRODUCTS = 3,
  /* The same with each element as the sum of two bf16 numbers, and in fp32 where that is not faster. */
  FASTATTN_F32_SPLIT_PRODUCTS = 4
} fastattn_dtype;

/* (batch, head, row, column): what each index adds to data, in elements. 0 broadcasts (inputs only,
 * and the gradient of a bias, which is summed over the axes it is broadcast on). */
typedef struct {
  void* data;
  int64_t stride_b;
  int64_t stride_h;
  int64_t stride_n;
} fastattn_tensor;

typedef struct {
  void* data;
  int64_t stride_b;
  int64_t stride_h;
  int64_t stride_q;
  int64_t stride_k;
} fastattn_bias;

/* How the library runs work on several threads. parallel_for calls fn(begin, end, context) on
 * disjoint ranges that together cover [begin, end), and returns when all are done; its signature is
 * that of torch_parallel_for, so torch's own pool can be passed as it is. NULL: the library's own
 * small pool of num_threads threads. */
typedef void (*fastattn_range_fn)(int64_t begin, int64_t end, void* context);
typedef int32_t (*fastattn_parallel_for)(int64_t begin, int64_t end, int64_t grain, fastattn_range_fn fn,
                                         void* context);
typedef struct {
  fastattn_parallel_for parallel_for;
  int32_t num_threads;
} fastattn_executor;

/* What is to be computed: s = softcap_fn(softmax_scale * q k^T) + bias + relative_bias + alibi, masked;
 * out = dropout(softmax(s)) v. */
typedef struct {
  uint32_t struct_size; /* sizeof(fastattn_problem) of the caller */
  int32_t dtype;        /* fastattn_dtype of q, k, v, out and their gradients */

  int64_t batch;
  int64_t num_heads;    /* query heads; a multiple of num_kv_heads */
  int64_t num_kv_heads; /* query head h reads kv head h / (num_heads / num_kv_heads) */
  int64_t seqlen_q;
  int64_t seqlen_k;
  int64_t head_dim;   /* of q and k, 1..256 */
  int64_t head_dim_v; /* of v and out, 1..256 */

  float softmax_scale;
  float softcap;       /* 0: none; else softcap * tanh(s / softcap) */
  float dropout_p;     /* 0 <= p < 1 */
  int32_t causal;      /* bottom-right: query i sees keys j <= i + seqlen_k - seqlen_q */
  int64_t window_left; /* -1: unlimited; else query i sees j >= i + seqlen_k - seqlen_q - left */
  int64_t window_right;
  uint64_t dropout_seed;

  /* Packed layout: batch + 1 ascending offsets each, both or neither. */
  const int32_t* cu_seqlens_q;
  const int32_t* cu_seqlens_k;
  int64_t total_q; /* rows of the packed q; cu_seqlens_q[batch] must not exceed it */
  int64_t total_k;

  const uint8_t* key_mask; /* (batch, seqlen_k), nonzero = attend; padded layout only */
  int64_t key_mask_stride_b;

  fastattn_bias bias; /* (batch, num_heads, seqlen_q, seqlen_k) after broadcasting */
  int32_t bias_dtype; /* fastattn_dtype */
  int32_t reserved0;  /* 0 */

  /* fp32 (num_heads, seqlen_q + seqlen_k - 1): entry [h][j - i + seqlen_q - 1] is added to the score
   * of query i and key j (both counted within their sequence, also in the packed layout). */
  const float* relative_bias;
  int64_t relative_bias_stride_h;

  /* fp32, adds -slope * |i + seqlen_k - seqlen_q - j|; strides may be 0. */
  const float* alibi_slopes;
  int64_t alibi_stride_b;
  int64_t alibi_stride_h;

  fastattn_tensor q;
  fastattn_tensor k;
  fastattn_tensor v;
} fastattn_problem;

/* out = attention, lse (optional) = log sum exp of the scores of each row, natural log, fp32.
 * A row with no visible key gives out = 0 and lse = -inf. */
typedef struct {
  uint32_t struct_size;
  uint32_t reserved0;
  fastattn_tensor out;
  float* lse;
  int64_t lse_stride_b;
  int64_t lse_stride_h;
} fastattn_forward_result;

/* The gradients wanted are those whose pointer is not null; each subset costs only its own work.
 * dk and dv are summed over the query heads of a kv head. */
typedef struct {
  uint32_t struct_size;
  uint32_t reserved0;
  /* what forward returned and the gradients that reached it */
  fastattn_tensor out;
  fastattn_tensor dout;
  const float* lse;
  int64_t lse_stride_b;
  int64_t lse_stride_h;
  const float* dlse; /* optional */
  int64_t dlse_stride_b;
  int64_t dlse_stride_h;
  /* what is to be written */
  fastattn_tensor dq;
  fastattn_tensor dk;
  fastattn_tensor dv;
  fastattn_bias dbias;   /* fp32; stride 0 where bias was broadcast: summed over that axis */
  float* drelative_bias; /* fp32, shape of relative_bias, contiguous rows */
  int64_t drelative_bias_stride_h;
} fastattn_backward_io;

/* Dropout of hidden states: out = keep ? x * 65536 / (65536 - round(dropout_p * 65536)) : 0, for contiguous
 * (rows, columns) x and out, which may be the same memory. Element c of position n of sequence b is kept
 * where the attention weight (b, h = 0, i = n, j = c) would be. Row r is position r % seqlen of sequence r /
 * seqlen, or, with batch + 1 ascending offsets cu_seqlens from 0 to rows, position r - cu_seqlens[b] of
 * sequence b. */
typedef struct {
  uint32_t struct_size;
  int32_t dtype;
  const void* x;
  void* out;
  int64_t rows;
  int64_t columns;
  int64_t seqlen; /* padded layout only */
  int64_t batch;  /* packed layout only */
  const int32_t* cu_seqlens;
  uint64_t seed;
  float dropout_p;   /* 0 <= p < 1 */
  int32_t reserved0; /* 0 */
} fastattn_hidden_dropout;

/* Rotary position embedding of q and, unless num_kv_heads is 0, of k alike. With half = rotary_dim / 2, for i
 * below half, c and s the rows of cos and sin of the position (b, n):
 *   out[i] = x[i] c[i] - x[half + i] s[i]        out[half + i] = x[half + i] c[half + i] + x[i] s[half + i]
 * and what lies behind rotary_dim is copied. transposed: the transpose of that matrix, which takes the
 * gradient of out to that of x. */
typedef struct {
  uint32_t struct_size;
  int32_t dtype;       /* of q, k and what is written: FASTATTN_F32, F16 or BF16 */
  int32_t table_dtype; /* of cos and sin: the same, or FASTATTN_F32 */
  int32_t transposed;  /* 0 or 1 */
  int64_t batch;
  int64_t num_heads;
  int64_t num_kv_heads;
  int64_t seqlen;
  int64_t head_dim;   /* 1..256 */
  int64_t rotary_dim; /* even, positive, at most head_dim */
  fastattn_tensor q;
  fastattn_tensor k;
  fastattn_tensor q_out;
  fastattn_tensor k_out;
  const void* cos; /* (batch, seqlen, rotary_dim), the last dimension contiguous; other strides may be 0 */
  int64_t cos_stride_b;
  int64_t cos_stride_n;
  const void* sin;
  int64_t sin_stride_b;
  int64_t sin_stride_n;
} fastattn_rotary;

/* A linear layer in fp32: out = f(x w^T + bias), f the identity or GELU (by erf), with w as the layer keeps
 * it, (out_features, in_features), and x (rows, in_features). transposed: out = f(x w + bias), for w of
 * (in_features, out_features): what takes the gradient of a layer's output to that of its input. */
typedef struct {
  uint32_t struct_size;
  int32_t transposed; /* 0 or 1 */
  int32_t gelu;       /* 0 or 1 */
  int32_t reserved0;  /* 0 */
  int64_t rows;
  int64_t in_features;  /* positive */
  int64_t out_features; /* a positive multiple of 16 */
  const float* x;       /* (rows, in_features); in all three the last dimension is contiguous */
  int64_t stride_x;
  const float* weight;
  int64_t stride_weight;
  const float* bias; /* (out_features), or NULL */
  float* out;        /* (rows, out_features) */
  int64_t stride_out;
} fastattn_linear;

FASTATTN_API int32_t fastattn_abi_version(void);

/* What the last call that failed on this thread found wrong: one English sentence, never NULL. */
FASTATTN_API const char* fastattn_last_error(void);

/* ---- CPU ------------------------------------------------------------------------------------ */

/* The instruction set in use, e.g. "avx2"; the environment variable FASTATTN_CPU_ISA lowers it. Where it
   names none that there is: "", and fastattn_last_error says so. */
FASTATTN_API const char* fastattn_cpu_isa(void);

/* Comma-separated names of all instruction sets compiled into this library that this machine runs. */
FASTATTN_API const char* fastattn_cpu_isas(void);

FASTATTN_API fastattn_status fastattn_cpu_forward(const fastattn_problem* problem,
                                                  const fastattn_forward_result* result,
                                                  const fastattn_executor* executor);

FASTATTN_API fastattn_status fastattn_cpu_backward(const fastattn_problem* problem,
                                                   const fastattn_backward_io* io,
                                                   const fastattn_executor* executor);

/* Its own gradient: applied to that of out, it gives that of x. */
FASTATTN_API fastattn_status fastattn_cpu_hidden_dropout(const fastattn_hidden_dropout* io,
                                                         const fastattn_executor* executor);

FASTATTN_API fastattn_status fastattn_cpu_rotary(const fastattn_rotary* io,
                                                 const fastattn_executor* executor);

FASTATTN_API fastattn_status fastattn_cpu_linear(const fastattn_linear* io,
                                                 const fastattn_executor* executor);

/* keep[b][h][i][j] = 1 where dropout keeps, for tests and for the reference: (batch, num_heads,
 * seqlen_q, seqlen_k) contiguous bytes. The same function of (seed, b, h, i, j) on every backend. */
FASTATTN_API fastattn_status fastattn_cpu_dropout_mask(uint64_t seed, float dropout_p, int64_t batch,
                                                       int64_t num_heads, int64_t seqlen_q, int64_t seqlen_k,
                                                       uint8_t* keep);

/* ---- CUDA -----------------------------------------------------------------------------------
 *
 * The same problem and result structs, with every pointer in them device memory of the current device.
 * Calls enqueue kernels on a stream and return; they neither synchronise nor allocate. Beyond the
 * limits above: lengths below 2^28, |stride_n| of q, k, v, out and their gradients below 2^31 elements,
 * bias_dtype FASTATTN_F32 or that of q. */

/* How a call is to run. */
typedef struct {
  uint32_t struct_size;
  int32_t num_splits; /* forward only: parts the keys are divided into, at least 1 */
  void* stream;       /* cudaStream_t */
  void* workspace;    /* device memory, 256-byte aligned; its content is overwritten */
  int64_t workspace_bytes;
  const uint64_t* dropout_seed; /* device memory, replaces problem->dropout_seed; NULL: that one */
} fastattn_cuda_launch;

/* What this library was built for, e.g. "80,90a-real": machine code for one architecture each ("-real"), and
 * PTX that the driver translates for newer ones. */
FASTATTN_API const char* fastattn_cuda_architectures(void);

/* CUDA's version, 1000 * major + 10 * minor: when this library was compiled, and of the driver (0: there is
 * none). */
FASTATTN_API fastattn_status fastattn_cuda_versions(int32_t* toolkit, int32_t* driver);

/* Of device `device`: 10 * major + minor of its compute capability, and its multiprocessors. */
FASTATTN_API fastattn_status fastattn_cuda_device(int32_t device, int32_t* capability, int32_t* num_sms);

/* The number of splits that fills a device of num_sms multiprocessors where queries are few (decoding). */
FASTATTN_API int32_t fastattn_cuda_num_splits(const fastattn_problem* problem, int32_t num_sms);

/* The kernels that a pass takes on a device of this capability: architecture and matrix instruction, or
 * null after an error. */
FASTATTN_API const char* fastattn_cuda_forward_kernel(const fastattn_problem* problem, int32_t capability,
                                                      int32_t num_splits);
FASTATTN_API const char* fastattn_cuda_backward_kernels(const fastattn_problem* problem, int32_t capability);

/* Bytes of workspace that a call of the same arguments needs; addresses in the structs count only by
 * being null or not and by their alignment. */
FASTATTN_API fastattn_status fastattn_cuda_forward_workspace(const fastattn_problem* problem,
                                                             int32_t num_splits, int64_t* bytes);
FASTATTN_API fastattn_status fastattn_cuda_backward_workspace(const fastattn_problem* problem,
                                                              const fastattn_backward_io* io, int64_t* bytes);

/* In the packed layout rows before the first and beyond the last sequence are set to 0 (lse: -inf), and
 * offsets that leave the tensor are cut off at its end. */
FASTATTN_API fastattn_status fastattn_cuda_forward(const fastattn_problem* problem,
                                                   const fastattn_forward_result* result,
                                                   const fastattn_cuda_launch* launch);
FASTATTN_API fastattn_status fastattn_cuda_backward(const fastattn_problem* problem,
                                                    const fastattn_backward_io* io,
                                                    const fastattn_cuda_launch* launch);

#ifdef __cplusplus
}
#endif

#endif /* FASTATTN_H */
