// The vector vocabulary without an instruction set: 4 lanes of the compiler's own vector type (SSE2 on any x86-64,
// NEON on Arm). See simd.h for what each word means.
#pragma once

constexpr int L = 4;
typedef float F __attribute__((vector_size(16)));
typedef uint32_t I __attribute__((vector_size(16)));  // 32-bit lanes
typedef uint64_t W __attribute__((vector_size(16)));  // 64-bit lanes
struct H {                                            // 16-bit lanes
  uint16_t lane[4];
};
struct M {
  I v;  // all ones or all zeros per lane
};

INL I iset(uint32_t x) { return I{x, x, x, x}; }
INL I iota() { return I{0, 1, 2, 3}; }
INL F as_float(I a) { return (F)a; }
INL I as_int(F a) { return (I)a; }
INL M first_n(i64 n) { return {(I)(iota() < iset(n > 4 ? 4 : uint32_t(n)))}; }
INL F set(float x) { return F{x, x, x, x}; }
INL F load(const float* p) {
  F r;
  __builtin_memcpy(&r, p, 16);
  return r;
}
INL F load_n(const float* p, i64 n) {
  F r = set(0.f);
  for (int i = 0; i < 4; i++)
    if (i < n) r[i] = p[i];
  return r;
}
INL void store(float* p, F x) { __builtin_memcpy(p, &x, 16); }
INL void store_n(float* p, F x, i64 n) {
  for (int i = 0; i < 4; i++)
    if (i < n) p[i] = x[i];
}
INL F fma(F a, F b, F c) { return a * b + c; }  // two roundings where there is no such instruction
INL F fnma(F a, F b, F c) { return c - a * b; }
INL F select(M m, F a, F b) { return as_float((as_int(a) & m.v) | (as_int(b) & ~m.v)); }
INL F select_or_zero(M m, F a) { return as_float(as_int(a) & m.v); }
INL F reciprocal(F x) { return set(1.f) / x; }
INL F coarse_reciprocal(F x) { return reciprocal(x); }
INL F max(F a, F b) { return select({(I)(a > b)}, a, b); }  // b where either is nan, as on x86
INL F min(F a, F b) { return select({(I)(a < b)}, a, b); }
INL F sqrt(F a) {
  return F{__builtin_sqrtf(a[0]), __builtin_sqrtf(a[1]), __builtin_sqrtf(a[2]), __builtin_sqrtf(a[3])};
}
INL F floor(F a) {
  return F{__builtin_floorf(a[0]), __builtin_floorf(a[1]), __builtin_floorf(a[2]), __builtin_floorf(a[3])};
}
INL M lt(F a, F b) { return {(I)(a < b)}; }
INL M ge(F a, F b) { return {(I)(a >= b)}; }
INL M eq(F a, F b) { return {(I)(a == b)}; }
INL M and_mask(M a, M b) { return {a.v & b.v}; }
INL unsigned bits(M m) { return (m.v[0] & 1) | (m.v[1] & 2) | (m.v[2] & 4) | (m.v[3] & 8); }
INL float sum(F a) { return (a[0] + a[2]) + (a[1] + a[3]); }
INL float hmax(F a) {
  const float x = a[0] > a[1] ? a[0] : a[1], y = a[2] > a[3] ? a[2] : a[3];
  return x > y ? x : y;
}

INL I iload(const void* p) {
  I r;
  __builtin_memcpy(&r, p, 16);
  return r;
}
INL void istore(void* p, I x) { __builtin_memcpy(p, &x, 16); }
INL I iadd(I a, I b) { return a + b; }
INL I ior(I a, I b) { return a | b; }
INL I iand(I a, I b) { return a & b; }
INL I shl16(I a) { return a << 16; }
INL I shr16(I a) { return a >> 16; }
INL I shr(I a, int n) { return a >> n; }
INL I shl(I a, int n) { return a << n; }
INL M uge(I a, I b) { return {(I)(a >= b)}; }
typedef int32_t SI __attribute__((vector_size(16)));
INL M igt(I a, I b) { return {(I)((SI)a > (SI)b)}; }                                   // signed
INL F to_float(I a) { return F{float(a[0]), float(a[1]), float(a[2]), float(a[3])}; }  // of an unsigned value

INL F to_float_signed(I a) {
  return F{float(int32_t(a[0])), float(int32_t(a[1])), float(int32_t(a[2])), float(int32_t(a[3]))};
}
INL I isub(I a, I b) { return a - b; }
INL I sra(I a, int n) { return (I)((SI)a >> n); }
INL I iselect(M m, I a, I b) { return (a & m.v) | (b & ~m.v); }
INL M ieq(I a, I b) { return {(I)(a == b)}; }
INL I iload_u16(const uint16_t* p) { return I{p[0], p[1], p[2], p[3]}; }
// Writes the lanes of x where m is set one after another (up to L lanes are touched); returns how many.
INL int compress(void* out, I x, M m) {
  uint32_t* to = static_cast<uint32_t*>(out);
  int n = 0;
  for (int i = 0; i < 4; i++)
    if (m.v[i]) to[n++] = x[i];
  return n;
}

INL W wset(uint64_t x) { return W{x, x}; }
INL W wmul(W a, W b) { return (a & 0xffffffffu) * (b & 0xffffffffu); }  // product of the low halves
INL W wshr32(W a) { return a >> 32; }
INL W wxor3(W a, W b, W c) { return a ^ b ^ c; }
INL I interleave_low(W even, W odd) { return (I)((even & 0xffffffffu) | (odd << 32)); }

INL float widen_f16(uint16_t h) {
  const uint32_t sign = uint32_t(h & 0x8000) << 16, rest = uint32_t(h & 0x7fff) << 13;
  float f;
  if (rest >= 0x0f800000u) {  // inf or nan
    const uint32_t u = sign | rest | 0x70000000u;
    __builtin_memcpy(&f, &u, 4);
    return f;
  }
  __builtin_memcpy(&f, &rest, 4);
  f *= 0x1p112f;  // exponent bias 15 -> 127; also makes subnormals normal
  uint32_t u;
  __builtin_memcpy(&u, &f, 4);
  u |= sign;
  __builtin_memcpy(&f, &u, 4);
  return f;
}
INL uint16_t narrow_f16(float f) {
  uint32_t u;
  __builtin_memcpy(&u, &f, 4);
  const uint16_t sign = uint16_t(u >> 16 & 0x8000);
  u &= 0x7fffffffu;
  if (u > 0x7f800000u) return uint16_t(sign | 0x7e00);
  if (u >= 0x477ff000u) return uint16_t(sign | 0x7c00);  // 65520 and up round to inf
  if (u < 0x38800000u) {                                 // subnormal: let the adder of fp32 round at bit 2^-24
    float a;
    __builtin_memcpy(&a, &u, 4);
    a += 0.5f;
    uint32_t v;
    __builtin_memcpy(&v, &a, 4);
    return uint16_t(sign | (v - 0x3f000000u));
  }
  u += 0xc8000fffu + (u >> 13 & 1);  // rebias by 112 << 23 and round to nearest even
  return uint16_t(sign | u >> 13);
}
INL uint16_t narrow_bf16(float f) {
  uint32_t u;
  __builtin_memcpy(&u, &f, 4);
  if ((u & 0x7fffffffu) > 0x7f800000u) return 0x7fc0;
  return uint16_t((u + 0x7fff + (u >> 16 & 1)) >> 16);
}
INL F load_bf16(const uint16_t* p) { return as_float(I{p[0], p[1], p[2], p[3]} << 16); }
INL F load_f16(const uint16_t* p) { return F{widen_f16(p[0]), widen_f16(p[1]), widen_f16(p[2]), widen_f16(p[3])}; }
INL H narrow_bf16(F x) { return {{narrow_bf16(x[0]), narrow_bf16(x[1]), narrow_bf16(x[2]), narrow_bf16(x[3])}}; }
INL H narrow_f16(F x) { return {{narrow_f16(x[0]), narrow_f16(x[1]), narrow_f16(x[2]), narrow_f16(x[3])}}; }
INL void store(uint16_t* p, H x) { __builtin_memcpy(p, &x, 8); }
INL void stream(float* p, F x) { store(p, x); }
INL void stream(uint16_t* p, H x) { store(p, x); }
INL void stream_end() {}

INL F clamp_exponent(F y) { return min(set(128.f), max(set(-152.f), y)); }  // min and max give the second of a nan
INL F fraction(F y) { return y - floor(y); }
INL F scale_by_exp2(F p, F y) {  // two factors, as 2^-152 and 2^128 have no single exponent field
  const F f = floor(y);
  F a, b;
  for (int i = 0; i < 4; i++) {
    const int n = f[i] == f[i] ? int(f[i]) : 0, half = n >> 1;
    const uint32_t ua = uint32_t(half + 127) << 23, ub = uint32_t(n - half + 127) << 23;
    float x;
    __builtin_memcpy(&x, &ua, 4);
    a[i] = x;
    __builtin_memcpy(&x, &ub, 4);
    b[i] = x;
  }
  return p * a * b;
}

// In place: r[i] lane j <-> r[j] lane i.
INL void transpose(I r[4]) {
  I t[4];
  for (int i = 0; i < 4; i++)
    for (int j = 0; j < 4; j++) t[i][j] = r[j][i];
  for (int i = 0; i < 4; i++) r[i] = t[i];
}
// In place: 128-bit piece b of r[w] becomes piece 4 b + w of the four together: one piece each here.
INL void spread_pieces(I r[4]) {}
// In place: lane i of r[w] becomes value 4 i + w of the four together.
INL void interleave4(I r[4]) { transpose(r); }
