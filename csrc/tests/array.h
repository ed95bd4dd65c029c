// Strided arrays between two inaccessible pages: reading or writing one byte beyond either end faults.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#include "fastattn.h"

namespace fastattn_test {

using Random = std::mt19937_64;

// Which end of the array touches the inaccessible page; the other end is within a page of its own one.
enum class Edge { kFront, kBack };

class GuardedMemory {
 public:
  GuardedMemory() = default;
  GuardedMemory(size_t bytes, Edge edge) : bytes_(bytes) {
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    const size_t body = (bytes + page - 1) / page * page;
    mapped_ = body + 2 * page;
    base_ = static_cast<uint8_t*>(
        mmap(nullptr, mapped_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    if (base_ == MAP_FAILED || (body > 0 && mprotect(base_ + page, body, PROT_READ | PROT_WRITE) != 0)) {
      perror("mmap");
      exit(3);
    }
    body_ = body;
    data_ = base_ + page + (edge == Edge::kBack ? body - bytes : 0);
    poison();
  }
  GuardedMemory(GuardedMemory&& other) noexcept { *this = static_cast<GuardedMemory&&>(other); }
  GuardedMemory& operator=(GuardedMemory&& other) noexcept {
    std::swap(base_, other.base_), std::swap(data_, other.data_), std::swap(bytes_, other.bytes_);
    std::swap(body_, other.body_), std::swap(mapped_, other.mapped_);
    return *this;
  }
  ~GuardedMemory() {
    if (base_ != nullptr) munmap(base_, mapped_);
  }

  uint8_t* data() const { return data_; }
  size_t bytes() const { return bytes_; }
  // 0xff in every byte is a NaN in fp32, fp16 and bf16.
  void poison() {
    if (bytes_ > 0) memset(data_, 0xff, bytes_);
  }
  void allow_writes(bool writable) {
    if (body_ > 0)
      mprotect(base_ + (mapped_ - body_) / 2, body_, writable ? PROT_READ | PROT_WRITE : PROT_READ);
  }

 private:
  uint8_t* base_ = nullptr;
  uint8_t* data_ = nullptr;
  size_t bytes_ = 0, body_ = 0, mapped_ = 0;
};

inline float bits_to_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, 4);
  return value;
}
inline uint32_t float_to_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  return bits;
}

// Written from IEEE 754, apart from the library's own conversions.
float half_to_float(uint16_t half);
uint16_t float_to_half(float value);
uint16_t float_to_bfloat(float value);

inline bool is_fp32(int dtype) {
  return dtype == FASTATTN_F32 || dtype == FASTATTN_F32_BF16_PRODUCTS || dtype == FASTATTN_F32_SPLIT_PRODUCTS;
}
inline size_t size_of(int dtype) { return is_fp32(dtype) ? 4 : 2; }

// A four-dimensional array; a dimension of stride 0 is broadcast and counts as one element, also where the
// problem has none. What lies between its elements ("gaps") is poisoned, and compared after a call that
// must not touch it.
class Array {
 public:
  Array() = default;
  Array(int dtype, std::vector<int64_t> shape, std::vector<int64_t> stride, Edge edge)
      : dtype_(dtype), shape_(shape), stride_(stride) {
    int64_t extent = 1;
    for (size_t axis = 0; axis < shape.size(); ++axis) {
      if (stride[axis] == 0) shape_[axis] = 1;
      extent = shape_[axis] == 0 || extent == 0 ? 0 : extent + (shape_[axis] - 1) * stride[axis];
    }
    memory_ = GuardedMemory(static_cast<size_t>(extent) * size_of(dtype), edge);
  }

  bool exists() const { return !shape_.empty(); }
  int dtype() const { return dtype_; }
  int64_t size(int axis) const { return shape_[axis]; }
  int64_t stride(int axis) const { return stride_[axis]; }
  uint8_t* data() const { return memory_.data(); }
  GuardedMemory& memory() { return memory_; }
  size_t memory_bytes() const { return memory_.bytes(); }

  int64_t offset(int64_t a, int64_t b, int64_t c, int64_t d) const {
    return a * stride_[0] + b * stride_[1] + c * stride_[2] + d * stride_[3];
  }
  double get(int64_t a, int64_t b, int64_t c, int64_t d) const { return get_flat(offset(a, b, c, d)); }
  void set(int64_t a, int64_t b, int64_t c, int64_t d, double value);
  double get_flat(int64_t index) const;
  // All of the memory, gaps included; index by offset().
  std::vector<double> values() const;

  template <class F>
  void for_each(F visit) const {
    for (int64_t a = 0; a < shape_[0]; ++a)
      for (int64_t b = 0; b < shape_[1]; ++b)
        for (int64_t c = 0; c < shape_[2]; ++c)
          for (int64_t d = 0; d < shape_[3]; ++d) visit(a, b, c, d);
  }
  void fill(Random& random, double deviation) {
    std::normal_distribution<double> normal(0.0, deviation);
    for_each([&](int64_t a, int64_t b, int64_t c, int64_t d) { set(a, b, c, d, normal(random)); });
  }
  // Elements of the memory that do not belong to the array and are no longer poison.
  int64_t touched_gaps() const;

 private:
  int dtype_ = FASTATTN_F32;
  std::vector<int64_t> shape_, stride_;
  GuardedMemory memory_;
};

}  // namespace fastattn_test
