// What a row of LayerNorm or RMSNorm becomes: its sums, and the numbers that follow from them. The formulas are in norm_fwd.cuh.
#pragma once
#include "norm.cuh"

namespace gptfast::cuda {
namespace {

// Sums of one vector, in one order wherever it is formed: of the values, or of their squares.
template <bool CENTERED, int V> DEV_INLINE float sum_of(const float (&v)[V]) {
  float sum = 0.f;
#pragma unroll
  for (int k = 0; k < V; k++) sum = CENTERED ? sum + v[k] : fmaf(v[k], v[k], sum);
  return sum;
}
// Of the differences from a number, and of their squares.
template <int V> DEV_INLINE float2 differences_of(const float (&v)[V], float near) {
  float2 rest = make_float2(0.f, 0.f);
#pragma unroll
  for (int k = 0; k < V; k++) rest.x += v[k] - near, rest.y += (v[k] - near) * (v[k] - near);
  return rest;
}
// What a row becomes.
template <bool CENTERED> struct Affine {
  float mean, rstd, shift;
  // near: the mean as first summed, or the mean of the squares; rest: sums of the differences from the first.
  DEV_INLINE Affine(const LayerNormParams& p, i64 r, float near, float2 rest, bool first) {
    const float C = float(int(p.C)), left = rest.x / C, variance = CENTERED ? rest.y / C - left * left : near;
    mean = near + left;
    const float remainder = left - (mean - near);
    rstd = 1.f / sqrtf((variance < 0.f ? 0.f : variance) + p.eps), shift = -remainder * rstd;
    if (first) p.rstd[r] = rstd;
    if (CENTERED && first) p.mean[r] = mean, p.mean[p.R + r] = remainder;
  }
  template <int V> DEV_INLINE void apply(float (&v)[V], const float (&weight)[V], const float (&bias)[V]) const {
#pragma unroll
    for (int k = 0; k < V; k++)
      v[k] = CENTERED ? fmaf(fmaf(v[k] - mean, rstd, shift), weight[k], bias[k]) : v[k] * rstd * weight[k];
  }
};

}  // namespace
}  // namespace gptfast::cuda
