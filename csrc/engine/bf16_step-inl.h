// Weights in bf16, packed and as pairs, as the products read them step by step; see product_tiles-inl.h.
#pragma once
#include "product_tiles-inl.h"

// acc[r] += x[m + r][k .. k + 1] . b
template <int R, int V> INL void add_pairs(const I (&b)[V], const Activations& x, i64 m, i64 k, F (&acc)[R][V]) {
  UNROLL_FOR (int r = 0; r < R; r++) {
    if constexpr (kPairs) {
      const I a = broadcast4(x.bf16 + (m + r) * x.stride + k);
      UNROLL_FOR (int v = 0; v < V; v++) acc[r][v] = dot_pairs(acc[r][v], b[v], a);
    } else {
      const float* a = x.f32 + (m + r) * x.f32_stride + k;
      const F even = set(a[0]), odd = set(a[1]);
      UNROLL_FOR (int v = 0; v < V; v++) acc[r][v] = fma(odd, high_half(b[v]), fma(even, low_half(b[v]), acc[r][v]));
    }
  }
}
// Steps along k: kDepth values of x, kBytes of the panel, V vectors from output n on, a constant where there
// are vectors: as a variable it costs an address for every load, more than there are registers.
//
// Unpacked bf16: [K/2][32] pairs of neighbours along k.
struct PairStep {
  static constexpr i64 kDepth = 2, kBytes = kPanel * 4;
  explicit PairStep(const char*) {}
  template <int R, int V, class N>
  INL_MEMBER void run(const char* w, N n, const Activations& x, i64 m, i64 k, F (&acc)[R][V]) const {
    I b[V];
    UNROLL_FOR (int v = 0; v < V; v++) b[v] = iload(w + (n + v * L) * 4);
    add_pairs<R, V>(b, x, m, k, acc);
  }
};
// Packed bf16. The nibbles of a word, from the lowest: of outputs n and n + 16 at one k, and of both two k further on.
struct Bf16Step {
  static constexpr i64 kDepth = 4, kBytes = group_bytes(Format::bf16) / 8;
  const Exponents exponents;
  explicit Bf16Step(const char* panel) : exponents(panel) {}

  template <int H>  // pairs k + 2H of outputs n to n + L
  INL_MEMBER I pairs(const char* w, int n) const {
    const I nibbles = iload(w + n % 16 * 4);
    const I signs_and_fractions = spread_bytes(w + 64 + H * 64 + n * 2);
    return merge(signs_and_fractions,
                 n < 16 ? exponents.of(shr(nibbles, 8 * H)) : exponents.of(shr(nibbles, 8 * H + 4)));
  }
  template <int R, int V, class N>
  INL_MEMBER void run(const char* w, N n, const Activations& x, i64 m, i64 k, F (&acc)[R][V]) const {
    I b[V];
    UNROLL_FOR (int v = 0; v < V; v++) b[v] = pairs<0>(w, n + v * L);
    add_pairs<R, V>(b, x, m, k, acc);
    UNROLL_FOR (int v = 0; v < V; v++) b[v] = pairs<1>(w, n + v * L);
    add_pairs<R, V>(b, x, m, k + 2, acc);
  }
};
