// Bytes become a problem, sound or malformed, with memory of just the extents it names between guard pages:
// whatever the struct says, the library answers with a status and touches nothing else.
//
// With clang this is a libFuzzer target; elsewhere main() below feeds it seeded random bytes
// (fuzz_problem SECONDS [SEED]), or a file that it left behind (fuzz_problem crash-input). In its place,
// fuzz_problem --corpus FOLDER writes inputs that are sound problems, for libFuzzer to begin with.
#include <signal.h>

#include <algorithm>
#include <chrono>
#include <limits>
#include <string>

#include "array.h"
#include "fastattn.h"

using fastattn_test::Edge;
using fastattn_test::GuardedMemory;

namespace {

constexpr int64_t kHuge = std::numeric_limits<int64_t>::max() / 2;
constexpr int64_t kMostElements = 1 << 20;

class Bytes {
 public:
  Bytes(const uint8_t* data, size_t size) : data_(data), size_(size) {}
  int64_t below(int64_t n) { return next() % n; }
  bool rarely() { return next() < 4; }
  // Mostly 0..most; now and then a value that no caller means.
  int64_t dimension(int64_t most) {
    static const int64_t kOdd[] = {-1, 0, kHuge, std::numeric_limits<int64_t>::min(), 2 * kHuge, 257};
    return rarely() ? kOdd[below(6)] : below(most + 1);
  }
  float scalar() {
    static const float kValues[] = {0,
                                    0.1f,
                                    0.5f,
                                    1,
                                    30,
                                    -1,
                                    1e30f,
                                    std::numeric_limits<float>::quiet_NaN(),
                                    std::numeric_limits<float>::infinity(),
                                    1e-40f};
    return kValues[below(10)];
  }

 private:
  int next() { return at_ < size_ ? data_[at_++] : 0; }
  const uint8_t* data_;
  size_t size_, at_ = 0;
};

// The elements that a shape with these strides spans, or -1 where that is no sensible number.
int64_t extent(std::initializer_list<int64_t> shape, std::initializer_list<int64_t> stride) {
  __int128 span = 1;
  auto step = stride.begin();
  for (int64_t size : shape) {
    const int64_t stride_of_axis = *step++;
    if (stride_of_axis == 0 && size == 0) size = 1;  // broadcast over nothing is still one element
    if (size == 0) return 0;
    if (size < 0 || (size > 1 && stride_of_axis < 0)) return -1;
    span += static_cast<__int128>(size - 1) * stride_of_axis;
    if (span > kMostElements) return -1;
  }
  return static_cast<int64_t>(span);
}

bool is_small(int64_t length) { return length >= 0 && length < 4096; }

struct Harness {
  explicit Harness(const uint8_t* data, size_t size) : bytes(data, size) {}

  Bytes bytes;
  std::vector<GuardedMemory> memories;
  // Set where a size is large but possible: such a struct would be a lie about memory that does not
  // exist, which no library can detect.
  bool lies = false;

  void* allocate(int64_t elements, size_t width) {
    if (bytes.rarely()) return nullptr;
    const size_t length = elements < 0 ? 0 : static_cast<size_t>(elements) * width;
    memories.emplace_back(length, bytes.below(2) ? Edge::kBack : Edge::kFront);
    if (bytes.below(2) && length > 0) memset(memories.back().data(), 0, length);
    return memories.back().data();
  }

  uint32_t struct_size(size_t right) {
    return bytes.rarely() ? static_cast<uint32_t>(bytes.below(256)) : static_cast<uint32_t>(right);
  }
  uint32_t reserved() { return bytes.rarely() ? static_cast<uint32_t>(bytes.below(3)) : 0; }

  int64_t stride(int64_t dense) {
    if (!bytes.rarely()) return dense;
    dense = std::clamp<int64_t>(dense, 0, kMostElements);
    const int64_t odd[] = {0, 1, dense + 3, kHuge, -dense};
    return odd[bytes.below(5)];
  }

  // Rows of q, k, v or an output. A span of -1 must be refused, unless it is merely large.
  fastattn_tensor rows(const fastattn_problem& p, int64_t heads, int64_t length, int64_t total,
                       int64_t columns) {
    const bool packed = p.cu_seqlens_q != nullptr && p.cu_seqlens_k != nullptr;
    const int64_t n = packed ? total : length;
    const bool sane = columns > 0 && columns <= 257 && heads > 0 && heads < 64 && is_small(n);
    fastattn_tensor t = {};
    t.stride_n = stride(columns);
    t.stride_h = stride(sane ? columns * n : columns);
    t.stride_b = stride(sane ? columns * n * heads : columns);
    const int64_t elements = columns <= 0 || columns > 256 ? -1
                                                           : extent({packed ? 1 : p.batch, heads, n, columns},
                                                                    {t.stride_b, t.stride_h, t.stride_n, 1});
    t.data = allocate(elements, fastattn_test::is_fp32(p.dtype) ? 4 : 2);
    note(elements, {p.batch, heads, n, columns}, {t.stride_b, t.stride_h, t.stride_n});
    return t;
  }

  void note(int64_t elements, std::initializer_list<int64_t> shape, std::initializer_list<int64_t> stride) {
    if (elements >= 0) return;
    bool refusable = false;
    auto step = stride.begin();
    for (int64_t size : shape) {
      refusable |= size < 0 || size >= kHuge;
      if (step != stride.end()) refusable |= size > 1 && (*step < 0 || *step >= kHuge), ++step;
    }
    lies |= !refusable;
  }

  const int32_t* offsets(int64_t batch, int64_t total) {
    if (batch < 0 || batch > 8) return nullptr;
    int32_t* list = static_cast<int32_t*>(allocate(batch + 1, 4));
    if (list == nullptr) return nullptr;
    for (int64_t b = 0; b <= batch; ++b)
      list[b] = bytes.rarely()
                    ? static_cast<int32_t>(bytes.below(200) - 100)
                    : static_cast<int32_t>(is_small(total) ? total * b / std::max<int64_t>(batch, 1) : 0);
    return list;
  }

  fastattn_problem problem() {
    fastattn_problem p = {};
    p.struct_size = struct_size(sizeof p);
    p.reserved0 = static_cast<int32_t>(reserved());
    p.dtype = static_cast<int32_t>(bytes.rarely() ? bytes.below(8) - 2 : bytes.below(5));
    p.batch = bytes.dimension(3);
    p.num_kv_heads = bytes.dimension(3);
    p.num_heads = bytes.rarely() || p.num_kv_heads < 0 || p.num_kv_heads > 8
                      ? bytes.dimension(6)
                      : p.num_kv_heads * (1 + bytes.below(2));
    const int64_t kind = bytes.below(16);  // 0: few queries and many keys, which are split; 1: key tiles
    p.seqlen_q = bytes.dimension(kind == 0 ? 8 : 70);
    p.seqlen_k = kind == 0   ? 1024 + bytes.below(256)
                 : kind == 1 ? 200 + bytes.below(256)
                             : bytes.dimension(140);
    p.head_dim = bytes.dimension(bytes.below(8) ? 40 : 256);
    p.head_dim_v = bytes.below(2) ? p.head_dim : bytes.dimension(bytes.below(8) ? 40 : 256);
    p.softmax_scale = bytes.below(2) ? 0.2f : bytes.scalar();
    p.softcap = bytes.below(4) ? 0 : bytes.scalar();
    p.dropout_p = bytes.below(3) ? 0 : bytes.scalar();
    p.dropout_seed = static_cast<uint64_t>(bytes.below(256));
    p.causal = static_cast<int32_t>(bytes.below(3));
    p.window_left = bytes.below(3) ? -1 : bytes.dimension(50);
    p.window_right = bytes.below(3) ? -1 : bytes.dimension(50);
    if (bytes.below(3) == 0) {
      const bool small = p.batch >= 0 && p.batch <= 8 && is_small(p.seqlen_q) && is_small(p.seqlen_k);
      p.total_q = bytes.rarely() || !small ? bytes.dimension(90) : p.seqlen_q * p.batch;
      p.total_k = bytes.rarely() || !small ? bytes.dimension(90) : p.seqlen_k * p.batch;
      p.cu_seqlens_q = offsets(p.batch, p.total_q);
      p.cu_seqlens_k = offsets(p.batch, p.total_k);
    }
    p.q = rows(p, p.num_heads, p.seqlen_q, p.total_q, p.head_dim);
    p.k = rows(p, p.num_kv_heads, p.seqlen_k, p.total_k, p.head_dim);
    p.v = rows(p, p.num_kv_heads, p.seqlen_k, p.total_k, p.head_dim_v);
    if (bytes.below(4) == 0) {
      p.key_mask_stride_b = stride(p.seqlen_k);
      const int64_t elements = extent({p.batch, p.seqlen_k}, {p.key_mask_stride_b, 1});
      p.key_mask = static_cast<uint8_t*>(allocate(elements, 1));
      note(elements, {p.batch, p.seqlen_k}, {p.key_mask_stride_b});
    }
    if (bytes.below(4) == 0) p.bias = matrix(p, &p.bias_dtype);
    if (bytes.below(4) == 0) p.relative_bias = diagonals(p, &p.relative_bias_stride_h);
    if (bytes.below(4) == 0) {
      p.alibi_stride_b = bytes.below(2), p.alibi_stride_h = stride(1);
      const int64_t elements = extent({p.batch, p.num_heads}, {p.alibi_stride_b, p.alibi_stride_h});
      p.alibi_slopes = static_cast<float*>(allocate(elements, 4));
      note(elements, {p.batch, p.num_heads}, {p.alibi_stride_b, p.alibi_stride_h});
    }
    return p;
  }

  fastattn_bias matrix(const fastattn_problem& p, int32_t* dtype) {
    *dtype = static_cast<int32_t>(bytes.rarely() ? 5 : bytes.below(3));
    const bool small = is_small(p.seqlen_q) && is_small(p.seqlen_k) && p.num_heads > 0 && p.num_heads < 64;
    const int64_t rows = small ? p.seqlen_k : 1, heads = small ? p.seqlen_k * p.seqlen_q : 1;
    fastattn_bias b = {};
    b.stride_k = stride(1);
    b.stride_q = bytes.below(4) ? stride(rows) : 0;
    b.stride_h = bytes.below(2) ? stride(heads) : 0;
    b.stride_b = bytes.below(2) ? stride(small ? heads * p.num_heads : 1) : 0;
    place(p, &b, *dtype == FASTATTN_F32 ? 4 : 2);
    return b;
  }

  // As the bias or summed over more of its axes.
  fastattn_bias matrix_gradient(const fastattn_problem& p) {
    fastattn_bias b = p.bias;
    for (int64_t* own : {&b.stride_b, &b.stride_h, &b.stride_q, &b.stride_k})
      if (bytes.below(8) == 0) *own = stride(0);
    place(p, &b, 4);
    return b;
  }

  void place(const fastattn_problem& p, fastattn_bias* b, size_t width) {
    const int64_t elements = extent({p.batch, p.num_heads, p.seqlen_q, p.seqlen_k},
                                    {b->stride_b, b->stride_h, b->stride_q, b->stride_k});
    b->data = allocate(elements, width);
    note(elements, {p.batch, p.num_heads, p.seqlen_q, p.seqlen_k},
         {b->stride_b, b->stride_h, b->stride_q, b->stride_k});
  }

  float* diagonals(const fastattn_problem& p, int64_t* stride_h) {
    if (!is_small(p.seqlen_q) || !is_small(p.seqlen_k)) return nullptr;
    const int64_t count = std::max<int64_t>(0, p.seqlen_q + p.seqlen_k - 1);
    *stride_h = stride(count);
    const int64_t elements = extent({p.num_heads, count}, {*stride_h, 1});
    float* const data = static_cast<float*>(allocate(elements, 4));
    note(elements, {p.num_heads, count}, {*stride_h});
    return data;
  }

  fastattn_hidden_dropout hidden_dropout() {
    fastattn_hidden_dropout io = {};
    io.struct_size = struct_size(sizeof io);
    io.reserved0 = static_cast<int32_t>(reserved());
    io.dtype = static_cast<int32_t>(bytes.rarely() ? bytes.below(7) - 2 : bytes.below(3));
    io.rows = bytes.dimension(40);
    io.columns = bytes.dimension(200);
    io.dropout_p = bytes.below(3) ? 0.3f : bytes.scalar();
    io.seqlen = bytes.dimension(9);
    io.batch = bytes.dimension(6);
    if (bytes.below(2)) io.cu_seqlens = offsets(io.batch, io.rows);
    const bool possible = io.rows >= 0 && io.rows < kHuge && io.columns >= 0 && io.columns < kHuge;
    const int64_t elements = possible ? io.rows * io.columns : -1;
    const size_t width = fastattn_test::is_fp32(io.dtype) ? 4 : 2;
    io.x = allocate(elements, width);
    io.out = bytes.below(4) ? allocate(elements, width) : const_cast<void*>(io.x);
    return io;
  }

  float* statistics(const fastattn_problem& p, int64_t* stride_b, int64_t* stride_h) {
    const bool packed = p.cu_seqlens_q != nullptr && p.cu_seqlens_k != nullptr;
    const int64_t n = packed ? p.total_q : p.seqlen_q;
    const bool small = is_small(n) && p.num_heads > 0 && p.num_heads < 64;
    *stride_h = stride(small ? n : 1);
    *stride_b = stride(small ? n * p.num_heads : 1);
    const int64_t elements = extent({packed ? 1 : p.batch, p.num_heads, n}, {*stride_b, *stride_h, 1});
    float* const data = static_cast<float*>(allocate(elements, 4));
    note(elements, {p.batch, p.num_heads, n}, {*stride_b, *stride_h});
    return data;
  }
};

void expect_sentence(fastattn_status status) {
  if (status == FASTATTN_OK) return;
  if (status < 0 || status > FASTATTN_DEVICE_ERROR || fastattn_last_error() == nullptr ||
      *fastattn_last_error() == 0) {
    fprintf(stderr, "status %d without a sentence\n", status);
    abort();
  }
}

// How many calls were well-formed, by function.
struct Accepted {
  int64_t forward, backward, hidden_dropout, dropout_mask;
} accepted;

void count(fastattn_status status, int64_t* accepted_calls) {
  expect_sentence(status);
  *accepted_calls += status == FASTATTN_OK;
}

void fuzz_dropout(Harness& harness, const fastattn_executor& executor) {
  const fastattn_hidden_dropout io = harness.hidden_dropout();
  count(fastattn_cpu_hidden_dropout(&io, &executor), &accepted.hidden_dropout);
  Bytes& bytes = harness.bytes;
  const int64_t n[] = {bytes.dimension(3), bytes.dimension(3), bytes.dimension(5), bytes.dimension(300)};
  int64_t elements = 1;
  for (int64_t size : n) elements = size < 0 || size > 1000 ? 0 : elements * size;
  uint8_t* const keep = static_cast<uint8_t*>(harness.allocate(elements, 1));
  count(fastattn_cpu_dropout_mask(7, bytes.below(3) ? 0.3f : bytes.scalar(), n[0], n[1], n[2], n[3], keep),
        &accepted.dropout_mask);
}

void fuzz_attention(Harness& harness, const fastattn_executor& executor) {
  Bytes& bytes = harness.bytes;
  const fastattn_problem p = harness.problem();
  fastattn_forward_result result = {};
  result.struct_size = harness.struct_size(sizeof result);
  result.reserved0 = harness.reserved();
  result.out = harness.rows(p, p.num_heads, p.seqlen_q, p.total_q, p.head_dim_v);
  result.lse = harness.statistics(p, &result.lse_stride_b, &result.lse_stride_h);

  fastattn_backward_io io = {};
  io.struct_size = harness.struct_size(sizeof io);
  io.reserved0 = harness.reserved();
  io.out = result.out;
  io.lse = result.lse, io.lse_stride_b = result.lse_stride_b, io.lse_stride_h = result.lse_stride_h;
  io.dout = harness.rows(p, p.num_heads, p.seqlen_q, p.total_q, p.head_dim_v);
  if (bytes.below(2)) io.dlse = harness.statistics(p, &io.dlse_stride_b, &io.dlse_stride_h);
  const int64_t wanted = bytes.below(32);
  if (wanted & 1) io.dq = harness.rows(p, p.num_heads, p.seqlen_q, p.total_q, p.head_dim);
  if (wanted & 2) io.dk = harness.rows(p, p.num_kv_heads, p.seqlen_k, p.total_k, p.head_dim);
  if (wanted & 4) io.dv = harness.rows(p, p.num_kv_heads, p.seqlen_k, p.total_k, p.head_dim_v);
  if (wanted & 8 && (p.bias.data != nullptr || bytes.rarely())) io.dbias = harness.matrix_gradient(p);
  if (wanted & 16 && (p.relative_bias != nullptr || bytes.rarely()))
    io.drelative_bias = harness.diagonals(p, &io.drelative_bias_stride_h);
  if (bytes.rarely()) io.dv.data = io.dk.data;
  if (harness.lies) return;
  count(fastattn_cpu_forward(&p, &result, &executor), &accepted.forward);
  count(fastattn_cpu_backward(&p, &io, &executor), &accepted.backward);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  Harness harness(data, size);
  const bool right = !harness.bytes.rarely();
  const fastattn_executor executor = {nullptr,
                                      static_cast<int32_t>(harness.bytes.below(4) + (right ? 1 : -1))};
  if (harness.bytes.below(16) == 0)
    fuzz_dropout(harness, executor);
  else
    fuzz_attention(harness, executor);
  return 0;
}

#ifndef FASTATTN_LIBFUZZER
namespace {

std::vector<uint8_t> bytes(200);

// What libFuzzer does: the bytes that crashed go to a file, to be run again under a debugger.
void on_fault(int signal_number) {
  if (FILE* file = fopen("crash-input", "wb")) {
    fwrite(bytes.data(), 1, bytes.size(), file);
    fclose(file);
  }
  static const char text[] = "crashed; run again: fuzz_problem crash-input\n";
  (void)!write(2, text, sizeof text - 1);
  signal(signal_number, SIG_DFL);
  raise(signal_number);
}

void run_random(fastattn_test::Random& random) {
  for (uint8_t& byte : bytes) byte = static_cast<uint8_t>(random());
  LLVMFuzzerTestOneInput(bytes.data(), bytes.size());
}

// Random mutation does not find its way past every check at once; 64 problems that pass them all do not
// have to.
int write_corpus(const std::string& folder) {
  fastattn_test::Random random(1);
  for (int written = 0; written < 64;) {
    const Accepted before = accepted;
    run_random(random);
    if (accepted.backward == before.backward && accepted.hidden_dropout == before.hidden_dropout) continue;
    FILE* const file = fopen((folder + "/" + std::to_string(written++)).c_str(), "wb");
    if (file == nullptr) return perror(folder.c_str()), 1;
    fwrite(bytes.data(), 1, bytes.size(), file);
    fclose(file);
  }
  return 0;
}

}  // namespace

int main(int count, char** arguments) {
  for (int fault : {SIGSEGV, SIGBUS, SIGABRT, SIGFPE, SIGILL}) signal(fault, on_fault);
  if (count == 3 && strcmp(arguments[1], "--corpus") == 0) return write_corpus(arguments[2]);
  if (FILE* file = count == 2 ? fopen(arguments[1], "rb") : nullptr) {
    bytes.resize(fread(bytes.data(), 1, bytes.size(), file));
    fclose(file);
    return LLVMFuzzerTestOneInput(bytes.data(), bytes.size());
  }
  const double seconds = count > 1 ? atof(arguments[1]) : 10;
  const unsigned long long seed = count > 2 ? strtoull(arguments[2], nullptr, 10) : 1;
  fastattn_test::Random random(seed);
  const auto start = std::chrono::steady_clock::now();
  int64_t runs = 0;
  for (; std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count() < seconds; ++runs)
    run_random(random);
  printf(
      "%s, seed %llu: none of %lld random problems crashed; sound were %lld forward, %lld backward,\n"
      "    %lld hidden dropout, %lld dropout masks\n",
      fastattn_cpu_isa(), seed, static_cast<long long>(runs), static_cast<long long>(accepted.forward),
      static_cast<long long>(accepted.backward), static_cast<long long>(accepted.hidden_dropout),
      static_cast<long long>(accepted.dropout_mask));
  // A driver whose problems are all refused tests nothing. A stalled machine may not have run enough to tell.
  const bool refused = accepted.forward * 10 < runs || accepted.backward * 10 < runs ||
                       accepted.hidden_dropout == 0 || accepted.dropout_mask == 0;
  return runs >= 500 && refused;
}
#endif
