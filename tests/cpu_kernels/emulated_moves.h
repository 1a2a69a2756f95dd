// The rest of emulated_avx512.h: lanes that change places or types, and products of bytes and of pairs of bf16.
#pragma once

// ---- places ----------------------------------------------------------------------------------------------------------

// Within each 128 bits, or quarter.
EMULATED __m512i _mm512_unpacklo_epi16(__m512i a, __m512i b) {
  return each_i16([&](int i) { return (i % 2 ? (U16)b : (U16)a)[i / 8 * 8 + i % 8 / 2]; });
}
EMULATED __m512i _mm512_unpackhi_epi16(__m512i a, __m512i b) {
  return each_i16([&](int i) { return (i % 2 ? (U16)b : (U16)a)[i / 8 * 8 + 4 + i % 8 / 2]; });
}
EMULATED __m512i _mm512_unpacklo_epi32(__m512i a, __m512i b) {
  return each_i32([&](int i) { return (i % 2 ? (U32)b : (U32)a)[i / 4 * 4 + i % 4 / 2]; });
}
EMULATED __m512i _mm512_unpackhi_epi32(__m512i a, __m512i b) {
  return each_i32([&](int i) { return (i % 2 ? (U32)b : (U32)a)[i / 4 * 4 + 2 + i % 4 / 2]; });
}
EMULATED __m512i _mm512_unpacklo_epi64(__m512i a, __m512i b) {
  return each<__m512i, __m512i>([&](int i) { return i % 2 ? b[i - 1] : a[i]; });
}
EMULATED __m512i _mm512_unpackhi_epi64(__m512i a, __m512i b) {
  return each<__m512i, __m512i>([&](int i) { return i % 2 ? b[i] : a[i + 1]; });
}
EMULATED __m512 _mm512_permute_ps(__m512 a, int how) {
  return each_f32([&](int i) { return a[i / 4 * 4 + (how >> i % 4 * 2 & 3)]; });
}
EMULATED __m512i _mm512_mask_shuffle_epi32(__m512i from, __mmask16 m, __m512i a, int how) {
  return each_i32([&](int i) { return m >> i & 1 ? ((U32)a)[i / 4 * 4 + (how >> i % 4 * 2 & 3)] : ((U32)from)[i]; });
}
EMULATED __m512i _mm512_shuffle_epi8(__m512i a, __m512i places) {
  return each<U8, __m512i>([&](int i) {
    const uint8_t place = ((U8)places)[i];
    return place & 0x80 ? uint8_t(0) : ((U8)a)[i / 16 * 16 + place % 16];
  });
}
// Of whole quarters, or over all lanes.
EMULATED __m512i _mm512_shuffle_i32x4(__m512i a, __m512i b, int how) {
  return each_i32([&](int i) { return (i < 8 ? (U32)a : (U32)b)[(how >> i / 4 * 2 & 3) * 4 + i % 4]; });
}
EMULATED __m512 _mm512_shuffle_f32x4(__m512 a, __m512 b, int how) {
  return (__m512)_mm512_shuffle_i32x4((__m512i)a, (__m512i)b, how);
}
EMULATED __m512 _mm512_permutexvar_ps(__m512i places, __m512 a) {
  return each_f32([&](int i) { return a[((U32)places)[i] % 16]; });
}
EMULATED __m512i _mm512_permutexvar_epi16(__m512i places, __m512i a) {
  return each_i16([&](int i) { return ((U16)a)[((U16)places)[i] % 32]; });
}
EMULATED __m512 _mm512_permutex2var_ps(__m512 a, __m512i places, __m512 b) {
  return each_f32([&](int i) { return (((U32)places)[i] & 16 ? b : a)[((U32)places)[i] % 16]; });
}
EMULATED __m512i _mm512_permutex2var_epi16(__m512i a, __m512i places, __m512i b) {
  return each_i16([&](int i) { return (((U16)places)[i] & 32 ? (U16)b : (U16)a)[((U16)places)[i] % 32]; });
}

// ---- types -----------------------------------------------------------------------------------------------------------

EMULATED __m512 _mm512_cvtepi32_ps(__m512i a) {
  return each_f32([&](int i) { return float(((I32)a)[i]); });
}
EMULATED __m512 _mm512_cvtepu32_ps(__m512i a) {
  return each_f32([&](int i) { return float(((U32)a)[i]); });
}
EMULATED __m512i _mm512_cvtepu16_epi32(__m256i a) {
  return each_i32([&](int i) { return uint32_t(((HalfU16)a)[i]); });
}
EMULATED __m512i _mm512_cvtepi8_epi16(__m256i a) {
  return each_i16([&](int i) { return uint16_t(((HalfI8)a)[i]); });
}
EMULATED __m512i _mm512_cvtepu8_epi16(__m256i a) {
  return each_i16([&](int i) { return uint16_t(((HalfU8)a)[i]); });
}
EMULATED __m512i _mm512_cvtepi8_epi32(__m128i a) {
  return each_i32([&](int i) { return uint32_t(((QuarterI8)a)[i]); });
}
EMULATED __m512i _mm512_cvtepu8_epi32(__m128i a) {
  return each_i32([&](int i) { return uint32_t(((QuarterU8)a)[i]); });
}
EMULATED __m512i _mm512_cvtepu8_epi64(__m128i a) {
  return each<__m512i, __m512i>([&](int i) { return ((QuarterU8)a)[i]; });
}
EMULATED __m256i _mm512_cvtepi32_epi16(__m512i a) {
  return each<HalfU16, __m256i>([&](int i) { return uint16_t(((U32)a)[i]); });
}
EMULATED __m128i _mm512_cvtepi32_epi8(__m512i a) {
  return each<QuarterU8, __m128i>([&](int i) { return uint8_t(((U32)a)[i]); });
}
EMULATED __m512 _mm512_cvtph_ps(__m256i a) {
  __m512 out;
  const __m256 low = _mm256_cvtph_ps(_mm256_castsi256_si128(a)), high = _mm256_cvtph_ps(_mm256_extracti128_si256(a, 1));
  __builtin_memcpy(&out, &low, 32);
  __builtin_memcpy(reinterpret_cast<char*>(&out) + 32, &high, 32);
  return out;
}
EMULATED __m256i _mm512_cvtps_ph(__m512 a, int how) {
  if (how != (_MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)) __builtin_trap();
  __m256 low, high;
  __builtin_memcpy(&low, &a, 32);
  __builtin_memcpy(&high, reinterpret_cast<const char*>(&a) + 32, 32);
  constexpr int nearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return _mm256_set_m128i(_mm256_cvtps_ph(high, nearest), _mm256_cvtps_ph(low, nearest));
}

// ---- VNNI and BF16 ---------------------------------------------------------------------------------------------------

#ifdef GPTFAST_EMULATED_BF16
EMULATED __m512i _mm512_dpbusd_epi32(__m512i sum, __m512i a, __m512i b) {
  return each_i32([&](int i) {
    uint32_t s = ((U32)sum)[i];
    for (int k = 4 * i; k < 4 * i + 4; k++) s += uint32_t(int(((U8)a)[k]) * int(((I8)b)[k]));
    return s;
  });
}
// The odd pair is added first; each sum is rounded, and 0 below the smallest normal number, as are the inputs.
EMULATED __m512 _mm512_dpbf16_ps(__m512 sum, __m512bh a, __m512bh b) {
  return each_f32([&](int i) {
    const auto x = [&](int k) { return bf16_value(uint16_t(a[k])); };
    const auto y = [&](int k) { return bf16_value(uint16_t(b[k])); };
    const float odd = flushed(__builtin_fmaf(x(2 * i + 1), y(2 * i + 1), flushed(sum[i])));
    return flushed(__builtin_fmaf(x(2 * i), y(2 * i), odd));
  });
}
EMULATED __m256bh _mm512_cvtneps_pbh(__m512 a) {
  return each<HalfU16, __m256bh>([&](int i) { return bf16_of(a[i]); });
}
EMULATED __m512bh _mm512_cvtne2ps_pbh(__m512 high, __m512 low) {
  return each<U16, __m512bh>([&](int i) { return bf16_of(i < 16 ? low[i] : high[i - 16]); });
}
#endif
}  // namespace
