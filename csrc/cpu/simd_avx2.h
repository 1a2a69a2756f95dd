// The vector vocabulary on AVX2 with FMA and F16C: 8 lanes. See simd.h for what each word means.
#pragma once

constexpr int L = 8;
using H = __m128i;  // 16-bit lanes
using F = __m256;
using I = __m256i;  // 32-bit lanes
using W = __m256i;  // 64-bit lanes
struct M {
  __m256 v;  // all ones or all zeros per lane
};

INL I iset(uint32_t x) { return _mm256_set1_epi32(int(x)); }
INL I iota() { return _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7); }
INL F as_float(I a) { return _mm256_castsi256_ps(a); }
INL I as_int(F a) { return _mm256_castps_si256(a); }
INL M first_n(i64 n) { return {as_float(_mm256_cmpgt_epi32(iset(n > 8 ? 8 : uint32_t(n)), iota()))}; }
INL F set(float x) { return _mm256_set1_ps(x); }
INL F load(const float* p) { return _mm256_loadu_ps(p); }
INL F load_n(const float* p, i64 n) { return _mm256_maskload_ps(p, as_int(first_n(n).v)); }
INL void store(float* p, F x) { _mm256_storeu_ps(p, x); }
INL void store_n(float* p, F x, i64 n) { _mm256_maskstore_ps(p, as_int(first_n(n).v), x); }
INL F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
INL F fnma(F a, F b, F c) { return _mm256_fnmadd_ps(a, b, c); }
INL F coarse_reciprocal(F x) { return _mm256_rcp_ps(x); }  // to a relative 2^-11.4
INL F reciprocal(F x) { return _mm256_div_ps(_mm256_set1_ps(1.f), x); }
INL F max(F a, F b) { return _mm256_max_ps(a, b); }
INL F min(F a, F b) { return _mm256_min_ps(a, b); }
INL F sqrt(F a) { return _mm256_sqrt_ps(a); }
INL F floor(F a) { return _mm256_floor_ps(a); }
INL M lt(F a, F b) { return {_mm256_cmp_ps(a, b, _CMP_LT_OQ)}; }
INL M ge(F a, F b) { return {_mm256_cmp_ps(a, b, _CMP_GE_OQ)}; }
INL M eq(F a, F b) { return {_mm256_cmp_ps(a, b, _CMP_EQ_OQ)}; }
INL M and_mask(M a, M b) { return {_mm256_and_ps(a.v, b.v)}; }
INL unsigned bits(M m) { return unsigned(_mm256_movemask_ps(m.v)); }
INL F select(M m, F a, F b) { return _mm256_blendv_ps(b, a, m.v); }
INL F select_or_zero(M m, F a) { return _mm256_and_ps(m.v, a); }
INL float sum(F a) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_shuffle_ps(s, s, 1)));
}
INL float hmax(F a) {
  __m128 s = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  s = _mm_max_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_max_ss(s, _mm_shuffle_ps(s, s, 1)));
}

INL I iload(const void* p) { return _mm256_loadu_si256((const __m256i*)p); }
INL void istore(void* p, I x) { _mm256_storeu_si256((__m256i*)p, x); }
INL I iadd(I a, I b) { return _mm256_add_epi32(a, b); }
INL I ior(I a, I b) { return _mm256_or_si256(a, b); }
INL I iand(I a, I b) { return _mm256_and_si256(a, b); }
INL I shl16(I a) { return _mm256_slli_epi32(a, 16); }
INL I shr16(I a) { return _mm256_srli_epi32(a, 16); }
INL I shr(I a, int n) { return _mm256_srli_epi32(a, n); }
INL I shl(I a, int n) { return _mm256_slli_epi32(a, n); }
INL M uge(I a, I b) { return {as_float(_mm256_cmpeq_epi32(_mm256_max_epu32(a, b), a))}; }
INL M igt(I a, I b) { return {as_float(_mm256_cmpgt_epi32(a, b))}; }  // signed
INL F to_float(I a) {  // of an unsigned value: exact halves, one rounding in the sum
  const F high = _mm256_cvtepi32_ps(shr16(a)), low = _mm256_cvtepi32_ps(iand(a, iset(0xffff)));
  return fma(high, set(65536.f), low);
}

INL F to_float_signed(I a) { return _mm256_cvtepi32_ps(a); }
INL I isub(I a, I b) { return _mm256_sub_epi32(a, b); }
INL I sra(I a, int n) { return _mm256_srai_epi32(a, n); }
INL I iselect(M m, I a, I b) { return as_int(_mm256_blendv_ps(as_float(b), as_float(a), m.v)); }
INL M ieq(I a, I b) { return {as_float(_mm256_cmpeq_epi32(a, b))}; }
INL I iload_u16(const uint16_t* p) { return _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)); }
// Writes the lanes of x where m is set one after another (up to L lanes are touched); returns how many.
struct CompressTable {  // lanes[m]: the positions of the bits of m
  uint64_t lanes[256];
  constexpr CompressTable() : lanes() {
    for (int m = 0; m < 256; m++)
      for (int bit = 0, n = 0; bit < 8; bit++)
        if (m >> bit & 1) lanes[m] |= uint64_t(bit) << 8 * n++;
  }
};
constexpr CompressTable kCompress;
INL int compress(void* out, I x, M m) {
  const int set_bits = int(bits(m));
  const __m128i lanes = _mm_loadl_epi64((const __m128i*)&kCompress.lanes[set_bits]);
  istore(out, _mm256_permutevar8x32_epi32(x, _mm256_cvtepu8_epi32(lanes)));
  return __builtin_popcount(unsigned(set_bits));
}

INL W wset(uint64_t x) { return _mm256_set1_epi64x(int64_t(x)); }
INL W wmul(W a, W b) { return _mm256_mul_epu32(a, b); }  // product of the low halves
INL W wshr32(W a) { return _mm256_srli_epi64(a, 32); }
INL W wxor3(W a, W b, W c) { return _mm256_xor_si256(_mm256_xor_si256(a, b), c); }
INL I interleave_low(W even, W odd) { return _mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xAA); }

INL F load_bf16(const uint16_t* p) {
  return as_float(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16));
}
INL F load_f16(const uint16_t* p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
INL H narrow_bf16(F x) {
  const I u = as_int(x);
  I r = iadd(u, iadd(iand(shr16(u), iset(1)), iset(0x7fff)));
  r = shr16(as_int(_mm256_blendv_ps(as_float(r), as_float(iset(0x7fc00000)), _mm256_cmp_ps(x, x, _CMP_UNORD_Q))));
  return _mm256_castsi256_si128(_mm256_permute4x64_epi64(_mm256_packus_epi32(r, r), 0x08));
}
INL H narrow_f16(F x) { return _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
INL void store(uint16_t* p, H x) { _mm_storeu_si128((__m128i*)p, x); }
INL void stream(float* p, F x) { _mm256_stream_ps(p, x); }
INL void stream(uint16_t* p, H x) { _mm_stream_si128((__m128i*)p, x); }
INL void stream_end() { _mm_sfence(); }

INL F clamp_exponent(F y) { return min(set(128.f), max(set(-152.f), y)); }  // min and max give the second of a nan
INL F fraction(F y) { return _mm256_sub_ps(y, _mm256_floor_ps(y)); }
INL F scale_by_exp2(F p, F y) {  // two factors, as 2^-152 and 2^128 have no single exponent field
  const I n = _mm256_cvtps_epi32(_mm256_floor_ps(y)), half = _mm256_srai_epi32(n, 1);
  const F a = as_float(shl(iadd(half, iset(127)), 23));
  const F b = as_float(shl(iadd(_mm256_sub_epi32(n, half), iset(127)), 23));
  return p * a * b;
}

// In place: 128-bit piece b of r[w] becomes piece 4 b + w of the four together.
INL void spread_pieces(I r[4]) {
  const I a = r[0], b = r[1], c = r[2], d = r[3];
  r[0] = _mm256_permute2x128_si256(a, b, 0x20);
  r[1] = _mm256_permute2x128_si256(c, d, 0x20);
  r[2] = _mm256_permute2x128_si256(a, b, 0x31);
  r[3] = _mm256_permute2x128_si256(c, d, 0x31);
}
// In place: lane i of r[w] becomes value 4 i + w of the four together.
INL void interleave4(I r[4]) {
  const I a = _mm256_unpacklo_epi32(r[0], r[1]), b = _mm256_unpackhi_epi32(r[0], r[1]);
  const I c = _mm256_unpacklo_epi32(r[2], r[3]), d = _mm256_unpackhi_epi32(r[2], r[3]);
  r[0] = _mm256_unpacklo_epi64(a, c);
  r[1] = _mm256_unpackhi_epi64(a, c);
  r[2] = _mm256_unpacklo_epi64(b, d);
  r[3] = _mm256_unpackhi_epi64(b, d);
  spread_pieces(r);
}
// In place: r[i] lane j <-> r[j] lane i.
INL void transpose(I r[8]) {
  I t[8];
  UNROLL_FOR (int i = 0; i < 4; i++) {
    t[2 * i] = _mm256_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm256_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
  }
  UNROLL_FOR (int i = 0; i < 2; i++) {
    r[4 * i] = _mm256_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 1] = _mm256_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 2] = _mm256_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
    r[4 * i + 3] = _mm256_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
  }
  UNROLL_FOR (int i = 0; i < 4; i++) {
    t[i] = _mm256_permute2x128_si256(r[i], r[i + 4], 0x20);
    t[i + 4] = _mm256_permute2x128_si256(r[i], r[i + 4], 0x31);
  }
  UNROLL_FOR (int i = 0; i < 8; i++) r[i] = t[i];
}
