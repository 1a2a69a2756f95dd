// SwiGLU (Shazeer, arXiv 2002.05202) and gpt-oss' form of it, forward and backward.
//
//   y = (u + shift) g s,   s = sigmoid(alpha g),   g = min(gate, limit),   u = min(max(up, -limit), limit)
//   dup = dy g s,   dgate = dy (u + shift) (s + alpha g s (1 - s));   0 where the clamp has cut
//
// Plain: alpha 1, shift 0, limit inf. With t = e^-|z|, z = alpha g: s is 1 / (1 + t) or t / (1 + t), s (1 - s) is
// t / (1 + t)^2; nothing overflows or cancels. gate and up are rows of their own, or neighbouring values of one row.
// Floor: two reads and one write forward, three reads and two writes backward.
#include "pairs-inl.h"

template <DType T> struct Gate {
  F sigmoid, slope;  // s, and s + z s (1 - s)
  // z: within 200 of 0, or its product with a 0 may be nan
  INL_MEMBER explicit Gate(F g, float alpha) {
    const F z = max(set(-200.f), min(set(200.f), g * set(alpha)));
    constexpr int kDegree = T == DType::bf16 ? 4 : 6;  // what becomes bf16 does with less, as in gelu-inl.h
    const F t = exp2<kDegree>(abs(z) * set(-kLog2e)), r = reciprocal(set(1.f) + t);
    sigmoid = select(ge(z, zero()), r, t * r);
    slope = fma(z * t, r * r, sigmoid);
  }
};

template <DType T, bool PAIRS> INL Pair load_gate(const void* gate, const void* up, i64 c, i64 n) {
  if constexpr (PAIRS) return load_pairs<T>(gate, c, n);
  else return {load_as<T>(gate, c, n), load_as<T>(up, c, n)};
}
INL Pair clamped(Pair v, float limit) {
  return {min(set(limit), v.first), max(set(-limit), min(set(limit), v.second))};  // nan stays
}
INL const void* up_row(const SwigluParams& p, i64 r) { return p.interleaved ? nullptr : row(p.up, r); }
INL i64 columns(const SwigluParams& p, i64 r) { return r == p.R - 1 ? p.tail : p.C; }

template <DType T, bool PAIRS> static void swiglu_fwd_rows(const SwigluParams& p, i64 begin, i64 end) {
  const bool past = p.out.non_temporal;
  const float alpha = p.alpha, limit = p.limit;
  const F shift = set(p.shift);
  for (i64 r = begin; r < end; r++) {
    const void *gate = row(p.gate, r), *up = up_row(p, r);
    void* y = row(p.out, r);
    for_lanes(columns(p, r), [=](i64 c, i64 n) __attribute__((always_inline)) {
      const Pair v = clamped(load_gate<T, PAIRS>(gate, up, c, n), limit);
      put_as<T>(past, y, c, (v.second + shift) * (v.first * Gate<T>(v.first, alpha).sigmoid), n);
    });
  }
}
template <DType T, bool PAIRS> static void swiglu_bwd_rows(const SwigluParams& p, i64 begin, i64 end) {
  const bool past = p.dgate.non_temporal;
  const float alpha = p.alpha, limit = p.limit;
  const F shift = set(p.shift);
  for (i64 r = begin; r < end; r++) {
    const void *gate = row(p.gate, r), *up = up_row(p, r), *dy = row(p.dout, r);
    void *dgate = row(p.dgate, r), *dup = PAIRS ? nullptr : row(p.dup, r);
    for_lanes(columns(p, r), [=](i64 c, i64 n) __attribute__((always_inline)) {
      const Pair in = load_gate<T, PAIRS>(gate, up, c, n), v = clamped(in, limit);
      const Gate<T> s(v.first, alpha);
      const F d = load_as<T>(dy, c, n), most = set(limit);
      const F to_gate = d * (v.second + shift) * s.slope, to_up = d * (v.first * s.sigmoid);
      const Pair g = {select(lt(most, in.first), zero(), to_gate), select(lt(most, abs(in.second)), zero(), to_up)};
      if constexpr (PAIRS) {
        store_pairs<T>(past, dgate, c, g, n);
      } else {
        put_as<T>(past, dgate, c, g.first, n);
        put_as<T>(past, dup, c, g.second, n);
      }
    });
  }
}
static void swiglu_fwd(const SwigluParams& p, i64 row_begin, i64 row_end) {
  with_dtype(p.gate.dtype, [&](auto t) {
    p.interleaved ? swiglu_fwd_rows<t.value, true>(p, row_begin, row_end)
                  : swiglu_fwd_rows<t.value, false>(p, row_begin, row_end);
  });
  stream_end();
}
static void swiglu_bwd(const SwigluParams& p, i64 row_begin, i64 row_end) {
  with_dtype(p.gate.dtype, [&](auto t) {
    p.interleaved ? swiglu_bwd_rows<t.value, true>(p, row_begin, row_end)
                  : swiglu_bwd_rows<t.value, false>(p, row_begin, row_end);
  });
  stream_end();
}

static void fill(Kernels& k) {
  k.swiglu_fwd = swiglu_fwd;
  k.swiglu_bwd = swiglu_bwd;
}
