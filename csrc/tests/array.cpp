#include "array.h"

#include <algorithm>
#include <cmath>

namespace fastattn_test {

float half_to_float(uint16_t half) {
  const int exponent = half >> 10 & 31, mantissa = half & 1023;
  const double sign = half & 0x8000 ? -1.0 : 1.0;
  if (exponent == 31) return static_cast<float>(mantissa ? NAN : sign * INFINITY);
  if (exponent == 0) return static_cast<float>(sign * std::ldexp(mantissa, -24));
  return static_cast<float>(sign * std::ldexp(1024 + mantissa, exponent - 25));
}

uint16_t float_to_half(float value) {
  const uint16_t sign = static_cast<uint16_t>(float_to_bits(value) >> 16 & 0x8000);
  if (std::isnan(value)) return static_cast<uint16_t>(sign | 0x7e00);
  const double magnitude = std::fabs(static_cast<double>(value));
  if (magnitude >= 65520.0) return static_cast<uint16_t>(sign | 0x7c00);
  int exponent = 0;
  std::frexp(magnitude, &exponent);
  const int unit = std::max(exponent - 11, -24);  // the weight of the last bit is 2^unit
  const double units = std::nearbyint(std::ldexp(magnitude, -unit));
  // The leading bit of a normal number adds one to the exponent field; a subnormal one has none to add.
  const int64_t bits = (static_cast<int64_t>(unit + 24) << 10) + static_cast<int64_t>(units);
  return static_cast<uint16_t>(sign | bits);
}

uint16_t float_to_bfloat(float value) {
  const uint32_t bits = float_to_bits(value);
  if (std::isnan(value)) return static_cast<uint16_t>(bits >> 16 | 0x40);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

double Array::get_flat(int64_t index) const {
  if (is_fp32(dtype_)) {
    float value;
    memcpy(&value, data() + index * 4, 4);
    return value;
  }
  uint16_t half;
  memcpy(&half, data() + index * 2, 2);
  return dtype_ == FASTATTN_F16 ? half_to_float(half) : bits_to_float(static_cast<uint32_t>(half) << 16);
}

std::vector<double> Array::values() const {
  std::vector<double> all(memory_.bytes() / size_of(dtype_));
  for (size_t index = 0; index < all.size(); ++index) all[index] = get_flat(static_cast<int64_t>(index));
  return all;
}

void Array::set(int64_t a, int64_t b, int64_t c, int64_t d, double value) {
  float rounded = static_cast<float>(value);
  // Representable, so that the reference computes with what the kernels read.
  if (dtype_ == FASTATTN_F32_BF16_PRODUCTS)
    rounded = bits_to_float(static_cast<uint32_t>(float_to_bfloat(rounded)) << 16);
  const int64_t index = offset(a, b, c, d);
  if (is_fp32(dtype_)) {
    memcpy(data() + index * 4, &rounded, 4);
    return;
  }
  const uint16_t half = dtype_ == FASTATTN_F16 ? float_to_half(rounded) : float_to_bfloat(rounded);
  memcpy(data() + index * 2, &half, 2);
}

int64_t Array::touched_gaps() const {
  const size_t width = size_of(dtype_);
  std::vector<bool> owned(memory_.bytes() / width, false);
  for_each([&](int64_t a, int64_t b, int64_t c, int64_t d) { owned[offset(a, b, c, d)] = true; });
  int64_t touched = 0;
  for (size_t i = 0; i < owned.size(); ++i)
    for (size_t byte = 0; byte < width && !owned[i]; ++byte)
      if (data()[i * width + byte] != 0xff) {
        ++touched;
        break;
      }
  return touched;
}

}  // namespace fastattn_test
