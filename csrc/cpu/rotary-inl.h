// Rotary position embedding (Su et al., arXiv 2104.09864), forward and, with the sign of the sine turned, backward.
//
//   (a, b) -> (a cos - b sin, b cos + a sin)    for pairs of channels: i and half + i, or 2 i and 2 i + 1
//
// Channels past the pairs are copied. All heads of a token share its row of the tables, which stays in L1.
// Floor: one read and one write of x; the tables are read once for all heads.
#include "pairs-inl.h"

// `pairs`: whether the channels of a pair are neighbours; a constant (with_bool).
template <DType T, class B>
INL void rotate(B pairs, const RotaryParams& p, const float* cos, const float* sin, const char* x, const char* next,
                char* y) {
  const i64 half = p.half, size = element_size(T);
  const bool past = p.non_temporal;
  const F sign = set(p.inverse ? -1.f : 1.f);
  for_lanes<T>(half, [=](i64 c, i64 n) __attribute__((always_inline)) {
    const F co = load_lanes(cos + c, n), si = load_lanes(sin + c, n) * sign;
    prefetch(next + c * size), prefetch(next + (half + c) * size);
    Pair v;
    if (pairs) v = load_pairs<T>(x, c, n);
    else v = {load_as<T>(x, c, n), load_as<T>(x, half + c, n)};
    const Pair turned = {fnma(v.second, si, v.first * co), fma(v.first, si, v.second * co)};
    if (pairs) {
      store_pairs<T>(past, y, c, turned, n);
    } else {
      put_as<T>(past, y, c, turned.first, n);
      put_as<T>(past, y, half + c, turned.second, n);
    }
  });
  if (p.D > 2 * half) __builtin_memcpy(y + 2 * half * size, x + 2 * half * size, size_t((p.D - 2 * half) * size));
}

template <DType T, class B> APART static void rotary_tokens(B pairs, const RotaryParams& p, i64 begin, i64 end) {
  const i64 size = element_size(T);
  for (i64 i = begin; i < end; i++) {
    const i64 b = i / p.T, t = i % p.T, place = p.positions ? p.positions[b * p.position_stride + t] : t;
    const float *cos = p.cos + place * p.half, *sin = p.sin + place * p.half;
    const char* x = static_cast<const char*>(p.x.data) + (b * p.x.sb + t * p.x.st) * size;
    char* y = static_cast<char*>(p.y.data) + (b * p.y.sb + t * p.y.st) * size;
    const i64 after = t + 1 < p.T ? p.x.st * size : 0;  // the same head of the next token
    for (i64 h = 0; h < p.H; h++) {
      const char* from = x + h * p.x.sh * size;
      rotate<T>(pairs, p, cos, sin, from, from + after, y + h * p.y.sh * size);
    }
  }
}
static void rotary(const RotaryParams& p, i64 token_begin, i64 token_end) {
  if (is_left_to_base(p.dtype)) return base.rotary(p, token_begin, token_end);
  with_own_dtype(p.dtype, [&](auto t) {
    with_bool(p.interleaved, [&](auto pairs) { rotary_tokens<t.value>(pairs, p, token_begin, token_end); });
  });
  stream_end();
}

static void fill(Kernels& k) { k.rotary = rotary; }
