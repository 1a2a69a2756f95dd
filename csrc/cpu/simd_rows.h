// Rows of any dtype with the vocabulary of simd.h, which includes this file: any dtype at the edges, fp32 inside.
#pragma once

// The last n < L values of a row of 16 bits, as L floats of which the others are 0; and back. Where memory has no masks they are
// compiled once: they run once a row, and inlined at each end of a loop they are a quarter of what a compiler has to do.
#ifdef GPTFAST_MASKED_HALVES
INL F widen_tail(const void* p, DType t, i64 n) {
  const H h = load_some_halves(static_cast<const uint16_t*>(p), n);
  return t == DType::bf16 ? widen_bf16(h) : widen_f16(h);
}
INL void narrow_tail(void* p, DType t, F x, i64 n) {
  store_some_halves(static_cast<uint16_t*>(p), t == DType::bf16 ? narrow_bf16(x) : narrow_f16(x), n);
}
#else
COLD void widen_into(float* out, const void* p, DType t, i64 n) {
  alignas(64) uint16_t tail[L] = {};
  __builtin_memcpy(tail, p, size_t(n) * 2);
  store(out, t == DType::bf16 ? load_bf16(tail) : load_f16(tail));
}
COLD void narrow_from(void* p, DType t, const float* x, i64 n) {
  alignas(64) uint16_t tail[L];
  if (t == DType::bf16) store_bf16(tail, load(x));
  else store_f16(tail, load(x));
  __builtin_memcpy(p, tail, size_t(n) * 2);
}
INL F widen_tail(const void* p, DType t, i64 n) {
  alignas(64) float tail[L];
  widen_into(tail, p, t, n);
  return load(tail);
}
INL void narrow_tail(void* p, DType t, F x, i64 n) {
  alignas(64) float tail[L];
  store(tail, x);
  narrow_from(p, t, tail, n);
}
#endif

COLD void widen_row(float* out, const void* x, DType t, i64 n) {
  const uint16_t* p = static_cast<const uint16_t*>(x);
  alignas(64) uint16_t tail[L] = {};
  i64 i = 0;
  if (t == DType::bf16) {
    for (; i + L <= n; i += L) store(out + i, load_bf16(p + i));
  } else {
    for (; i + L <= n; i += L) store(out + i, load_f16(p + i));
  }
  if (i == n) return;
  __builtin_memcpy(tail, p + i, size_t(n - i) * 2);
  store_n(out + i, t == DType::bf16 ? load_bf16(tail) : load_f16(tail), n - i);
}
COLD void narrow_row(void* y, const float* x, DType t, i64 n) {
  uint16_t* p = static_cast<uint16_t*>(y);
  alignas(64) uint16_t tail[L];
  i64 i = 0;
  if (t == DType::bf16) {
    for (; i + L <= n; i += L) store_bf16(p + i, load(x + i));
  } else {
    for (; i + L <= n; i += L) store_f16(p + i, load(x + i));
  }
  if (i == n) return;
  const F last = load_n(x + i, n - i);
  if (t == DType::bf16) store_bf16(tail, last);
  else store_f16(tail, last);
  __builtin_memcpy(p + i, tail, size_t(n - i) * 2);
}
INL const void* at(const void* p, DType t, i64 i) { return static_cast<const char*>(p) + i * element_size(t); }
INL void* at(void* p, DType t, i64 i) { return static_cast<char*>(p) + i * element_size(t); }

// n values from p on as fp32: p itself when it is fp32, else converted into `buffer`.
INL const float* read_row(const void* p, DType t, i64 n, float* buffer) {
  if (t == DType::f32) return static_cast<const float*>(p);
  widen_row(buffer, p, t, n);
  return buffer;
}
INL void copy_row(float* out, const void* p, DType t, i64 n) {
  if (t == DType::f32) __builtin_memcpy(out, p, size_t(n) * 4);
  else widen_row(out, p, t, n);
}
// Where to write n fp32 values that finish_row then brings to p (p itself when it is fp32).
INL float* write_row(void* p, DType t, float* buffer) { return t == DType::f32 ? static_cast<float*>(p) : buffer; }
INL void finish_row(void* p, DType t, const float* buffer, i64 n) {
  if (t != DType::f32) narrow_row(p, buffer, t, n);
}
INL const void* row(const Rows& x, i64 i) { return at(x.data, x.dtype, i * x.stride); }
INL void* row(const MutRows& x, i64 i) { return at(x.data, x.dtype, i * x.stride); }

INL i64 lanes_of(i64 left) { return left < L ? left : i64(L); }
// Whether the body of a loop over lanes is compiled once, not for whole vectors, the last lanes and several rows apart: where only
// the compile time matters, and for rows of fp16, which few train or serve in on a CPU.
template <DType T> constexpr bool kOnce = kScalar || (T == DType::f16 && L != 16);
// Calls f(c, n) for c = 0, L, 2L, … < C with n = lanes that count: f sees whole vectors but for the last. T: the dtype of the rows.
template <DType T = DType::f32, class Fn> INL void for_lanes(i64 C, Fn f) {
  i64 c = 0;
  if constexpr (kOnce<T>) {
    for (; c < C; c += L) f(c, lanes_of(C - c));
    return;
  }
  for (; c + L <= C; c += L) f(c, i64(L));
  if (c < C) f(c, C - c);
}
// The same with f(c, n, u), u = 0, 1, 0, … a constant once unrolled: two chains of sums hide the latency of one.
template <DType T = DType::f32, class Fn> INL void for_lanes_paired(i64 C, Fn f) {
  i64 c = 0;
  if constexpr (kOnce<T>) {
    for (int u = 0; c < C; c += L, u ^= 1) f(c, lanes_of(C - c), C - c < L ? 1 : u);
    return;
  }
  for (; c + 2 * L <= C; c += 2 * L) {
    f(c, i64(L), 0);
    f(c + L, i64(L), 1);
  }
  if (c + L <= C) f(c, i64(L), 0), c += L;
  if (c < C) f(c, C - c, 1);
}
INL F load_lanes(const float* p, i64 n) { return n == L ? load(p) : load_n(p, n); }
INL void store_lanes(float* p, F x, i64 n) {
  if (n == L) store(p, x);
  else store_n(p, x, n);
}
INL i64 round_up(i64 n, i64 to) { return (n + to - 1) / to * to; }

// The sum over the row of f(c, n), which gives 0 in lanes that do not count; four sums run side by side
template <DType T = DType::f32, class Fn> INL float row_sum(i64 C, Fn f) {
  i64 c = 0;
  if constexpr (kOnce<T>) {
    F s[4] = {zero(), zero(), zero(), zero()};
    for (; c < C; c += L) {
      const int at = C - c < L ? 1 : c < C / (4 * L) * (4 * L) ? int(c / L % 4) : 0;
      s[at] = s[at] + f(c, lanes_of(C - c));
    }
    return sum((s[0] + s[1]) + (s[2] + s[3]));
  }
  F s0 = zero(), s1 = zero(), s2 = zero(), s3 = zero();
  for (; c + 4 * L <= C; c += 4 * L) {
    s0 = s0 + f(c, i64(L));
    s1 = s1 + f(c + L, i64(L));
    s2 = s2 + f(c + 2 * L, i64(L));
    s3 = s3 + f(c + 3 * L, i64(L));
  }
  for (; c + L <= C; c += L) s0 = s0 + f(c, i64(L));
  if (c < C) s1 = s1 + f(c, C - c);
  return sum((s0 + s1) + (s2 + s3));
}

struct TwoSums {
  float first, second;
};
// The same of two sums at once: f(c, n, &a, &b) adds to a and b.
template <class Fn> INL TwoSums row_sums(i64 C, Fn f) {
  F a[4] = {zero(), zero(), zero(), zero()}, b[4] = {zero(), zero(), zero(), zero()};
  i64 c = 0;
  if constexpr (kScalar) {
    for (; c < C; c += L) {
      const int at = C - c < L ? 1 : c < C / (4 * L) * (4 * L) ? int(c / L % 4) : 0;
      f(c, lanes_of(C - c), a[at], b[at]);
    }
    return {sum((a[0] + a[1]) + (a[2] + a[3])), sum((b[0] + b[1]) + (b[2] + b[3]))};
  }
  for (; c + 4 * L <= C; c += 4 * L)
    UNROLL_FOR (int u = 0; u < 4; u++) f(c + u * L, i64(L), a[u], b[u]);
  for (; c + L <= C; c += L) f(c, i64(L), a[0], b[0]);
  if (c < C) f(c, C - c, a[1], b[1]);
  return {sum((a[0] + a[1]) + (a[2] + a[3])), sum((b[0] + b[1]) + (b[2] + b[3]))};
}

// n <= L values at p as fp32, the other lanes 0.
INL F load_any(const void* p, DType t, i64 n) {
  if (t == DType::f32) return load_lanes(static_cast<const float*>(p), n);
  if (n < L) return widen_tail(p, t, n);
  const uint16_t* h = static_cast<const uint16_t*>(p);
  return t == DType::bf16 ? load_bf16(h) : load_f16(h);
}
template <DType T> INL F load_as(const void* row, i64 c, i64 n) { return load_any(at(row, T, c), T, n); }
INL void store_any(void* p, DType t, F x, i64 n) {
  if (t == DType::f32) return store_lanes(static_cast<float*>(p), x, n);
  if (n < L) return narrow_tail(p, t, x, n);
  uint16_t* h = static_cast<uint16_t*>(p);
  if (t == DType::bf16) store_bf16(h, x);
  else store_f16(h, x);
}
template <DType T> INL void store_as(void* row, i64 c, F x, i64 n) { store_any(at(row, T, c), T, x, n); }
// The same past the caches where `past` is set (MutRows::non_temporal); to be followed by stream_end().
template <DType T> INL void put_as(bool past, void* row, i64 c, F x, i64 n) {
  void* p = at(row, T, c);
  if (!past || n < L) return store_any(p, T, x, n);
  if constexpr (T == DType::f32) stream(static_cast<float*>(p), x);
  else stream(static_cast<uint16_t*>(p), T == DType::bf16 ? narrow_bf16(x) : narrow_f16(x));
}

// Calls f(t) with t.value the dtype as a constant.
template <DType T> struct DTypeConstant {
  static constexpr DType value = T;
};
template <class Fn> INL void with_dtype(DType t, Fn f) {
  if (t == DType::f32) f(DTypeConstant<DType::f32>());
  else if (t == DType::bf16) f(DTypeConstant<DType::bf16>());
  else f(DTypeConstant<DType::f16>());
}
// The same where `base` has been asked for what is_left_to_base.
template <class Fn> INL void with_own_dtype(DType t, Fn f) {
  if constexpr (kOnlyBf16) f(DTypeConstant<DType::bf16>());
  else with_dtype(t, f);
}
// Calls f(b) with b as a constant, for which f is compiled twice; of scalar units as it is.
template <bool B> struct BoolConstant {
  constexpr operator bool() const { return B; }
};
template <class Fn> INL void with_bool(bool b, Fn f) {
  if constexpr (kScalar) f(b);
  else if (b) f(BoolConstant<true>());
  else f(BoolConstant<false>());
}
INL bool is_left_to_base(DType t) { return kOnlyBf16 && t != DType::bf16; }
