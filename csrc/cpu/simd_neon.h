// The vector vocabulary on AArch64's Advanced SIMD (NEON), which every ARMv8-A processor has: 4 lanes, 32 registers. See
// simd.h for what each word means. With BF16 there are products of pairs.
#pragma once

constexpr int L = 4;
using H = uint16x4_t;  // 16-bit lanes
using F = float32x4_t;
using I = uint32x4_t;  // 32-bit lanes
struct M {
  uint32x4_t v;  // all ones or all zeros per lane
};

INL I iset(uint32_t x) { return vdupq_n_u32(x); }
INL I iota() { return I{0, 1, 2, 3}; }
INL F as_float(I a) { return vreinterpretq_f32_u32(a); }
INL I as_int(F a) { return vreinterpretq_u32_f32(a); }
INL M first_n(i64 n) { return {vcgtq_s32(vdupq_n_s32(n > 4 ? 4 : int32_t(n)), int32x4_t{0, 1, 2, 3})}; }
INL F set(float x) { return vdupq_n_f32(x); }
INL F load(const float* p) { return vld1q_f32(p); }
INL F load_n(const float* p, i64 n) {
  if (n >= 4) return vld1q_f32(p);
  F r = vdupq_n_f32(0.f);
  if (n > 0) r = vld1q_lane_f32(p, r, 0);
  if (n > 1) r = vld1q_lane_f32(p + 1, r, 1);
  if (n > 2) r = vld1q_lane_f32(p + 2, r, 2);
  return r;
}
INL void store(float* p, F x) { vst1q_f32(p, x); }
INL void store_n(float* p, F x, i64 n) {
  if (n >= 4) return vst1q_f32(p, x);
  if (n > 0) vst1q_lane_f32(p, x, 0);
  if (n > 1) vst1q_lane_f32(p + 1, x, 1);
  if (n > 2) vst1q_lane_f32(p + 2, x, 2);
}
INL F fma(F a, F b, F c) { return vfmaq_f32(c, a, b); }
INL F fnma(F a, F b, F c) { return vfmsq_f32(c, a, b); }
INL F reciprocal(F x) { return vdivq_f32(vdupq_n_f32(1.f), x); }
INL F coarse_reciprocal(F x) {  // to a relative 2^-16: an estimate of 8 bits and one of Newton's steps; 0 of inf
  const F y = vrecpeq_f32(x);
  return vmulq_f32(y, vrecpsq_f32(x, y));
}
INL F max(F a, F b) { return vbslq_f32(vcgtq_f32(a, b), a, b); }  // b where either is nan, as on x86
INL F min(F a, F b) { return vbslq_f32(vcltq_f32(a, b), a, b); }
INL F sqrt(F a) { return vsqrtq_f32(a); }
INL F floor(F a) { return vrndmq_f32(a); }
INL M lt(F a, F b) { return {vcltq_f32(a, b)}; }
INL M ge(F a, F b) { return {vcgeq_f32(a, b)}; }
INL M eq(F a, F b) { return {vceqq_f32(a, b)}; }
INL M and_mask(M a, M b) { return {vandq_u32(a.v, b.v)}; }
INL unsigned bits(M m) { return vaddvq_u32(vandq_u32(m.v, I{1, 2, 4, 8})); }
INL F select(M m, F a, F b) { return vbslq_f32(m.v, a, b); }
INL F select_or_zero(M m, F a) { return as_float(vandq_u32(m.v, as_int(a))); }
INL float sum(F a) { return vaddvq_f32(a); }
INL float hmax(F a) { return vmaxnmvq_f32(a); }

INL I iload(const void* p) { return vreinterpretq_u32_u8(vld1q_u8(static_cast<const uint8_t*>(p))); }
INL void istore(void* p, I x) { vst1q_u8(static_cast<uint8_t*>(p), vreinterpretq_u8_u32(x)); }
INL I iadd(I a, I b) { return vaddq_u32(a, b); }
INL I isub(I a, I b) { return vsubq_u32(a, b); }
INL I ior(I a, I b) { return vorrq_u32(a, b); }
INL I iand(I a, I b) { return vandq_u32(a, b); }
INL I shl16(I a) { return vshlq_n_u32(a, 16); }
INL I shr16(I a) { return vshrq_n_u32(a, 16); }
INL I shr(I a, int n) { return a >> vdupq_n_u32(uint32_t(n)); }  // one instruction: n is a constant once inlined
INL I shl(I a, int n) { return a << vdupq_n_u32(uint32_t(n)); }
INL I sra(I a, int n) { return vreinterpretq_u32_s32(vreinterpretq_s32_u32(a) >> vdupq_n_s32(n)); }
INL M uge(I a, I b) { return {vcgeq_u32(a, b)}; }
INL M igt(I a, I b) { return {vcgtq_s32(vreinterpretq_s32_u32(a), vreinterpretq_s32_u32(b))}; }  // signed
INL M ieq(I a, I b) { return {vceqq_u32(a, b)}; }
INL I iselect(M m, I a, I b) { return vbslq_u32(m.v, a, b); }
INL F to_float(I a) { return vcvtq_f32_u32(a); }  // of an unsigned value
INL F to_float_signed(I a) { return vcvtq_f32_s32(vreinterpretq_s32_u32(a)); }
INL I iload_u16(const uint16_t* p) { return vmovl_u16(vld1_u16(p)); }
// Writes the lanes of x where m is set one after another (up to L lanes are touched); returns how many.
struct CompressTable {  // bytes[m]: those of the lanes whose bit of m is set
  uint8_t bytes[16][16];
  uint8_t count[16];
  constexpr CompressTable() : bytes(), count() {
    for (int m = 0; m < 16; m++)
      for (int bit = 0; bit < 4; bit++)
        if (m >> bit & 1) {
          for (int b = 0; b < 4; b++) bytes[m][4 * count[m] + b] = uint8_t(4 * bit + b);
          count[m]++;
        }
  }
};
constexpr CompressTable kCompress;
INL int compress(void* out, I x, M m) {
  const unsigned set_bits = bits(m);
  vst1q_u8(static_cast<uint8_t*>(out), vqtbl1q_u8(vreinterpretq_u8_u32(x), vld1q_u8(kCompress.bytes[set_bits])));
  return kCompress.count[set_bits];
}

INL F load_bf16(const uint16_t* p) { return as_float(shl16(vmovl_u16(vld1_u16(p)))); }
INL F load_f16(const uint16_t* p) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))); }
INL H narrow_f16(F x) { return vreinterpret_u16_f16(vcvt_f16_f32(x)); }
INL H narrow_bf16(F x) {
#ifdef GPTFAST_PAIRS
  const H rounded = vget_low_u16(vreinterpretq_u16_bf16(vcvtq_low_bf16_f32(x)));
#else
  // raddhn adds half a unit; one less where the last bit that stays is 0, so that ties go to even
  const I less = vceqzq_u32(vandq_u32(as_int(x), iset(0x10000)));
  const H rounded = vraddhn_u32(as_int(x), less);
#endif
  return vbsl_u16(vmovn_u32(vceqq_f32(x, x)), rounded, vdup_n_u16(0x7fc0));
}
INL void store(uint16_t* p, H x) { vst1_u16(p, x); }
INL void stream(float* p, F x) { store(p, x); }
INL void stream(uint16_t* p, H x) { store(p, x); }
INL void stream_end() {}

INL F clamp_exponent(F y) { return vminq_f32(vmaxq_f32(y, set(-152.f)), set(128.f)); }  // nan stays
INL F fraction(F y) { return vsubq_f32(y, vrndmq_f32(y)); }
INL F scale_by_exp2(F p, F y) {  // two factors, as 2^-152 and 2^128 have no single exponent field
  const int32x4_t n = vcvtmq_s32_f32(y), half = vshrq_n_s32(n, 1), bias = vdupq_n_s32(127);
  const int32x4_t a = vshlq_n_s32(vaddq_s32(half, bias), 23), b = vshlq_n_s32(vaddq_s32(vsubq_s32(n, half), bias), 23);
  return vmulq_f32(vmulq_f32(p, vreinterpretq_f32_s32(a)), vreinterpretq_f32_s32(b));
}

INL I zip_low64(I a, I b) {
  return vreinterpretq_u32_u64(vzip1q_u64(vreinterpretq_u64_u32(a), vreinterpretq_u64_u32(b)));
}
INL I zip_high64(I a, I b) {
  return vreinterpretq_u32_u64(vzip2q_u64(vreinterpretq_u64_u32(a), vreinterpretq_u64_u32(b)));
}
// In place: r[i] lane j <-> r[j] lane i.
INL void transpose(I r[4]) {
  const I a = vtrn1q_u32(r[0], r[1]), b = vtrn2q_u32(r[0], r[1]);
  const I c = vtrn1q_u32(r[2], r[3]), d = vtrn2q_u32(r[2], r[3]);
  r[0] = zip_low64(a, c);
  r[1] = zip_low64(b, d);
  r[2] = zip_high64(a, c);
  r[3] = zip_high64(b, d);
}
// In place: 128-bit piece b of r[w] becomes piece 4 b + w of the four together: one piece each here.
INL void spread_pieces(I r[4]) {}
// In place: lane i of r[w] becomes value 4 i + w of the four together.
INL void interleave4(I r[4]) { transpose(r); }

// ---- Philox4x32-10: see simd.h. Products of 32 by 32 bits come in two halves of two lanes, whose words two unzips sort -----

using Wide = I;
INL Wide widen(I x) { return x; }
INL Wide widen(uint32_t x) { return iset(x); }
struct WideProduct {
  I low, high;
};
INL WideProduct multiply_wide(I x, uint32_t by) {
  const I first = vreinterpretq_u32_u64(vmull_n_u32(vget_low_u32(x), by));
  const I second = vreinterpretq_u32_u64(vmull_high_n_u32(x, by));
  return {vuzp1q_u32(first, second), vuzp2q_u32(first, second)};
}
INL void philox(uint32_t k0, uint32_t k1, Wide c0, Wide c1, Wide c2, Wide c3, I out[4]) {
  UNROLL_FOR (int r = 0; r < 10; r++) {
    const WideProduct a = multiply_wide(c0, 0xD2511F53u), b = multiply_wide(c2, 0xCD9E8D57u);
    c0 = veorq_u32(veorq_u32(b.high, c1), iset(k0));
    c2 = veorq_u32(veorq_u32(a.high, c3), iset(k1));
    c1 = b.low;
    c3 = a.low;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  out[0] = c0;
  out[1] = c1;
  out[2] = c2;
  out[3] = c3;
}

#ifdef GPTFAST_PAIRS
// ---- pairs of bf16 (see simd.h) ------------------------------------------------------------------------------------------

INL F multiply_pairs(F acc, I a, I b) { return vbfdotq_f32(acc, vreinterpretq_bf16_u32(a), vreinterpretq_bf16_u32(b)); }
INL I join_bf16(F first, F second) {
  return vreinterpretq_u32_bf16(vcvtq_high_bf16_f32(vcvtq_low_bf16_f32(first), second));
}
INL I pair_bf16(F low, F high) {
  const uint16x8_t a = vreinterpretq_u16_bf16(vcvtq_low_bf16_f32(low));
  const uint16x8_t b = vreinterpretq_u16_bf16(vcvtq_low_bf16_f32(high));
  return vreinterpretq_u32_u16(vzip1q_u16(a, b));
}
INL void store_halves(void* p, void* q, I x) {
  vst1q_lane_u64(static_cast<uint64_t*>(p), vreinterpretq_u64_u32(x), 0);
  vst1q_lane_u64(static_cast<uint64_t*>(q), vreinterpretq_u64_u32(x), 1);
}
struct HalfLanes {  // which of 2 L 16-bit lanes count
  i64 n;
};
INL HalfLanes first_halves(i64 n) { return {n > 8 ? 8 : n}; }
INL I load_halves(const uint16_t* p, HalfLanes lanes) {
  if (lanes.n == 8) return iload(p);
  uint16_t halves[8] = {};
  for (i64 i = 0; i < lanes.n; i++) halves[i] = p[i];
  return iload(halves);
}
INL i64 first_words(i64 n) { return n; }
INL I load_u16(const uint16_t* p, i64 n) {
  if (n >= 4) return iload_u16(p);
  uint16_t halves[4] = {};
  for (i64 i = 0; i < n; i++) halves[i] = p[i];
  return iload_u16(halves);
}
INL I interleave_halves_low(I x, I y) {
  return vreinterpretq_u32_u16(vzip1q_u16(vreinterpretq_u16_u32(x), vreinterpretq_u16_u32(y)));
}
INL I interleave_halves_high(I x, I y) {
  return vreinterpretq_u32_u16(vzip2q_u16(vreinterpretq_u16_u32(x), vreinterpretq_u16_u32(y)));
}
INL F first_columns(F low, F) { return low; }
INL F last_columns(F, F high) { return high; }
#endif
