// Codes of quantised weights as numbers, on their way from 16-byte loads to products. A word is 32 bits of a row of codes: four
// of int8, or eight of 4 bits, the first of a pair in the high half of its byte, of mxfp4 in the low half.
#pragma once
#include "bits.cuh"
#include "common.cuh"
#include "mma.cuh"
#include "quantized_linear.h"

namespace gptfast::cuda {

// f(Format<F>{}) with the format of `codes`.
template <Codes F> struct Format {
  static constexpr Codes value = F;
};
template <class F> cudaError_t with_codes(Codes codes, F f) {
  switch (codes) {
    case Codes::int8: return f(Format<Codes::int8>{});
    case Codes::int4: return f(Format<Codes::int4>{});
    case Codes::mxfp4: return f(Format<Codes::mxfp4>{});
    default: return f(Format<Codes::nf4>{});
  }
}

template <Codes F> constexpr int kCodesOfWord = F == Codes::int8 ? 4 : 8;

DEV_INLINE uint32_t word_at(const uint4& x, int i) { return i == 0 ? x.x : i == 1 ? x.y : i == 2 ? x.z : x.w; }

// NormalFloat of 4 bits (gptfast/_nf4.py).
DEV_INLINE float nf4_value(int code) {
  constexpr float values[16] = {-1.f,
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
  return values[code];
}
// e2m1 (gptfast/_mxfp4.py).
DEV_INLINE float mxfp4_value(int code) {
  constexpr float values[8] = {0.f, 0.5f, 1.f, 1.5f, 2.f, 3.f, 4.f, 6.f};
  return code < 8 ? values[code] : -values[code - 8];
}

// ---- tables in shared memory: a copy for each lane, so that no two lanes meet in a bank ------------------------------

// Whether decoding as T looks numbers up.
template <class T, Codes F> constexpr bool kLooksUp = F == Codes::nf4 || (F == Codes::mxfp4 && sizeof(T) == 4);

// What decoding as T needs. The table: of single codes, as fp32; of bytes, as pairs of T.
template <class T> struct Decoder {
  static constexpr int ENTRIES = sizeof(T) == 4 ? 16 : 256, BYTES = ENTRIES * 128;
  const char* table;
  uint32_t lane = threadIdx.x % 32 * 4;
  template <Codes F> static DEV_INLINE void fill(char* table) {
    uint32_t* words = reinterpret_cast<uint32_t*>(table);
    for (int i = int(threadIdx.x); i < ENTRIES * 32; i += int(blockDim.x)) {
      const int entry = i / 32;
      if constexpr (sizeof(T) == 4) words[i] = __float_as_uint(F == Codes::nf4 ? nf4_value(entry) : mxfp4_value(entry));
      else words[i] = pair<T>(nf4_value(entry / 16), nf4_value(entry % 16));
    }
  }
  // The entry whose number stands in `word` from bit BIT on.
  template <int BIT> DEV_INLINE uint32_t entry(uint32_t word) const {
    constexpr uint32_t bits = (ENTRIES - 1) * 128;
    const uint32_t at = ((BIT < 7 ? word << (7 - BIT) : word >> (BIT - 7)) & bits) | lane;
    return *reinterpret_cast<const uint32_t*>(table + at);
  }
};

// ---- a word as numbers, in the order of their columns ------------------------------------------------------------------

// As fp32, exactly.
template <Codes F>
DEV_INLINE void word_values(uint32_t word, [[maybe_unused]] const Decoder<float>& decoder,
                            float (&x)[kCodesOfWord<F>]) {
  if constexpr (F == Codes::int8) {
    const uint32_t biased = word ^ 0x80808080u;  // the last bits of 2^23 + 128 + code
#pragma unroll
    for (int i = 0; i < 4; i++)
      x[i] = __uint_as_float(pick_bytes(biased, 0x4b000000u, 0x7440u | unsigned(i))) - 8388736.f;
  } else if constexpr (F == Codes::int4) {
#pragma unroll
    for (int i = 0; i < 8; i++) x[i] = __uint_as_float(masked_with(word >> (i ^ 1) * 4, 15u, 0x4b000000u)) - 8388616.f;
  } else if constexpr (F == Codes::mxfp4) {
    x[0] = __uint_as_float(decoder.entry<0>(word)), x[1] = __uint_as_float(decoder.entry<4>(word));
    x[2] = __uint_as_float(decoder.entry<8>(word)), x[3] = __uint_as_float(decoder.entry<12>(word));
    x[4] = __uint_as_float(decoder.entry<16>(word)), x[5] = __uint_as_float(decoder.entry<20>(word));
    x[6] = __uint_as_float(decoder.entry<24>(word)), x[7] = __uint_as_float(decoder.entry<28>(word));
  } else {
    x[0] = __uint_as_float(decoder.entry<4>(word)), x[1] = __uint_as_float(decoder.entry<0>(word));
    x[2] = __uint_as_float(decoder.entry<12>(word)), x[3] = __uint_as_float(decoder.entry<8>(word));
    x[4] = __uint_as_float(decoder.entry<20>(word)), x[5] = __uint_as_float(decoder.entry<16>(word));
    x[6] = __uint_as_float(decoder.entry<28>(word)), x[7] = __uint_as_float(decoder.entry<24>(word));
  }
}

// f of pairs of T that lie in words.
template <class T, class Fn> DEV_INLINE uint32_t with_pairs(uint32_t a, uint32_t b, Fn f) {
  using Pair = std::conditional_t<std::is_same_v<T, bf16>, bf162, __half2>;
  const Pair d = f(*reinterpret_cast<const Pair*>(&a), *reinterpret_cast<const Pair*>(&b));
  return *reinterpret_cast<const uint32_t*>(&d);
}
template <class T> DEV_INLINE uint32_t minus(uint32_t a, uint32_t b) {
  return with_pairs<T>(a, b, [](auto x, auto y) { return __hsub2(x, y); });
}
template <class T> DEV_INLINE uint32_t times(uint32_t a, uint32_t b) {
  return with_pairs<T>(a, b, [](auto x, auto y) { return __hmul2(x, y); });
}
// The numbers of MXFP4 as pairs of T, exactly: signs and the last bits of exponents, times 2^126 or 2^14. 0.5 is subnormal before.
template <class T> DEV_INLINE void mxfp4_pairs(uint32_t word, uint32_t (&x)[4]) {
  constexpr bool BF16 = std::is_same_v<T, bf16>;
  constexpr uint32_t sizes = BF16 ? 0x01c001c0u : 0x0e000e00u, factor = BF16 ? 0x7e807e80u : 0x74007400u;
  const uint32_t high = word >> 4;
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const uint32_t both = pick_bytes(word, high, 0x0400u + unsigned(i) * 0x0101u);
    x[i] = times<T>((both << 12 & 0x80008000u) | (both << (BF16 ? 6 : 9) & sizes), factor);
  }
}
// As pairs of 16 bits: NF4 rounded, all others exactly.
template <class T, Codes F>
DEV_INLINE void word_pairs(uint32_t word, [[maybe_unused]] const Decoder<T>& decoder,
                           uint32_t (&x)[kCodesOfWord<F> / 2]) {
  // numbers whose last bits are whole: 128 + 0 … 127 and 1024 + 0 … 1023
  constexpr uint32_t base = std::is_same_v<T, bf16> ? 0x43004300u : 0x64006400u;
  if constexpr (F == Codes::int8) {  // the low seven bits less 128 times the sign
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const uint32_t both = pick_bytes(word, 0, 0x4140u + unsigned(i) * 0x0202u);
      x[i] = minus<T>(masked_with(both, 0x007f007fu, base), masked_with(both, 0x00800080u, base));
    }
  } else if constexpr (F == Codes::int4) {
    const uint32_t high = word >> 4;
    constexpr uint32_t eight = std::is_same_v<T, bf16> ? 0x43084308u : 0x64086408u;
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const uint32_t both = pick_bytes(high, word, 0x0400u + unsigned(i) * 0x0101u);
      x[i] = minus<T>(masked_with(both, 0x000f000fu, base), eight);
    }
  } else if constexpr (F == Codes::mxfp4) {
    mxfp4_pairs<T>(word, x);
  } else {
    x[0] = decoder.template entry<0>(word), x[1] = decoder.template entry<8>(word);
    x[2] = decoder.template entry<16>(word), x[3] = decoder.template entry<24>(word);
  }
}

// ---- scales, as they lie in memory until they are used -------------------------------------------------------------------

template <Codes F> DEV_INLINE int scale_bytes(const PackedWeight& w) {
  return F == Codes::mxfp4 ? 1 : w.scale_dtype == DType::f32 ? 4 : 2;
}
template <Codes F> DEV_INLINE uint32_t scale_bits(const PackedWeight& w, const void* scales, i64 number) {
  if constexpr (F == Codes::mxfp4) return static_cast<const uint8_t*>(scales)[number];
  else if (w.scale_dtype == DType::f32) return static_cast<const uint32_t*>(scales)[number];
  else return static_cast<const uint16_t*>(scales)[number];
}
template <Codes F, int COUNT>
DEV_INLINE void scale_values(float (&x)[COUNT], const PackedWeight& w, const uint32_t (&bits)[COUNT]) {
  if constexpr (F == Codes::mxfp4) {
#pragma unroll
    for (int i = 0; i < COUNT; i++)  // 2^(bits - 127), the least of which is subnormal; 255 is nan
      x[i] = __uint_as_float(bits[i] << 23 | (((bits[i] + 1) & 255u) < 2 ? 1u << 22 : 0u));
  } else if (w.scale_dtype == DType::f32) {
#pragma unroll
    for (int i = 0; i < COUNT; i++) x[i] = __uint_as_float(bits[i]);
  } else if (w.scale_dtype == DType::f16) {
#pragma unroll
    for (int i = 0; i < COUNT; i++) x[i] = __half2float(__ushort_as_half(uint16_t(bits[i])));
  } else {
#pragma unroll
    for (int i = 0; i < COUNT; i++) x[i] = __uint_as_float(bits[i] << 16);
  }
}

}  // namespace gptfast::cuda
