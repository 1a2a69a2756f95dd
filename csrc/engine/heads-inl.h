// What happens to queries and keys before attention: RMSNorm of a head, rotary positions (Su et al., arXiv 2104.09864).
//
//   (a, b) -> (a cos - b sin, b cos + a sin)    for pairs of channels: i and half + i, or 2 i and 2 i + 1
#include "../cpu/pairs-inl.h"

static void rms_norm(const float* x, const float* weight, float eps, i64 C, float* y) {
  const float squares = row_sum(C, [&](i64 c, i64 n) {
    const F v = load_lanes(x + c, n);
    return v * v;
  });
  const F rstd = set(1.f / __builtin_sqrtf(squares / float(C) + eps));
  for_lanes(C, [&](i64 c, i64 n) {
    const F normed = load_lanes(x + c, n) * rstd;
    store_lanes(y + c, weight ? normed * load_lanes(weight + c, n) : normed, n);
  });
}

template <bool PAIRS> static void rotate_row(const float* cos, const float* sin, i64 half, float* x) {
  for_lanes(half, [&](i64 c, i64 n) {
    const F co = load_lanes(cos + c, n), si = load_lanes(sin + c, n);
    Pair v;
    if constexpr (PAIRS) v = load_pairs<DType::f32>(x, c, n);
    else v = {load_lanes(x + c, n), load_lanes(x + half + c, n)};
    const Pair turned = {fnma(v.second, si, v.first * co), fma(v.first, si, v.second * co)};
    if constexpr (PAIRS) {
      store_pairs<DType::f32>(false, x, c, turned, n);
    } else {
      store_lanes(x + c, turned.first, n);
      store_lanes(x + half + c, turned.second, n);
    }
  });
}
static void rotate(const float* cos, const float* sin, i64 half, bool interleaved, float* x) {
  interleaved ? rotate_row<true>(cos, sin, half, x) : rotate_row<false>(cos, sin, half, x);
}

static void fill(Kernels& k) {
  k.rms_norm = rms_norm;
  k.rotate = rotate;
}
