// GELU (Hendrycks and Gimpel, arXiv 1606.08415) and squared ReLU (So et al., arXiv 2109.08668) of one value, and their slopes.
//
//   exact   y = z Phi(z),            dy/dz = Phi(z) + z phi(z)
//   tanh    y = z s,  s = sigmoid(2u), u = sqrt(2/pi) (z + 0.044715 z^3)   [0.5 (1 + tanh u) = sigmoid(2u)]
//           dy/dz = s + z s (1 - s) 2u',  with 1 - s = e^-2u s, which does not cancel where s is near 1
//   relu    y = max(z, 0)^2,         dy/dz = 2 max(z, 0)
#pragma once
#include "common.cuh"

namespace gptfast::cuda {
namespace {

constexpr float kRoot = 0.7978845608f;  // sqrt(2 / pi)

// e^-2u
DEV_INLINE float gelu_decay(float z, float z2) { return exp2f(z * (-2.f * kRoot * kLog2e) * fmaf(z2, 0.044715f, 1.f)); }
template <bool TANH> struct Gelu {
  static constexpr bool kBias = true;
  static DEV_INLINE float value(float z) {
    if constexpr (TANH) return __fdividef(z, 1.f + gelu_decay(z, z * z));
    const float half = 0.5f * z;
    return fmaf(half, erff(z * 0.70710678f), half);
  }
  static DEV_INLINE float slope(float z) {
    if constexpr (TANH) {
      z = z > 10.f ? 10.f : z < -10.f ? -10.f : z;  // beyond, the slope is 1 or below 1e-34; keeps inf * 0 away
      const float z2 = z * z, decay = gelu_decay(z, z2), s = __fdividef(1.f, 1.f + decay);
      const float two_du = fmaf(z2, 6.f * kRoot * 0.044715f, 2.f * kRoot);
      return fmaf(z * two_du, decay * s * s, s);
    }
    const float cdf = fmaf(0.5f, erff(z * 0.70710678f), 0.5f);
    const float pdf = 0.3989422804f * exp2f(z * z * (-0.5f * kLog2e));
    return fmaf(z, pdf, cdf);
  }
};

struct ReluSquared {
  static constexpr bool kBias = false;
  static DEV_INLINE float above(float x) { return x < 0.f ? 0.f : x; }  // nan stays
  static DEV_INLINE float value(float x) { return above(x) * above(x); }
  static DEV_INLINE float slope(float x) { return above(x) + above(x); }
};

}  // namespace
}  // namespace gptfast::cuda
