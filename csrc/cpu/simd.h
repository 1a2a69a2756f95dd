// One small vector vocabulary for every ISA. This file is compiled once per ISA (kernel_unit.cpp); everything lives in an
// anonymous namespace of that ISA, so that no AVX-512 copy of a shared inline function can reach the baseline.
//
//   F, I, W, M        fp32 lanes, 32-bit integer lanes, 64-bit integer lanes, lane mask;  L = fp32 lanes in a vector
//   load / load_n     L floats / the first n (the rest 0);  store / store_n likewise; load_bf16, store_f16, … convert
//   stream            an aligned store past the caches;  prefetch  into L2
//   fma fnma          a * b + c, c - a * b
//   lt ge eq, select, select_or_zero   compares, m ? a : b, m ? a : 0;  min and max return b where either is nan
//   sum hmax          over the lanes
//   exp2 exp log erf  below, with their error in units in the last place (ulp), measured over the range in tests
//   philox_*          Philox4x32-10, a call per lane
//
// Where there are products of bf16 pairs, GPTFAST_PAIRS is defined and a word I may hold two bf16, the first in the low half:
//
//   multiply_pairs    acc += a[low] b[low] + a[high] b[high]
//   pair_bf16         words from the fp32 lanes of two vectors;  join_bf16  the lanes of one, then those of the other
//   first_words, load_u16        L 16-bit values as words, of which some count, the rest 0;  first_halves, load_halves  2 L
//                                halves of which some count
//   interleave_halves_low, …_high    words (x[i], y[i]) of the 2 L halves of x and y, in an order that first_columns and
//                                    last_columns undo
//   store_halves      the lower half of a vector at p, the upper at q
#pragma once

#ifdef GPTFAST_SCALAR
#define INL static inline  // the compiler decides, which takes it less time
#else
#define INL static inline __attribute__((always_inline))
#endif
// Of what runs once a row or once a tile: a long function takes g++ more time than its parts. Nor does it copy such a function for
// arguments that it knows.
#ifdef __clang__
#define APART __attribute__((noinline))
#else
#define APART __attribute__((noinline, noclone))
#endif
#define COLD static inline APART  // compiled once, and called: for what is rarely run
// An operand of inline assembler that keeps a vector, which the compiler then knows nothing of, in its register.
#if defined(GPTFAST_EMULATED_AVX512)
#define IN_VECTOR(x) "+m"(x)
#elif defined(__aarch64__)
#define IN_VECTOR(x) "+w"(x)
#else
#define IN_VECTOR(x) "+v"(x)
#endif
#define INL_MEMBER inline __attribute__((always_inline))
#ifdef GPTFAST_SCALAR
#define UNROLL_FOR for  // tiles of 4 lanes are many, and take a compiler a minute when they are unrolled
#define ROLLED_FOR for
#elif defined(__clang__) && !defined(__x86_64__)
#define UNROLL_FOR _Pragma("clang loop unroll_count(16)") for
#define ROLLED_FOR _Pragma("clang loop unroll(disable)") for
#else
#define UNROLL_FOR _Pragma("GCC unroll 16") for
#define ROLLED_FOR _Pragma("GCC unroll 1") for  // compiled once: for what is rarely run
#endif

#if !defined(GPTFAST_SCALAR) && (defined(__AVX512BF16__) || defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC))
#define GPTFAST_PAIRS
#endif
#if !defined(GPTFAST_SCALAR) && defined(__aarch64__)
#define GPTFAST_NEON
#if defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC) && defined(__ARM_FEATURE_MATMUL_INT8)
#define GPTFAST_MATRIX  // products of small matrices: bfmmla, usmmla
#endif
#endif

#if defined(GPTFAST_SCALAR)
#include "simd_scalar.h"
#elif defined(GPTFAST_NEON)
#include "simd_neon.h"
#elif defined(__AVX512F__)
#include "simd_avx512.h"
#elif defined(__AVX2__)
#include "simd_avx2.h"
#endif

#ifdef GPTFAST_SCALAR
constexpr bool kScalar = true;  // of which only the compile time matters
#else
constexpr bool kScalar = false;
#endif
#ifdef GPTFAST_PAIRS
constexpr bool kPairs = true;  // multiplies pairs of bf16
#else
constexpr bool kPairs = false;
#endif
#if defined(GPTFAST_PAIRS) && !defined(GPTFAST_NEON)
constexpr bool kOnlyBf16 =
    true;  // compiled for bf16 alone where avx512 does the same for the other dtypes (isa_select.h)
#else
constexpr bool kOnlyBf16 = false;
#endif
#ifdef GPTFAST_NEON
constexpr bool kNeon = true;  // vectors are short and registers many: tiles are of more vectors
#else
constexpr bool kNeon = false;
#endif

INL F zero() { return set(0.f); }
INL void prefetch(const void* p) { __builtin_prefetch(p, 0, 2); }
constexpr float kLog2e = 1.4426950408889634f;

// ---- elementary functions -------------------------------------------------------------------------------------------

// 2^f on [0, 1), minimax polynomials: DEG 6 1.1 ulp, 5 2.1 ulp, 4 relative error 2.6e-6 (enough before bf16).
template <int DEG> INL F exp2_fraction(F f) {
  if constexpr (DEG == 6) {
    F p = set(0x1.c71fdp-13f);
    p = fma(p, f, set(0x1.461982p-10f));
    p = fma(p, f, set(0x1.3d2806p-7f));
    p = fma(p, f, set(0x1.c684fep-5f));
    p = fma(p, f, set(0x1.ebfdap-3f));
    p = fma(p, f, set(0x1.62e42ap-1f));
    return fma(p, f, set(1.f));
  } else if constexpr (DEG == 5) {
    F p = set(0x1.ec2ff6p-10f);
    p = fma(p, f, set(0x1.26902ep-7f));
    p = fma(p, f, set(0x1.c9546p-5f));
    p = fma(p, f, set(0x1.ebd5a2p-3f));
    p = fma(p, f, set(0x1.62e4f6p-1f));
    return fma(p, f, set(0x1.fffffep-1f));
  } else {
    F p = set(0x1.bb79dap-7f);
    p = fma(p, f, set(0x1.aa13f2p-5f));
    p = fma(p, f, set(0x1.ee79d4p-3f));
    p = fma(p, f, set(0x1.62d15cp-1f));
    return fma(p, f, set(0x1.00002cp+0f));
  }
}
// 2^y, -inf -> 0, inf -> inf, nan -> nan.
template <int DEG = 6> INL F exp2(F y) {
  y = clamp_exponent(y);
  return scale_by_exp2(exp2_fraction<DEG>(fraction(y)), y);
}
// e^x with the rounding of x * log2(e) carried along: 1.5 ulp over the whole range; -inf -> 0, inf -> inf, nan -> nan.
INL F exp(F x) {
  x = min(set(89.f), max(set(-107.f), x));
  const F log2e = set(0x1.715476p+0f), log2e_low = set(0x1.4ae0cp-26f);
  const F n = floor(x * log2e);
  const F f = fma(x, log2e_low, fma(x, log2e, zero() - n));
  return scale_by_exp2(exp2_fraction<6>(f), n);
}

INL F abs(F x) { return as_float(iand(as_int(x), iset(0x7fffffffu))); }
INL F copysign(F magnitude, F sign) { return as_float(ior(as_int(magnitude), iand(as_int(sign), iset(0x80000000u)))); }

// erf(x): x P(x^2) for |x| < 1 and 1 - 2^Q(|x|) beyond (weighted minimax fits); absolute error below 1e-7.
INL F erf(F x) {
  const F s = x * x, a = min(set(4.f), abs(x));
  F p = set(0x1.4ae4a6p-14f);
  p = fma(p, s, set(-0x1.a485dcp-11f));
  p = fma(p, s, set(0x1.5419f2p-8f));
  p = fma(p, s, set(-0x1.b7fbb4p-6f));
  p = fma(p, s, set(0x1.ce2d2p-4f));
  p = fma(p, s, set(-0x1.81273ep-2f));
  p = fma(p, s, set(0x1.20dd74p+0f));
  F q = set(-0x1.0697aep-15f);
  q = fma(q, a, set(0x1.4ded5cp-11f));
  q = fma(q, a, set(-0x1.8d9adcp-8f));
  q = fma(q, a, set(0x1.29f35p-5f));
  q = fma(q, a, set(-0x1.405934p-3f));
  q = fma(q, a, set(-0x1.d3bb42p-1f));
  q = fma(q, a, set(-0x1.a13016p+0f));
  q = fma(q, a, set(0x1.1d1f48p-12f));
  const F far = copysign(set(1.f) - exp2<6>(q), x);
  return select(ge(a, set(1.f)), far, x * p);
}

// Natural logarithm of positive normal numbers: f - f^2/2 + f^3 P(f) on [sqrt(1/2), sqrt(2)), P a minimax fit; 1.5 ulp.
INL F log(F x) {
  const I exponent = sra(isub(as_int(x), iset(0x3f3504f3u)), 23);
  const F n = to_float_signed(exponent), f = as_float(isub(as_int(x), shl(exponent, 23))) - set(1.f);
  F p = set(0x1.1455f4p-4f);
  p = fma(p, f, set(-0x1.de3baep-4f));
  p = fma(p, f, set(0x1.e6f0fcp-4f));
  p = fma(p, f, set(-0x1.fc2220p-4f));
  p = fma(p, f, set(0x1.233760p-3f));
  p = fma(p, f, set(-0x1.555c4cp-3f));
  p = fma(p, f, set(0x1.99a4b6p-3f));
  p = fma(p, f, set(-0x1.000006p-2f));
  p = fma(p, f, set(0x1.555548p-2f));
  const F f2 = f * f;
  const F small = fma(f2 * f, p, fma(n, set(0x1.7f7d1cp-20f), set(-0.5f) * f2));  // ln 2 in two parts
  return fma(n, set(0x1.62e4p-1f), small + f);
}
// log(1 + x) for x in (-1, 0]: log(u) x / (u - 1) with u = 1 + x undoes the rounding of u (Kahan; Higham 2002, 1.14.1).
INL F log1p_negative(F x) {
  const F u = set(1.f) + x;
  return select(eq(u, set(1.f)), x, log(u) * (x / (u - set(1.f))));
}

// ---- Philox4x32-10 --------------------------------------------------------------------------------------------------
// 32-bit lanes are held as even and odd 64-bit halves, where the low word counts and the high word may be anything.

#ifndef GPTFAST_NEON  // which has its own
struct Wide {
  W even, odd;
};
INL Wide widen(I x) { return {(W)x, wshr32((W)x)}; }
INL Wide widen(uint32_t x) { return {wset(x), wset(x)}; }

INL void philox(uint32_t k0, uint32_t k1, Wide c0, Wide c1, Wide c2, Wide c3, I out[4]) {
  const W m0 = wset(0xD2511F53u), m1 = wset(0xCD9E8D57u);
  UNROLL_FOR (int r = 0; r < 10; r++) {
    const W K0 = wset(k0), K1 = wset(k1);
    const W a_even = wmul(m0, c0.even), a_odd = wmul(m0, c0.odd);
    const W b_even = wmul(m1, c2.even), b_odd = wmul(m1, c2.odd);
    c0 = {wxor3(wshr32(b_even), c1.even, K0), wxor3(wshr32(b_odd), c1.odd, K0)};
    c2 = {wxor3(wshr32(a_even), c3.even, K1), wxor3(wshr32(a_odd), c3.odd, K1)};
    c1 = {b_even, b_odd};
    c3 = {a_even, a_odd};
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  out[0] = interleave_low(c0.even, c0.odd);
  out[1] = interleave_low(c1.even, c1.odd);
  out[2] = interleave_low(c2.even, c2.odd);
  out[3] = interleave_low(c3.even, c3.odd);
}
#endif

INL void store_bf16(uint16_t* p, F x) { store(p, narrow_bf16(x)); }
INL void store_f16(uint16_t* p, F x) { store(p, narrow_f16(x)); }

#include "simd_rows.h"
