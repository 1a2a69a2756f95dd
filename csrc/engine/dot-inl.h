// Products of bytes and of bf16 pairs, per instruction set.
//
//   dot4      acc += sum of the four products of unsigned bytes (w) and signed bytes (x) in each 32-bit lane; where
//             kSignedBytes is set w - 128 is multiplied
//   dot4_small  the same for w <= 127
//   Lookup16::of  each byte's low nibble -> table[nibble]
//   spread_bytes  2 L signed bytes -> words
//   Exponents::of each word's low nibble -> exponent of that number, where bf16 has it
//   merge     words: sign and fraction from one, exponent from the other
#pragma once

#if defined(GPTFAST_NEON) && !defined(__ARM_FEATURE_MATMUL_INT8)
constexpr bool kSignedBytes = true;
#else
constexpr bool kSignedBytes = false;
#endif

INL I broadcast4(const void* p) {
  uint32_t w;
  __builtin_memcpy(&w, p, 4);
  return iset(w);
}
INL F low_half(I pair) { return as_float(shl16(pair)); }
INL F high_half(I pair) { return as_float(iand(pair, iset(0xffff0000u))); }

#if defined(GPTFAST_SCALAR)
INL I dot4(I acc, I w, I x) {
  for (int i = 0; i < L; i++)
    for (int b = 0; b < 32; b += 8) acc[i] += (w[i] >> b & 255) * uint32_t(int8_t(x[i] >> b));
  return acc;
}
INL I dot4_small(I acc, I w, I x) { return dot4(acc, w, x); }
struct Lookup16 {
  const uint8_t* table;
  explicit Lookup16(const uint8_t* t) : table(t) {}
  I of(I nibbles) const {
    uint8_t b[4 * L];
    __builtin_memcpy(b, &nibbles, sizeof b);
    for (auto& x : b) x = table[x & 15];
    return iload(b);
  }
};
#elif defined(GPTFAST_NEON)
#include "dot_neon-inl.h"
#elif defined(__AVX512VNNI__)
INL I dot4(I acc, I w, I x) { return _mm512_dpbusd_epi32(acc, w, x); }
INL I dot4_small(I acc, I w, I x) { return _mm512_dpbusd_epi32(acc, w, x); }
#elif defined(__AVX512F__)
INL I dot4(I acc, I w, I x) {  // 255 * 127 * 2 overflows the 16 bits of maddubs: even and odd bytes by themselves
  const I even = _mm512_madd_epi16(iand(w, iset(0x00ff00ffu)), _mm512_srai_epi16(_mm512_slli_epi16(x, 8), 8));
  const I odd = _mm512_madd_epi16(_mm512_srli_epi16(w, 8), _mm512_srai_epi16(x, 8));
  return iadd(acc, iadd(even, odd));
}
INL I dot4_small(I acc, I w, I x) {
  return iadd(acc, _mm512_madd_epi16(_mm512_maddubs_epi16(w, x), _mm512_set1_epi16(1)));
}
#elif defined(__AVX2__)
INL I dot4(I acc, I w, I x) {
  const I even = _mm256_madd_epi16(iand(w, iset(0x00ff00ffu)), _mm256_srai_epi16(_mm256_slli_epi16(x, 8), 8));
  const I odd = _mm256_madd_epi16(_mm256_srli_epi16(w, 8), _mm256_srai_epi16(x, 8));
  return iadd(acc, iadd(even, odd));
}
INL I dot4_small(I acc, I w, I x) {
  return iadd(acc, _mm256_madd_epi16(_mm256_maddubs_epi16(w, x), _mm256_set1_epi16(1)));
}
#endif

#if defined(GPTFAST_SCALAR) || defined(GPTFAST_NEON)
#elif defined(__AVX512F__)
struct Lookup16 {
  const I table;
  explicit Lookup16(const uint8_t* t) : table(_mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)t))) {}
  INL_MEMBER I of(I nibbles) const { return _mm512_shuffle_epi8(table, nibbles); }
};
#else
struct Lookup16 {
  const I table;
  explicit Lookup16(const uint8_t* t) : table(_mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)t))) {}
  INL_MEMBER I of(I nibbles) const { return _mm256_shuffle_epi8(table, nibbles); }
};
#endif

#ifdef GPTFAST_PAIRS
INL F dot_pairs(F acc, I w, I x) { return multiply_pairs(acc, w, x); }
#else
INL F dot_pairs(F acc, I, I) { return acc; }
#endif

INL I merge(I signs_and_fractions, I exponents) { return ior(iand(signs_and_fractions, iset(0x807f807fu)), exponents); }
#if defined(GPTFAST_SCALAR)
INL I spread_bytes(const void* p) {
  I out;
  const int8_t* b = static_cast<const int8_t*>(p);
  for (int i = 0; i < L; i++) out[i] = uint32_t(uint16_t(b[2 * i])) | uint32_t(uint16_t(b[2 * i + 1])) << 16;
  return out;
}
struct Exponents {
  const uint16_t* table;
  explicit Exponents(const char* panel) : table(reinterpret_cast<const uint16_t*>(panel)) {}
  I of(I x) const {
    I out;
    for (int i = 0; i < L; i++) out[i] = uint32_t(table[x[i] & 15]) | uint32_t(table[x[i] >> 16 & 15]) << 16;
    return out;
  }
};
#elif defined(GPTFAST_NEON)
#elif defined(__AVX512F__)
INL I spread_bytes(const void* p) { return _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i*)p)); }
struct Exponents {
  const I table;  // twice: vpermw reads five bits of an index
  explicit Exponents(const char* panel) : table(iload(panel)) {}
  INL_MEMBER I of(I x) const { return _mm512_permutexvar_epi16(x, table); }
};
#else
INL I spread_bytes(const void* p) { return _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)p)); }
struct Exponents {
  I table;  // bytes
  explicit Exponents(const char* panel) {
    const I words = _mm256_srli_epi16(iload(panel), 7);
    table = _mm256_permute4x64_epi64(_mm256_packus_epi16(words, words), 0x88);
  }
  INL_MEMBER I of(I x) const {  // an index with its high bit set gives 0
    return _mm256_slli_epi16(_mm256_shuffle_epi8(table, ior(iand(x, iset(0x000f000fu)), iset(0x80008000u))), 7);
  }
};
#endif
