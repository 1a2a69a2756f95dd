// GELU of x + bias (Hendrycks and Gimpel, arXiv 1606.08415), forward and backward.
//
//   exact   y = z Phi(z),            dy/dz = Phi(z) + z phi(z)
//   tanh    y = z s,  s = sigmoid(2u), u = sqrt(2/pi) (z + 0.044715 z^3)   [0.5 (1 + tanh u) = sigmoid(2u)]
//           dy/dz = s + z s (1 - s) 2u',  with 1 - s = e^-2u s, which does not cancel where s is near 1
//
// Floor: one read and one write of x (backward: two reads and one write); about 20 (tanh) and 40 (exact) vector
// operations a vector, below the memory time outside the cache.
#pragma once
#include "pointwise-inl.h"
#include "words-inl.h"

constexpr i64 kGeluBlock = 2048;  // columns at a time: bias and its gradient stay in L1

// Whether rows are taken by twos. On AVX2 (Zen 3) two rows of whole pages are slow, whichever is loaded first: at 2048 x 4096 bf16
// takes two to three times as long by twos, fp32 twice. The exact form has two chains of arithmetic at once by twos: on AVX-512
// 5 to 13% less time, fp32 and bf16, both ways.
template <bool TANH> constexpr bool kGeluTwos = L == 16 || (TANH && L != 8);

// e^-2u.
template <DType T> INL F gelu_decay(F z, F z2) {
  constexpr float kFirst = -2.f * 0.7978845608f * 1.4426950409f;
  if constexpr (T == DType::bf16) return exp2_coarse(z * fma(z2, set(kFirst * 0.044715f), set(kFirst)));
  return exp2<6>(z * set(kFirst) * fma(z2, set(0.044715f), set(1.f)));
}
template <DType T> INL F gelu_sigmoid(F decay) {
  const F x = set(1.f) + decay;
  return T == DType::bf16 ? coarse_reciprocal(x) : reciprocal(x);
}
template <DType T, bool TANH> INL F gelu_value(F z) {
  if constexpr (TANH) return z * gelu_sigmoid<T>(gelu_decay<T>(z, z * z));
  const F half = set(0.5f) * z;
  return fma(half, erf(z * set(0.70710678f)), half);
}
template <DType T, bool TANH> INL F gelu_slope(F z) {
  if constexpr (TANH) {
    z = min(set(10.f), max(set(-10.f), z));  // beyond, the slope is 1 or below 1e-34; keeps inf * 0 away
    const F z2 = z * z, decay = gelu_decay<T>(z, z2), s = gelu_sigmoid<T>(decay);
    const F two_du = fma(z2, set(6.f * 0.7978845608f * 0.044715f), set(2.f * 0.7978845608f));
    return fma(z * two_du, decay * s * s, s);
  }
  const F cdf = fma(set(0.5f), erf(z * set(0.70710678f)), set(0.5f));
  const F pdf = set(0.3989422804f) * exp2<6>(z * z * set(-0.5f * 1.4426950409f));
  return fma(z, pdf, cdf);
}

// Columns [c0 + c, c0 + n) of rows r .. r + ROWS - 1: f(u, c, z, lanes that count) with z = x + bias of row r + u.
template <DType T, int ROWS, class Fn>
INL void gelu_columns(const GeluParams& p, i64 r, const float* bias, i64 c0, i64 c, i64 n, Fn f) {
  const void* x[ROWS];
  for (int u = 0; u < ROWS; u++) x[u] = row(p.x, r + u);
  const auto load_z = [&](int u, i64 c, i64 k) __attribute__((always_inline)) {
    const F z = load_as<T>(x[u], c0 + c, k);
    return bias ? z + load_lanes(bias + c, k) : z;
  };
  const auto vector_of = [&](int u, i64 c, i64 k) __attribute__((always_inline)) { f(u, c, load_z(u, c, k), k); };
  if constexpr (kOnce<T>) {
    static_assert(ROWS == 1);
    for (; c < n; c += L) vector_of(0, c, lanes_of(n - c));
    return;
  }
  for (; c + L <= n; c += L) {
    F z[ROWS];
    UNROLL_FOR (int u = 0; u < ROWS; u++) z[u] = load_z(u, c, L);
    UNROLL_FOR (int u = 0; u < ROWS; u++) f(u, c, z[u], L);
  }
  if (c < n)
    ROLLED_FOR (int u = 0; u < ROWS; u++) vector_of(u, c, n - c);
}
// The same of bf16 in whole vectors of words: f(u, c, z) with z as it was split, as the bias is; returns the columns they are.
template <DType T, int ROWS, class Fn>
INL i64 gelu_words(const GeluParams& p, i64 r, const float* bias, i64 c0, i64 n, Fn f) {
  i64 c = 0;
#ifdef GPTFAST_PAIRS
  if constexpr (T == DType::bf16)
    for (; c + 2 * L <= n; c += 2 * L)
      UNROLL_FOR (int u = 0; u < ROWS; u++) {
        const Split z = load_words(row(p.x, r + u), c0 + c);
        f(u, c, bias ? Split{z.even + load(bias + c), z.odd + load(bias + c + L)} : z);
      }
#endif
  return c;
}
template <DType T> INL const float* gelu_bias(const GeluParams& p, i64 c0, i64 n, float* buffer) {
  if (!p.bias.data) return nullptr;
  copy_row(buffer, at(p.bias.data, p.bias.dtype, c0), p.bias.dtype, n);
#ifdef GPTFAST_PAIRS
  if constexpr (T == DType::bf16) split_columns(buffer, n / (2 * L) * (2 * L));
#endif
  return buffer;
}
