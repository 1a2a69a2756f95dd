// Pairs of neighbouring values, as rotary and swiglu take them: two words beside those of simd.h, whose edit would compile
// everything.
//
//   deinterleave   of the 2 L values of a and then b: those at even places into a, at odd ones into b
//   interleave     back again
//   load_pairs, store_pairs      n pairs of a row from pair c on
#pragma once

#if defined(GPTFAST_SCALAR)
INL void deinterleave(F& a, F& b) {
  const F even = {a[0], a[2], b[0], b[2]}, odd = {a[1], a[3], b[1], b[3]};
  a = even, b = odd;
}
INL void interleave(F& a, F& b) {
  const F low = {a[0], b[0], a[1], b[1]}, high = {a[2], b[2], a[3], b[3]};
  a = low, b = high;
}
#elif defined(GPTFAST_NEON)
INL void deinterleave(F& a, F& b) {
  const F even = vuzp1q_f32(a, b), odd = vuzp2q_f32(a, b);
  a = even, b = odd;
}
INL void interleave(F& a, F& b) {
  const F low = vzip1q_f32(a, b), high = vzip2q_f32(a, b);
  a = low, b = high;
}
#elif defined(__AVX512F__)
INL void deinterleave(F& a, F& b) {
  const I places = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  const F even = _mm512_permutex2var_ps(a, places, b), odd = _mm512_permutex2var_ps(a, ior(places, iset(1)), b);
  a = even, b = odd;
}
INL void interleave(F& a, F& b) {
  const I places = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  const F low = _mm512_permutex2var_ps(a, places, b), high = _mm512_permutex2var_ps(a, iadd(places, iset(8)), b);
  a = low, b = high;
}
#elif defined(__AVX2__)
INL void deinterleave(F& a, F& b) {
  const F first = _mm256_permute2f128_ps(a, b, 0x20), second = _mm256_permute2f128_ps(a, b, 0x31);
  a = _mm256_shuffle_ps(first, second, 0x88), b = _mm256_shuffle_ps(first, second, 0xdd);
}
INL void interleave(F& a, F& b) {
  const F first = _mm256_unpacklo_ps(a, b), second = _mm256_unpackhi_ps(a, b);
  a = _mm256_permute2f128_ps(first, second, 0x20), b = _mm256_permute2f128_ps(first, second, 0x31);
}
#endif

struct Pair {
  F first, second;
};
INL i64 at_most(i64 n, i64 most) { return n < most ? n : most; }
template <DType T> INL Pair load_pairs(const void* row, i64 c, i64 n) {
  Pair p = {load_as<T>(row, 2 * c, at_most(2 * n, L)), 2 * n > L ? load_as<T>(row, 2 * c + L, 2 * n - L) : zero()};
  deinterleave(p.first, p.second);
  return p;
}
template <DType T> INL void store_pairs(bool past, void* row, i64 c, Pair p, i64 n) {
  interleave(p.first, p.second);
  put_as<T>(past, row, 2 * c, p.first, at_most(2 * n, L));
  if (2 * n > L) put_as<T>(past, row, 2 * c + L, p.second, 2 * n - L);
}
