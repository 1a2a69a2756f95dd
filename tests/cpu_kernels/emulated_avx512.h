// The intrinsics of AVX-512 (F, BW, DQ, VL, VNNI, BF16) that csrc/ names, in loops over their lanes, after the pseudo-code of
// Intel's manual: the same kernels run on a machine with AVX2. For g++, read before all else with the flags of avx2.
#pragma once
#include <cmath>
#include <cstdint>

#include "../../csrc/cpu/intrinsics.h"

#define GPTFAST_EMULATED_AVX512
#define __AVX512F__ 1
#define __AVX512BW__ 1
#define __AVX512DQ__ 1
#define __AVX512VL__ 1
#ifdef GPTFAST_EMULATED_BF16
#define __AVX512BF16__ 1
#define __AVX512VNNI__ 1
#endif

typedef float __m512 __attribute__((vector_size(64), may_alias));
typedef long long __m512i __attribute__((vector_size(64), may_alias));
typedef short __m512bh __attribute__((vector_size(64), may_alias));
typedef short __m256bh __attribute__((vector_size(32), may_alias));
typedef unsigned char __mmask8;
typedef unsigned short __mmask16;
typedef unsigned int __mmask32;
typedef unsigned long long __mmask64;
#ifndef _MM_PERM_CCAA
constexpr int _MM_PERM_CCAA = 0xa0;
#endif

namespace {
namespace lanes {
typedef int32_t I32 __attribute__((vector_size(64), may_alias));
typedef uint32_t U32 __attribute__((vector_size(64), may_alias));
typedef int16_t I16 __attribute__((vector_size(64), may_alias));
typedef uint16_t U16 __attribute__((vector_size(64), may_alias));
typedef int8_t I8 __attribute__((vector_size(64), may_alias));
typedef uint8_t U8 __attribute__((vector_size(64), may_alias));
typedef uint64_t U64 __attribute__((vector_size(64), may_alias));
typedef int16_t HalfI16 __attribute__((vector_size(32), may_alias));
typedef uint16_t HalfU16 __attribute__((vector_size(32), may_alias));
typedef int8_t HalfI8 __attribute__((vector_size(32), may_alias));
typedef uint8_t HalfU8 __attribute__((vector_size(32), may_alias));
typedef int8_t QuarterI8 __attribute__((vector_size(16), may_alias));
typedef uint8_t QuarterU8 __attribute__((vector_size(16), may_alias));

inline float bf16_value(uint16_t h) {  // below the smallest normal number: 0
  const uint32_t word = (h & 0x7f80) ? uint32_t(h) << 16 : uint32_t(h & 0x8000) << 16;
  return __builtin_bit_cast(float, word);
}
inline float flushed(float x) { return std::fabs(x) < 0x1p-126f ? std::copysign(0.f, x) : x; }
inline uint16_t bf16_of(float x) {
  const uint32_t u = __builtin_bit_cast(uint32_t, flushed(x));
  if (x != x) return uint16_t(u >> 16 | 0x40);
  return uint16_t((u + 0x7fff + (u >> 16 & 1)) >> 16);
}
inline float scaled(float p, float y) {  // p * 2^floor(y)
  if (p != p || y != y) return p + y;
  const float e = std::floor(y);
  return float(std::ldexp(double(p), e > 1000 ? 1000 : e < -1000 ? -1000 : int(e)));
}
inline float reciprocal(float x) {  // to 2^-14
  const uint32_t u = __builtin_bit_cast(uint32_t, 1.f / x);
  const bool number = (u & 0x7f800000) != 0x7f800000;
  return flushed(__builtin_bit_cast(float, number ? (u + 0x100) & ~0x1ffu : u));
}
inline bool compared(float a, float b, int how) {
  switch (how) {
    case _CMP_EQ_OQ: return a == b;
    case _CMP_LT_OQ: return a < b;
    case _CMP_GE_OQ: return a >= b;
    case _CMP_UNORD_Q: return a != a || b != b;
    case _CMP_NEQ_UQ: return !(a == b);
    default: __builtin_trap();
  }
}
}  // namespace lanes
using namespace lanes;

#define INLINE static inline __attribute__((always_inline))
#define EMULATED [[maybe_unused]] static __attribute__((noinline))  // inlined, units take a compiler minutes
// f(i) for every lane of a result of type V.
template <class V, class R, class Fn> INLINE R each(Fn f) {
  V out;
  constexpr int n = sizeof(V) / sizeof(out[0]);
  for (int i = 0; i < n; i++) out[i] = f(i);
  return (R)out;
}
template <class Fn> INLINE __m512 each_f32(Fn f) { return each<__m512, __m512>(f); }
template <class Fn> INLINE __m512i each_i32(Fn f) { return each<U32, __m512i>(f); }
template <class Fn> INLINE __m512i each_i16(Fn f) { return each<U16, __m512i>(f); }
template <class Fn> INLINE uint32_t mask(int n, Fn f) {
  uint32_t m = 0;
  for (int i = 0; i < n; i++) m |= uint32_t(f(i)) << i;
  return m;
}

// ---- loads and stores ------------------------------------------------------------------------------------------------

template <class V, class E> INLINE V some(uint64_t m, const void* p) {  // lanes that do not count are not read
  V out = {};
  for (int i = 0; i < int(64 / sizeof(E)); i++)
    if (m >> i & 1) {
      E x;
      __builtin_memcpy(&x, static_cast<const char*>(p) + i * sizeof(E), sizeof(E));
      out[i] = x;
    }
  return out;
}
template <class E, class V> INLINE void put_some(void* p, uint64_t m, V x) {
  for (int i = 0; i < int(64 / sizeof(E)); i++)
    if (m >> i & 1) {
      const E e = E(x[i]);
      __builtin_memcpy(static_cast<char*>(p) + i * sizeof(E), &e, sizeof(E));
    }
}
template <class V> INLINE V whole(const void* p) {
  V x;
  __builtin_memcpy(&x, p, 64);
  return x;
}
EMULATED __m512 _mm512_loadu_ps(const void* p) { return whole<__m512>(p); }
EMULATED __m512i _mm512_loadu_si512(const void* p) { return whole<__m512i>(p); }
EMULATED void _mm512_storeu_ps(void* p, __m512 x) { __builtin_memcpy(p, &x, 64); }
EMULATED void _mm512_storeu_si512(void* p, __m512i x) { __builtin_memcpy(p, &x, 64); }
EMULATED void check_aligned(const void* p) {
  if (reinterpret_cast<uintptr_t>(p) % 64) __builtin_trap();  // a processor faults
}
EMULATED void _mm512_stream_ps(void* p, __m512 x) { check_aligned(p), _mm512_storeu_ps(p, x); }
EMULATED void _mm512_stream_si512(void* p, __m512i x) { check_aligned(p), _mm512_storeu_si512(p, x); }
EMULATED __m512 _mm512_maskz_loadu_ps(__mmask16 m, const void* p) { return some<__m512, float>(m, p); }
EMULATED __m512i _mm512_maskz_loadu_epi16(__mmask32 m, const void* p) { return (__m512i)some<U16, uint16_t>(m, p); }
EMULATED __m512i _mm512_maskz_loadu_epi8(__mmask64 m, const void* p) { return (__m512i)some<U8, uint8_t>(m, p); }
EMULATED void _mm512_mask_storeu_ps(void* p, __mmask16 m, __m512 x) { put_some<float>(p, m, x); }
EMULATED void _mm512_mask_storeu_epi16(void* p, __mmask32 m, __m512i x) { put_some<uint16_t>(p, m, (U16)x); }

// ---- constants and casts ---------------------------------------------------------------------------------------------

EMULATED __m512 _mm512_setzero_ps() { return __m512{}; }
EMULATED __m512 _mm512_set1_ps(float x) { return x - __m512{}; }
EMULATED __m512i _mm512_set1_epi16(short x) { return (__m512i)(I16{} + x); }
EMULATED __m512i _mm512_set1_epi32(int x) { return (__m512i)(I32{} + x); }
EMULATED __m512i _mm512_set1_epi64(long long x) { return __m512i{} + x; }
template <class... T> INLINE __m512i _mm512_setr_epi32(T... x) { return (__m512i)I32{int(x)...}; }
template <class... T> INLINE __m512i _mm512_set_epi16(T... x) {
  const I16 turned = {short(x)...};
  return each_i16([&](int i) { return turned[31 - i]; });
}
EMULATED __m512 _mm512_castsi512_ps(__m512i x) { return (__m512)x; }
EMULATED __m512i _mm512_castps_si512(__m512 x) { return (__m512i)x; }
template <class Part, class V> INLINE Part low_part(V x) {
  Part low;
  __builtin_memcpy(&low, &x, sizeof low);
  return low;
}
template <class V, class Part> INLINE V widened(Part x) {  // what is above is undefined: poison
  V out = (V)_mm512_set1_epi32(0x7fedcba9);
  __builtin_memcpy(&out, &x, sizeof x);
  return out;
}
EMULATED __m256i _mm512_castsi512_si256(__m512i x) { return low_part<__m256i>(x); }
EMULATED __m128 _mm512_castps512_ps128(__m512 x) { return low_part<__m128>(x); }
EMULATED __m512i _mm512_castsi256_si512(__m256i x) { return widened<__m512i>(x); }
EMULATED __m512i _mm512_castsi128_si512(__m128i x) { return widened<__m512i>(x); }
EMULATED __m256i _mm512_extracti64x4_epi64(__m512i x, int half) {
  __m256i out;
  __builtin_memcpy(&out, reinterpret_cast<const char*>(&x) + 32 * half, 32);
  return out;
}
EMULATED __m512i _mm512_inserti32x4(__m512i x, __m128i part, int at) {
  __builtin_memcpy(reinterpret_cast<char*>(&x) + 16 * at, &part, 16);
  return x;
}
EMULATED __m512i _mm512_broadcast_i32x4(__m128i x) {
  return each<__m512i, __m512i>([&](int i) { return x[i % 2]; });
}

// ---- arithmetic ------------------------------------------------------------------------------------------------------

EMULATED __m512 _mm512_fmadd_ps(__m512 a, __m512 b, __m512 c) {
  return each_f32([&](int i) { return __builtin_fmaf(a[i], b[i], c[i]); });
}
EMULATED __m512 _mm512_fnmadd_ps(__m512 a, __m512 b, __m512 c) { return _mm512_fmadd_ps(-a, b, c); }
EMULATED __m512 _mm512_max_ps(__m512 a, __m512 b) {
  return each_f32([&](int i) { return a[i] > b[i] ? a[i] : b[i]; });
}
EMULATED __m512 _mm512_min_ps(__m512 a, __m512 b) {
  return each_f32([&](int i) { return a[i] < b[i] ? a[i] : b[i]; });
}
EMULATED __m512 _mm512_sqrt_ps(__m512 a) {
  return each_f32([&](int i) { return __builtin_sqrtf(a[i]); });
}
EMULATED __m512 _mm512_rcp14_ps(__m512 a) {
  return each_f32([&](int i) { return reciprocal(a[i]); });
}
EMULATED __m512 _mm512_roundscale_ps(__m512 a, int how) {
  if (how != (_MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC)) __builtin_trap();
  return each_f32([&](int i) { return __builtin_floorf(a[i]); });
}
EMULATED __m512 _mm512_reduce_ps(__m512 a, int how) {
  if (how != 0x09) __builtin_trap();
  return each_f32([&](int i) { return std::isinf(a[i]) ? 0.f : a[i] - __builtin_floorf(a[i]); });
}
EMULATED __m512 _mm512_scalef_ps(__m512 p, __m512 y) {
  return each_f32([&](int i) { return scaled(p[i], y[i]); });
}
template <class Fn> INLINE float folded(__m512 a, Fn f) {  // halves, then quarters, … as g++ has it
  for (int n = 8; n; n /= 2)
    for (int i = 0; i < n; i++) a[i] = f(a[i], a[i + n]);
  return a[0];
}
EMULATED float _mm512_reduce_add_ps(__m512 a) {
  return folded(a, [](float x, float y) { return x + y; });
}
EMULATED float _mm512_reduce_max_ps(__m512 a) {
  return folded(a, [](float x, float y) { return x > y ? x : y; });
}
EMULATED __m512i _mm512_add_epi32(__m512i a, __m512i b) { return (__m512i)((U32)a + (U32)b); }
EMULATED __m512i _mm512_sub_epi32(__m512i a, __m512i b) { return (__m512i)((U32)a - (U32)b); }
EMULATED __m512i _mm512_sub_epi16(__m512i a, __m512i b) { return (__m512i)((U16)a - (U16)b); }
EMULATED __m512i _mm512_abs_epi16(__m512i a) {
  return each_i16([&](int i) { return uint16_t(((I16)a)[i] < 0 ? -((I16)a)[i] : ((I16)a)[i]); });
}
EMULATED __m512i _mm512_mul_epu32(__m512i a, __m512i b) {
  return (__m512i)(((U64)a & 0xffffffffu) * ((U64)b & 0xffffffffu));
}
EMULATED __m512i _mm512_and_si512(__m512i a, __m512i b) { return a & b; }
EMULATED __m512i _mm512_or_si512(__m512i a, __m512i b) { return a | b; }
EMULATED __m512i _mm512_ternarylogic_epi32(__m512i a, __m512i b, __m512i c, int table) {
  if (table != 0x96) __builtin_trap();
  return a ^ b ^ c;
}
EMULATED __m512i _mm512_slli_epi16(__m512i a, unsigned n) { return n > 15 ? __m512i{} : (__m512i)((U16)a << short(n)); }
EMULATED __m512i _mm512_srli_epi16(__m512i a, unsigned n) { return n > 15 ? __m512i{} : (__m512i)((U16)a >> short(n)); }
EMULATED __m512i _mm512_srai_epi16(__m512i a, unsigned n) { return (__m512i)((I16)a >> short(n > 15 ? 15 : n)); }
EMULATED __m512i _mm512_slli_epi32(__m512i a, unsigned n) { return n > 31 ? __m512i{} : (__m512i)((U32)a << int(n)); }
EMULATED __m512i _mm512_srli_epi32(__m512i a, unsigned n) { return n > 31 ? __m512i{} : (__m512i)((U32)a >> int(n)); }
EMULATED __m512i _mm512_srai_epi32(__m512i a, unsigned n) { return (__m512i)((I32)a >> int(n > 31 ? 31 : n)); }
EMULATED __m512i _mm512_slli_epi64(__m512i a, unsigned n) { return (__m512i)((U64)a << (long long)(n)); }
EMULATED __m512i _mm512_srli_epi64(__m512i a, unsigned n) { return (__m512i)((U64)a >> (long long)(n)); }
EMULATED __m512i _mm512_madd_epi16(__m512i a, __m512i b) {
  const I16 x = (I16)a, y = (I16)b;
  return each_i32([&](int i) { return uint32_t(x[2 * i] * y[2 * i]) + uint32_t(x[2 * i + 1] * y[2 * i + 1]); });
}
EMULATED __m512i _mm512_maddubs_epi16(__m512i a, __m512i b) {  // saturates
  const U8 x = (U8)a;
  const I8 y = (I8)b;
  return each_i16([&](int i) {
    const int sum = x[2 * i] * y[2 * i] + x[2 * i + 1] * y[2 * i + 1];
    return uint16_t(sum > 32767 ? 32767 : sum < -32768 ? -32768 : sum);
  });
}

// ---- masks -----------------------------------------------------------------------------------------------------------

EMULATED __mmask16 _mm512_cmp_ps_mask(__m512 a, __m512 b, int how) {
  return __mmask16(mask(16, [&](int i) { return compared(a[i], b[i], how); }));
}
EMULATED __mmask16 _mm512_cmpeq_epi32_mask(__m512i a, __m512i b) {
  return __mmask16(mask(16, [&](int i) { return ((I32)a)[i] == ((I32)b)[i]; }));
}
EMULATED __mmask16 _mm512_cmpgt_epi32_mask(__m512i a, __m512i b) {
  return __mmask16(mask(16, [&](int i) { return ((I32)a)[i] > ((I32)b)[i]; }));
}
EMULATED __mmask16 _mm512_cmpge_epu32_mask(__m512i a, __m512i b) {
  return __mmask16(mask(16, [&](int i) { return ((U32)a)[i] >= ((U32)b)[i]; }));
}
EMULATED __mmask32 _mm512_cmpgt_epu16_mask(__m512i a, __m512i b) {
  return mask(32, [&](int i) { return ((U16)a)[i] > ((U16)b)[i]; });
}
EMULATED __mmask32 _mm512_test_epi16_mask(__m512i a, __m512i b) {
  return mask(32, [&](int i) { return (((U16)a)[i] & ((U16)b)[i]) != 0; });
}
EMULATED __m512 _mm512_mask_mov_ps(__m512 a, __mmask16 m, __m512 b) {
  return each_f32([&](int i) { return m >> i & 1 ? b[i] : a[i]; });
}
EMULATED __m512 _mm512_maskz_mov_ps(__mmask16 m, __m512 a) { return _mm512_mask_mov_ps(__m512{}, m, a); }
EMULATED __m512 _mm512_mask_fmadd_ps(__m512 a, __mmask16 m, __m512 b, __m512 c) {
  return _mm512_mask_mov_ps(a, m, _mm512_fmadd_ps(a, b, c));
}
EMULATED __m512i _mm512_mask_mov_epi32(__m512i a, __mmask16 m, __m512i b) {
  return each_i32([&](int i) { return m >> i & 1 ? ((U32)b)[i] : ((U32)a)[i]; });
}
EMULATED __m512i _mm512_mask_mov_epi16(__m512i a, __mmask32 m, __m512i b) {
  return each_i16([&](int i) { return m >> i & 1 ? ((U16)b)[i] : ((U16)a)[i]; });
}
EMULATED __m512i _mm512_maskz_mov_epi16(__mmask32 m, __m512i a) { return _mm512_mask_mov_epi16(__m512i{}, m, a); }
EMULATED __m512i _mm512_maskz_compress_epi32(__mmask16 m, __m512i a) {
  U32 out = {};
  for (int i = 0, n = 0; i < 16; i++)
    if (m >> i & 1) out[n++] = ((U32)a)[i];
  return (__m512i)out;
}

#include "emulated_moves.h"  // which ends the namespace
