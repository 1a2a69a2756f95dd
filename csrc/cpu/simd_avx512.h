// The vector vocabulary on AVX-512 (F, BW, DQ, VL): 16 lanes. See simd.h for what each word means.
#pragma once

constexpr int L = 16;
using H = __m256i;  // 16-bit lanes
using F = __m512;
using I = __m512i;  // 32-bit lanes
using W = __m512i;  // 64-bit lanes
using M = __mmask16;

INL M first_n(i64 n) { return n >= 16 ? M(0xffff) : M((1u << n) - 1); }
INL F set(float x) { return _mm512_set1_ps(x); }
INL F load(const float* p) { return _mm512_loadu_ps(p); }
INL F load_n(const float* p, i64 n) { return _mm512_maskz_loadu_ps(first_n(n), p); }
INL void store(float* p, F x) { _mm512_storeu_ps(p, x); }
INL void store_n(float* p, F x, i64 n) { _mm512_mask_storeu_ps(p, first_n(n), x); }
INL F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
INL F fnma(F a, F b, F c) { return _mm512_fnmadd_ps(a, b, c); }
// 1 / x to 1 ulp, and to a relative 2^-14. Not of denormals; a vector division takes as long as ten products.
INL F coarse_reciprocal(F x) { return _mm512_rcp14_ps(x); }
INL F reciprocal(F x) {
  const F y = _mm512_rcp14_ps(x), error = _mm512_fnmadd_ps(x, y, _mm512_set1_ps(1.f));
  return _mm512_mask_fmadd_ps(y, _mm512_cmp_ps_mask(y, _mm512_setzero_ps(), _CMP_NEQ_UQ), error, y);  // 1 / inf: 0
}
INL F max(F a, F b) { return _mm512_max_ps(a, b); }
INL F min(F a, F b) { return _mm512_min_ps(a, b); }
INL F sqrt(F a) { return _mm512_sqrt_ps(a); }
INL F floor(F a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC); }
INL M lt(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ); }
INL M ge(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_GE_OQ); }
INL M eq(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ); }
INL M and_mask(M a, M b) { return a & b; }
INL unsigned bits(M m) { return m; }
INL F select(M m, F a, F b) { return _mm512_mask_mov_ps(b, m, a); }
INL F select_or_zero(M m, F a) { return _mm512_maskz_mov_ps(m, a); }
INL float sum(F a) { return _mm512_reduce_add_ps(a); }
INL float hmax(F a) { return _mm512_reduce_max_ps(a); }

INL I iset(uint32_t x) { return _mm512_set1_epi32(int(x)); }
INL I iota() { return _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15); }
INL I iload(const void* p) { return _mm512_loadu_si512(p); }
INL void istore(void* p, I x) { _mm512_storeu_si512(p, x); }
INL I iadd(I a, I b) { return _mm512_add_epi32(a, b); }
INL I ior(I a, I b) { return _mm512_or_si512(a, b); }
INL I iand(I a, I b) { return _mm512_and_si512(a, b); }
INL I shl16(I a) { return _mm512_slli_epi32(a, 16); }
INL I shr16(I a) { return _mm512_srli_epi32(a, 16); }
INL I shr(I a, int n) { return _mm512_srli_epi32(a, unsigned(n)); }
INL I shl(I a, int n) { return _mm512_slli_epi32(a, unsigned(n)); }
INL M uge(I a, I b) { return _mm512_cmpge_epu32_mask(a, b); }
INL M igt(I a, I b) { return _mm512_cmpgt_epi32_mask(a, b); }  // signed
INL F as_float(I a) { return _mm512_castsi512_ps(a); }
INL I as_int(F a) { return _mm512_castps_si512(a); }
INL F to_float(I a) { return _mm512_cvtepu32_ps(a); }  // of an unsigned value

INL F to_float_signed(I a) { return _mm512_cvtepi32_ps(a); }
INL I isub(I a, I b) { return _mm512_sub_epi32(a, b); }
INL I sra(I a, int n) { return _mm512_srai_epi32(a, unsigned(n)); }
INL I iselect(M m, I a, I b) { return _mm512_mask_mov_epi32(b, m, a); }
INL M ieq(I a, I b) { return _mm512_cmpeq_epi32_mask(a, b); }
INL I iload_u16(const uint16_t* p) { return _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)); }
// Writes the lanes of x where m is set one after another (up to L lanes are touched); returns how many.
INL int compress(void* out, I x, M m) {
  istore(out, _mm512_maskz_compress_epi32(m, x));
  return __builtin_popcount(m);
}

INL W wset(uint64_t x) { return _mm512_set1_epi64(int64_t(x)); }
INL W wmul(W a, W b) { return _mm512_mul_epu32(a, b); }  // product of the low halves
INL W wshr32(W a) { return _mm512_srli_epi64(a, 32); }
INL W wxor3(W a, W b, W c) { return _mm512_ternarylogic_epi32(a, b, c, 0x96); }
INL I interleave_low(W even, W odd) { return _mm512_mask_shuffle_epi32(even, 0xAAAA, odd, _MM_PERM_CCAA); }

INL F widen_bf16(H h) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16)); }
INL F widen_f16(H h) { return _mm512_cvtph_ps(h); }
INL F load_bf16(const uint16_t* p) { return widen_bf16(_mm256_loadu_si256((const __m256i*)p)); }
INL F load_f16(const uint16_t* p) { return widen_f16(_mm256_loadu_si256((const __m256i*)p)); }
INL H narrow_bf16(F x) {
#ifdef __AVX512BF16__
  return (H)_mm512_cvtneps_pbh(x);  // numbers below 2^-126 become 0; a branch for them cost ops in cache 4 to 20%
#else
  const I u = as_int(x);
  const I lsb = iand(shr16(u), iset(1));
  I r = iadd(u, iadd(lsb, iset(0x7fff)));
  r = _mm512_mask_mov_epi32(r, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), iset(0x7fc00000));
  return _mm512_cvtepi32_epi16(shr16(r));
#endif
}
INL H narrow_f16(F x) { return _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
#define GPTFAST_MASKED_HALVES  // the first n < L of 16-bit values, the rest 0; and back
INL H load_some_halves(const uint16_t* p, i64 n) {
  return _mm512_castsi512_si256(_mm512_maskz_loadu_epi16(first_n(n), p));
}
INL void store_some_halves(uint16_t* p, H h, i64 n) {
  _mm512_mask_storeu_epi16(p, first_n(n), _mm512_castsi256_si512(h));
}
INL void store(uint16_t* p, H x) { _mm256_storeu_si256((__m256i*)p, x); }
INL void stream(float* p, F x) { _mm512_stream_ps(p, x); }
INL void stream(uint16_t* p, H x) { _mm256_stream_si256((__m256i*)p, x); }
INL void stream_end() { _mm_sfence(); }

INL F fraction(F y) { return _mm512_reduce_ps(y, 0x09); }         // y - floor(y)
INL F scale_by_exp2(F p, F y) { return _mm512_scalef_ps(p, y); }  // p * 2^floor(y)
INL F clamp_exponent(F y) { return y; }                           // fraction(+-inf) is 0 and scale_by_exp2 saturates

// In place: 128-bit piece b of r[w] becomes piece 4 b + w of the four together.
INL void spread_pieces(I r[4]) {
  const I a = _mm512_shuffle_i32x4(r[0], r[1], 0x44), b = _mm512_shuffle_i32x4(r[2], r[3], 0x44);
  const I c = _mm512_shuffle_i32x4(r[0], r[1], 0xee), d = _mm512_shuffle_i32x4(r[2], r[3], 0xee);
  r[0] = _mm512_shuffle_i32x4(a, b, 0x88);
  r[1] = _mm512_shuffle_i32x4(a, b, 0xdd);
  r[2] = _mm512_shuffle_i32x4(c, d, 0x88);
  r[3] = _mm512_shuffle_i32x4(c, d, 0xdd);
}
// In place: lane i of r[w] becomes value 4 i + w of the four together.
INL void interleave4(I r[4]) {
  const I a = _mm512_unpacklo_epi32(r[0], r[1]), b = _mm512_unpackhi_epi32(r[0], r[1]);
  const I c = _mm512_unpacklo_epi32(r[2], r[3]), d = _mm512_unpackhi_epi32(r[2], r[3]);
  r[0] = _mm512_unpacklo_epi64(a, c);
  r[1] = _mm512_unpackhi_epi64(a, c);
  r[2] = _mm512_unpacklo_epi64(b, d);
  r[3] = _mm512_unpackhi_epi64(b, d);
  spread_pieces(r);
}
// In place: r[i] lane j <-> r[j] lane i.
INL void transpose(I r[16]) {
  I t[16];
  UNROLL_FOR (int i = 0; i < 8; i++) {
    t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
  }
  UNROLL_FOR (int i = 0; i < 4; i++) {
    r[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
    r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
  }
  UNROLL_FOR (int i = 0; i < 4; i++) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
  }
  UNROLL_FOR (int i = 0; i < 4; i++) {
    r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
    r[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
    r[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
  }
}

#ifdef GPTFAST_PAIRS
// ---- pairs of bf16 (see simd.h) -------------------------------------------------------------------------------------

INL F multiply_pairs(F acc, I a, I b) { return _mm512_dpbf16_ps(acc, (__m512bh)a, (__m512bh)b); }
INL I join_bf16(F first, F second) { return (I)_mm512_cvtne2ps_pbh(second, first); }
INL I pair_bf16(F low, F high) {
  const I order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5,
                                   20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return _mm512_permutexvar_epi16(order, join_bf16(low, high));
}
INL void store_halves(void* p, void* q, I x) {
  _mm256_storeu_si256((__m256i*)p, _mm512_castsi512_si256(x));
  _mm256_storeu_si256((__m256i*)q, _mm512_extracti64x4_epi64(x, 1));
}
using HalfLanes = __mmask32;
INL HalfLanes first_halves(i64 n) { return n < 2 * L ? (1u << n) - 1 : ~0u; }
INL I load_halves(const uint16_t* p, HalfLanes lanes) { return _mm512_maskz_loadu_epi16(lanes, p); }
INL M first_words(i64 n) { return first_n(n); }
INL I load_u16(const uint16_t* p, M lanes) {
  return _mm512_cvtepu16_epi32(_mm512_castsi512_si256(_mm512_maskz_loadu_epi16(lanes, p)));
}
INL I interleave_halves_low(I x, I y) { return _mm512_unpacklo_epi16(x, y); }
INL I interleave_halves_high(I x, I y) { return _mm512_unpackhi_epi16(x, y); }
// a quarter of a vector holds columns 8 q to 8 q + 7: four from the first, four from the second
INL F first_columns(F low, F high) {
  const I order = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
  return _mm512_permutex2var_ps(low, order, high);
}
INL F last_columns(F low, F high) {
  const I order = _mm512_setr_epi32(8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31);
  return _mm512_permutex2var_ps(low, order, high);
}
#endif
