// Codes of quantised weights as fp32, L at a time: nibbles that index a table, or signed bytes.
#pragma once
#include "nested_scales-inl.h"

alignas(64) static constexpr float kNf4Values[16] = {-1.f,
                                                     -0.6961928009986877f,
                                                     -0.5250730514526367f,
                                                     -0.39491748809814453f,
                                                     -0.28444138169288635f,
                                                     -0.18477343022823334f,
                                                     -0.09105003625154495f,
                                                     0.f,
                                                     0.07958029955625534f,
                                                     0.16093020141124725f,
                                                     0.24611230194568634f,
                                                     0.33791524171829224f,
                                                     0.44070982933044434f,
                                                     0.5626170039176941f,
                                                     0.7229568362236023f,
                                                     1.f};
alignas(64) static constexpr float kInt4Values[16] = {-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7};
alignas(64) static constexpr float kMxfp4Values[16] = {0,    0.5f,  1,  1.5f,  2,  3,  4,  6,
                                                       -0.f, -0.5f, -1, -1.5f, -2, -3, -4, -6};

//   permute       lane i of the result is lane index[i] of x
//   Table::of     the table at the low four bits of each lane
//   spread_bytes  L bytes -> lanes;  spread_signed  the same of signed ones
//   nibbles       the L codes of L / 2 bytes, the first of a pair in the high half (HIGH) or the low; other bits may be set
//   PairTable::of the table in bf16, at the low four bits of each 16;  shr_halves  a shift of each 16 bits
#if defined(GPTFAST_SCALAR)
INL F permute(F x, I index) {
  F r;
  for (int i = 0; i < L; i++) r[i] = x[index[i]];
  return r;
}
struct Table {
  const float* values;
  explicit Table(const float* v) : values(v) {}
  F of(I index) const {
    F r;
    for (int i = 0; i < L; i++) r[i] = values[index[i] & 15];
    return r;
  }
};
INL I spread_bytes(const uint8_t* p) { return I{p[0], p[1], p[2], p[3]}; }
INL I spread_signed(const uint8_t* p) { return sra(shl(spread_bytes(p), 24), 24); }
template <bool HIGH> INL I nibbles(const uint8_t* p) {
  constexpr int first = HIGH ? 4 : 0, second = 4 - first;
  return I{uint32_t(p[0] >> first), uint32_t(p[0] >> second), uint32_t(p[1] >> first), uint32_t(p[1] >> second)};
}
#elif defined(GPTFAST_NEON)
// The bytes of word i, for i in the low four bits of each lane.
INL uint8x16_t word_bytes(I index) {
  return vreinterpretq_u8_u32(vmlaq_u32(iset(0x03020100u), vandq_u32(index, iset(15)), iset(0x04040404u)));
}
INL F permute(F x, I index) { return vreinterpretq_f32_u8(vqtbl1q_u8(vreinterpretq_u8_f32(x), word_bytes(index))); }
struct Table {
  uint8x16x4_t bytes;
  INL_MEMBER explicit Table(const float* v) {
    for (int i = 0; i < 4; i++) bytes.val[i] = vreinterpretq_u8_f32(vld1q_f32(v + 4 * i));
  }
  INL_MEMBER F of(I index) const { return vreinterpretq_f32_u8(vqtbl4q_u8(bytes, word_bytes(index))); }
};
#ifdef GPTFAST_PAIRS
struct PairTable {
  uint8x16x2_t bytes;
  INL_MEMBER explicit PairTable(const Table& t) {
    for (int i = 0; i < 2; i++)
      bytes.val[i] = vreinterpretq_u8_u32(
          join_bf16(vreinterpretq_f32_u8(t.bytes.val[2 * i]), vreinterpretq_f32_u8(t.bytes.val[2 * i + 1])));
  }
  INL_MEMBER I of(I index) const {
    const uint16x8_t i = vandq_u16(vreinterpretq_u16_u32(index), vdupq_n_u16(15));
    const uint16x8_t both = vmlaq_u16(vdupq_n_u16(0x0100), i, vdupq_n_u16(0x0202));
    return vreinterpretq_u32_u8(vqtbl2q_u8(bytes, vreinterpretq_u8_u16(both)));
  }
};
INL I shr_halves(I a, int n) { return vreinterpretq_u32_u16(vreinterpretq_u16_u32(a) >> vdupq_n_u16(uint16_t(n))); }
#endif
INL I four_bytes(const uint8_t* p) {
  uint32_t four;
  __builtin_memcpy(&four, p, 4);
  return iset(four);
}
INL I spread_bytes(const uint8_t* p) {
  return vmovl_u16(vget_low_u16(vmovl_u8(vget_low_u8(vreinterpretq_u8_u32(four_bytes(p))))));
}
INL I spread_signed(const uint8_t* p) {
  const int16x8_t words = vmovl_s8(vget_low_s8(vreinterpretq_s8_u32(four_bytes(p))));
  return vreinterpretq_u32_s32(vmovl_s16(vget_low_s16(words)));
}
template <bool HIGH> INL I nibbles(const uint8_t* p) {
  uint16_t two;
  __builtin_memcpy(&two, p, 2);
  return vshlq_u32(iset(two), HIGH ? int32x4_t{-4, 0, -12, -8} : int32x4_t{0, -4, -8, -12});
}
#elif defined(__AVX512F__)
INL F permute(F x, I index) { return _mm512_permutexvar_ps(index, x); }
struct Table {
  F values;
  INL_MEMBER explicit Table(const float* v) : values(load(v)) {}
  INL_MEMBER F of(I index) const { return permute(values, index); }
};
#ifdef GPTFAST_PAIRS
struct PairTable {  // twice: five bits of an index are read
  I values;
  INL_MEMBER explicit PairTable(const Table& t) : values(join_bf16(t.values, t.values)) {}
  INL_MEMBER I of(I index) const { return _mm512_permutexvar_epi16(index, values); }
};
INL I shr_halves(I a, int n) { return _mm512_srli_epi16(a, unsigned(n)); }
#endif
INL I spread_bytes(const uint8_t* p) { return _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p)); }
INL I spread_signed(const uint8_t* p) { return _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)); }
template <bool HIGH> INL I nibbles(const uint8_t* p) {
  const I bytes = _mm512_cvtepu8_epi64(_mm_loadl_epi64((const __m128i*)p));
  if constexpr (HIGH) return ior(_mm512_slli_epi64(bytes, 32), _mm512_srli_epi64(bytes, 4));
  else return ior(_mm512_slli_epi64(bytes, 28), bytes);
}
#else
INL F permute(F x, I index) { return _mm256_permutevar8x32_ps(x, index); }
struct Table {
  F low, high;
  INL_MEMBER explicit Table(const float* v) : low(load(v)), high(load(v + 8)) {}
  INL_MEMBER F of(I index) const {
    return _mm256_blendv_ps(permute(low, index), permute(high, index), as_float(shl(index, 28)));
  }
};
INL I spread_bytes(const uint8_t* p) { return _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p)); }
INL I spread_signed(const uint8_t* p) { return _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)); }
template <bool HIGH> INL I nibbles(const uint8_t* p) {
  uint32_t four;
  __builtin_memcpy(&four, p, 4);
  const I bytes = _mm256_cvtepu8_epi64(_mm_cvtsi32_si128(int(four)));
  if constexpr (HIGH) return ior(_mm256_slli_epi64(bytes, 32), _mm256_srli_epi64(bytes, 4));
  else return ior(_mm256_slli_epi64(bytes, 28), bytes);
}
#endif

INL const float* values_of(Codes format) {
  return format == Codes::nf4 ? kNf4Values : format == Codes::mxfp4 ? kMxfp4Values : kInt4Values;
}
// 2^(x - 127) of bytes in 32 bits: 0 gives a subnormal number, 255 nan.
INL F power_of_two(I x) {
  const I bits = iselect(ieq(x, iset(0)), iset(0x00400000u), shl(x, 23));
  return as_float(iselect(ieq(x, iset(255)), iset(0x7fc00000u), bits));
}
// n scales of an output from a group on, as fp32.
INL void copy_scales(float* out, const QuantizedMatrix& w, i64 output, i64 group, i64 n) {
  if (w.nested) return copy_nested(out, w, output * w.scales.stride + group, n);
  if (w.format != Codes::mxfp4)
    return copy_row(out, at(row(w.scales, output), w.scales.dtype, group), w.scales.dtype, n);
  for_lanes(n, [&](i64 c, i64 m) __attribute__((always_inline)) {
    const uint8_t* from = static_cast<const uint8_t*>(w.scales.data) + output * w.scales.stride + group + c;
    uint8_t bytes[L] = {};
    __builtin_memcpy(bytes, from, size_t(m));
    store_lanes(out + c, power_of_two(spread_bytes(bytes)), m);
  });
}

// L values from value k of a row on: bytes, or nibbles. k is a multiple of L.
struct Bytes {
  static constexpr int kPerLane = 4;  // codes in 32 bits
  explicit Bytes(Codes) {}
  INL_MEMBER F load(const uint8_t* row, i64 k) const { return to_float_signed(spread_signed(row + k)); }
  // Code j of each 32 bits.
  INL_MEMBER F part(I words, int j) const { return to_float_signed(sra(shl(words, 24 - 8 * j), 24)); }
  static constexpr int place(int j) { return j; }
#ifdef GPTFAST_PAIRS
  INL_MEMBER I pairs(const uint8_t* row, i64 k, F scale) const {
    const F first = load(row, k) * scale;
    return join_bf16(first, load(row, k + L) * scale);
  }
#endif
};
template <bool HIGH> struct NibblePairs {  // the first of a pair in the high half, or the low
  static constexpr int kPerLane = 8;
  const Table table;
#ifdef GPTFAST_PAIRS
  const PairTable pair_table;
  INL_MEMBER explicit NibblePairs(Codes format) : table(values_of(format)), pair_table(table) {}
  // Codes j of each 16 bits, rounded to bf16.
  INL_MEMBER I pair_part(I words, int j) const { return pair_table.of(shr_halves(words, 4 * j)); }
#else
  INL_MEMBER explicit NibblePairs(Codes format) : table(values_of(format)) {}
#endif
  INL_MEMBER F load(const uint8_t* row, i64 k) const { return table.of(nibbles<HIGH>(row + k / 2)); }
  INL_MEMBER F part(I words, int j) const { return table.of(shr(words, 4 * j)); }
  static constexpr int place(int j) { return HIGH ? j ^ 1 : j; }
#ifdef GPTFAST_PAIRS
  // 2 L values from k on, rounded to bf16.
  INL_MEMBER I pairs(const uint8_t* row, i64 k, F scale) const {
    const I bytes = spread_bytes(row + k / 2);
    const F high = table.of(shr(bytes, 4)) * scale, low = table.of(bytes) * scale;
    return HIGH ? pair_bf16(high, low) : pair_bf16(low, high);
  }
#endif
};
using Nibbles = NibblePairs<true>;
using LowNibbles = NibblePairs<false>;

template <class Fn> INL void with_codes(Codes format, Fn f) {
  if (format == Codes::int8) f(Bytes(format));
  else if (format == Codes::mxfp4) f(LowNibbles(format));
  else f(Nibbles(format));
}
