// SwiGLU (Shazeer, arXiv 2002.05202) and gpt-oss' form of it, forward and backward.
//
//   y = (u + shift) g s,   s = sigmoid(alpha g),   g = min(gate, limit),   u = min(max(up, -limit), limit)
//   dup = dy g s,   dgate = dy (u + shift) (s + alpha g s (1 - s));   0 where the clamp has cut
//
// Plain: alpha 1, shift 0, limit inf. With t = e^-|z|, z = alpha g: s is 1 / (1 + t) or t / (1 + t), s (1 - s) is
// t / (1 + t)^2; nothing overflows or cancels. What becomes bf16 does with less: with t = e^-z, to a relative 2.6e-6, s is
// 1 / (1 + t), and 1 - s is t s. gate and up are rows of their own, or neighbouring values of one row.
// Floor: two reads and one write forward, three reads and two writes backward.
#include "pairs-inl.h"
#include "words-inl.h"

struct Form {
  float alpha, limit;
  F shift;
  INL_MEMBER explicit Form(const SwigluParams& p) : alpha(p.alpha), limit(p.limit), shift(set(p.shift)) {}
};
template <DType T> struct Gate {
  F product, slope;  // g s, and s + z s (1 - s)
  INL_MEMBER Gate(F g, float alpha) {
    if constexpr (T == DType::bf16) {
      const F one = set(1.f), t = exp2<4>(g * set(-alpha * kLog2e)), d = one + t, r = coarse_reciprocal(d);
      const F s = fma(r, min(fnma(d, r, one), one), r);  // a step of Newton's; min: no inf * 0
      product = g * s;
      slope = fma(product * min(t * s, one), set(alpha), s);  // no factor overflows where z does
    } else {
      const F z = max(set(-200.f), min(set(200.f), g * set(alpha)));  // or its product with a 0 may be nan
      const F t = exp2<6>(abs(z) * set(-kLog2e)), r = reciprocal(set(1.f) + t);
      const F s = select(ge(z, zero()), r, t * r);
      product = g * s;
      slope = fma(z * t, r * r, s);
    }
  }
};

// `pairs`: whether gate and up are neighbours; a constant (with_bool).
template <DType T, class B> INL Pair load_gate(B pairs, const void* gate, const void* up, i64 c, i64 n) {
  if (pairs) return load_pairs<T>(gate, c, n);
  return {load_as<T>(gate, c, n), load_as<T>(up, c, n)};
}
INL Pair clamped(Pair v, float limit) {
  if (limit == __builtin_inff()) return v;
  return {min(set(limit), v.first), max(set(-limit), min(set(limit), v.second))};  // nan stays
}
INL const void* up_row(const SwigluParams& p, i64 r) { return p.interleaved ? nullptr : row(p.up, r); }
INL i64 columns(const SwigluParams& p, i64 r) { return r == p.R - 1 ? p.tail : p.C; }

template <DType T> INL F value(const Form& form, F gate, F up) {
  const Pair v = clamped({gate, up}, form.limit);
  return (v.second + form.shift) * Gate<T>(v.first, form.alpha).product;
}
// Of gate and up.
template <DType T> INL Pair gradients(const Form& form, F gate, F up, F d) {
  const Pair v = clamped({gate, up}, form.limit);
  const Gate<T> s(v.first, form.alpha);
  const F to_gate = d * (v.second + form.shift) * s.slope, to_up = d * s.product;
  if (form.limit == __builtin_inff()) return {to_gate, to_up};
  const F most = set(form.limit);
  return {select(lt(most, gate), zero(), to_gate), select(lt(most, abs(up)), zero(), to_up)};
}

// Whole vectors of words; returns how many columns they are.
template <class B>
INL i64 value_words(B pairs, bool past, const Form& form, const void* gate, const void* up, void* y, i64 C) {
  i64 c = 0;
#ifdef GPTFAST_PAIRS
  constexpr DType T = DType::bf16;
  for (; c + 2 * L <= C; c += 2 * L) {
    void* to = at(y, T, c);
    if (pairs) {
      const Split a = load_words(gate, 2 * c), b = load_words(gate, 2 * c + 2 * L);
      put(past, to, join_bf16(value<T>(form, a.even, a.odd), value<T>(form, b.even, b.odd)));
    } else {
      const Split g = load_words(gate, c), u = load_words(up, c);
      put_words(past, to, {value<T>(form, g.even, u.even), value<T>(form, g.odd, u.odd)});
    }
  }
#endif
  return c;
}
template <class B>
INL i64 gradient_words(B pairs, bool past, const Form& form, const void* gate, const void* up, const void* dy,
                       void* dgate, void* dup, i64 C) {
  i64 c = 0;
#ifdef GPTFAST_PAIRS
  constexpr DType T = DType::bf16;
  for (; c + 2 * L <= C; c += 2 * L) {
    if (pairs) {
      UNROLL_FOR (int half = 0; half < 2; half++) {
        const i64 from = c + half * L;
        const Split in = load_words(gate, 2 * from);
        const Pair g = gradients<T>(form, in.even, in.odd, load_as<T>(dy, from, L));
        put_words(past, at(dgate, T, 2 * from), {g.first, g.second});
      }
    } else {
      const Split g = load_words(gate, c), u = load_words(up, c), d = load_words(dy, c);
      const Pair even = gradients<T>(form, g.even, u.even, d.even), odd = gradients<T>(form, g.odd, u.odd, d.odd);
      put_words(past, at(dgate, T, c), {even.first, odd.first});
      put_words(past, at(dup, T, c), {even.second, odd.second});
    }
  }
#endif
  return c;
}

template <DType T, class B> APART static void swiglu_fwd_rows(B pairs, const SwigluParams& p, i64 begin, i64 end) {
  const bool past = p.out.non_temporal;
  const Form form(p);
  for (i64 r = begin; r < end; r++) {
    const void *gate = row(p.gate, r), *up = up_row(p, r);
    void* y = row(p.out, r);
    const i64 C = columns(p, r), done = T == DType::bf16 ? value_words(pairs, past, form, gate, up, y, C) : 0;
    for_lanes<T>(C - done, [=](i64 c, i64 n) __attribute__((always_inline)) {
      c += done;
      const Pair v = load_gate<T>(pairs, gate, up, c, n);
      put_as<T>(past, y, c, value<T>(form, v.first, v.second), n);
    });
  }
}
template <DType T, class B> APART static void swiglu_bwd_rows(B pairs, const SwigluParams& p, i64 begin, i64 end) {
  const bool past = p.dgate.non_temporal;
  const Form form(p);
  for (i64 r = begin; r < end; r++) {
    const void *gate = row(p.gate, r), *up = up_row(p, r), *dy = row(p.dout, r);
    void *dgate = row(p.dgate, r), *dup = pairs ? nullptr : row(p.dup, r);
    const i64 C = columns(p, r);
    const i64 done = T == DType::bf16 ? gradient_words(pairs, past, form, gate, up, dy, dgate, dup, C) : 0;
    for_lanes<T>(C - done, [=](i64 c, i64 n) __attribute__((always_inline)) {
      c += done;
      const Pair in = load_gate<T>(pairs, gate, up, c, n);
      const Pair g = gradients<T>(form, in.first, in.second, load_as<T>(dy, c, n));
      if (pairs) {
        store_pairs<T>(past, dgate, c, g, n);
      } else {
        put_as<T>(past, dgate, c, g.first, n);
        put_as<T>(past, dup, c, g.second, n);
      }
    });
  }
}
static void swiglu_fwd(const SwigluParams& p, i64 row_begin, i64 row_end) {
  if (is_left_to_base(p.gate.dtype)) return base.swiglu_fwd(p, row_begin, row_end);
  with_own_dtype(p.gate.dtype, [&](auto t) {
    with_bool(p.interleaved, [&](auto pairs) { swiglu_fwd_rows<t.value>(pairs, p, row_begin, row_end); });
  });
  stream_end();
}
static void swiglu_bwd(const SwigluParams& p, i64 row_begin, i64 row_end) {
  if (is_left_to_base(p.gate.dtype)) return base.swiglu_bwd(p, row_begin, row_end);
  with_own_dtype(p.gate.dtype, [&](auto t) {
    with_bool(p.interleaved, [&](auto pairs) { swiglu_bwd_rows<t.value>(pairs, p, row_begin, row_end); });
  });
  stream_end();
}

static void fill(Kernels& k) {
  k.swiglu_fwd = swiglu_fwd;
  k.swiglu_bwd = swiglu_bwd;
}
