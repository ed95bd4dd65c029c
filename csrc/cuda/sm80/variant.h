// What a variant of the kernels does to a score between the two products. A variant is a set of features
// fixed at compile time. One that holds a single source of additive scores is only chosen when that is
// present; one that holds several (the variant of everything) asks at run time which are.
#pragma once

#include "sequence.h"

namespace fastattn {

template <uint32_t kFeatures>
struct Variant {
  static constexpr bool kSoftcap = kFeatures & kFeatureSoftcap;
  static constexpr bool kBias = kFeatures & kFeatureBias;
  static constexpr bool kRelative = kFeatures & kFeatureRelative;
  static constexpr bool kAlibi = kFeatures & kFeatureAlibi;
  static constexpr bool kDropout = kFeatures & kFeatureDropout;
  static constexpr bool kPosition = kBias || kRelative || kAlibi;
  static constexpr bool kSeveral = kBias + kRelative + kAlibi > 1;
  // Without these a score is only scaled, and the scale goes into the exponent's multiply-add.
  static constexpr bool kTransforms = kSoftcap || kPosition;
};

// The scores of one (batch, head). apply(q * k, i, j) is the score in base 2, with everything added. Made
// anew for each tile: where a bias's elements lie relative to a tile would be kept in 32 registers otherwise.
template <typename T, typename V>
class ScoreTransform {
 public:
  __device__ __forceinline__ ScoreTransform(const Params& p, const Sequence& s, int head)
      : p_(p), last_q_(s.len_q - 1), last_k_(s.len_k - 1), bias_stride_k_(p.bias.stride_k) {
    if constexpr (V::kBias) {
      bias_offset_ = s.batch * p.bias.stride_b + head * p.bias.stride_h;
      ptx::pin(bias_stride_k_);
    }
    if constexpr (V::kRelative) relative_ = p.relative_bias + head * p.relative_bias_stride_h + p.len_q - 1;
    if constexpr (V::kAlibi) {
      if (!V::kSeveral || p.alibi_slopes != nullptr)
        slope_ = p.alibi_slopes[s.batch * p.alibi_stride_b + head * p.alibi_stride_h] * kLog2E;
    }
  }

  // `derivative` receives d score / d (scale * q * k). kInside: key j exists. Query i may be past the end.
  template <bool kInside>
  __device__ __forceinline__ float apply(float s, int i, int j, float& derivative) const {
    derivative = 1.0f;
    if constexpr (!V::kTransforms) return s * p_.scale_log2;
    float x = s * p_.scale_log2;
    if constexpr (V::kSoftcap) {
      if (!V::kPosition || p_.softcap > 0.0f) {
        // tanh(y) = 1 - 2 / (1 + exp(2 y)); exp2 saturates at 0 and infinity, as it should.
        const float tanh = 1.0f - __fdividef(2.0f, 1.0f + ptx::exp2(fminf(s * p_.softcap_argument, 120.0f)));
        derivative = 1.0f - tanh * tanh;
        x = p_.softcap * kLog2E * tanh;
      }
    }
    i = min(i, last_q_);
    if (!kInside) j = min(j, last_k_);
    if constexpr (V::kBias) {
      if (!V::kSeveral || p_.bias.data != nullptr)
        x = fmaf(bias(bias_offset_ + i * p_.bias.stride_q + j * bias_stride_k_), kLog2E, x);
    }
    if constexpr (V::kRelative) {
      if (!V::kSeveral || p_.relative_bias != nullptr) x = fmaf(relative_[j - i], kLog2E, x);
    }
    if constexpr (V::kAlibi) x = fmaf(-slope_, fabsf(float(i - last_q_ + last_k_ - j)), x);
    return x;
  }

 private:
  __device__ __forceinline__ float bias(int64_t at) const {
    if (sizeof(T) == 4 || p_.bias_is_float) return static_cast<const float*>(p_.bias.data)[at];
    return Element<T>::to_float(static_cast<const T*>(p_.bias.data)[at]);
  }

  const Params& p_;
  int last_q_, last_k_;
  int64_t bias_offset_ = 0, bias_stride_k_;
  const float* relative_ = nullptr;
  float slope_ = 0.0f;
};

}  // namespace fastattn
