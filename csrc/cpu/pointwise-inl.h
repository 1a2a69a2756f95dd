// What the pointwise kernels share: an exponential, and an order of their rows.
#pragma once

// 2^y to a relative 7.5e-5 (a minimax polynomial of degree 3), for what becomes bf16: 2^-9 is half its last place.
// -inf -> 0, inf -> inf.
INL F exp2_coarse(F y) {
  y = clamp_exponent(y);
  const F f = fraction(y);
  F p = set(0x1.3f96a4p-4f);
  p = fma(p, f, set(0x1.cefc4cp-3f));
  p = fma(p, f, set(0x1.64444cp-1f));
  return scale_by_exp2(fma(p, f, set(0x1.fff632p-1f)), y);
}

template <int N> struct Count {
  static constexpr int value = N;
};
// f(r, rows, n) over the rows of p by twos: two streams from memory are faster than one (gelu: 3.5 -> 2.9 ms at 4096 x 3072
// fp32). f best loads of both before it stores: rows of whole pages make a load wait for a store of the other (gelu's backward still
// loads dy of the second after it). n: of the columns from c0 on, at most `width`. The last row of all may be short (p.tail), and
// stands alone. TWOS false: one by one.
template <DType T, bool TWOS = true, class P, class Fn>
INL void rows_by_twos(const P& p, i64 begin, i64 end, i64 c0, i64 width, Fn f) {
  i64 r = begin;
  if constexpr (TWOS && !kOnce<T>)
    for (; r + 2 <= end && r + 2 < p.R; r += 2) f(r, Count<2>(), width);
  for (; r < end; r++) {
    const i64 C = r == p.R - 1 ? p.tail : p.C;
    f(r, Count<1>(), C - c0 < width ? C - c0 : width);
  }
}
