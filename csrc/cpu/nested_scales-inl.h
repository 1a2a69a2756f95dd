// Doubly quantised scales: bytes that stand for 256 values of 8 bits, whose leading zeros are a decimal exponent (Dettmers, arXiv
// 1511.04561; DYNAMIC_VALUES in gptfast/_nf4.py), with a scale of their own for each 256 of them, around an offset.
//
// Floor: a byte a scale; on AVX-512 some 20 instructions for 32 scales, which 2048 codes or more share.
#pragma once

// Values 127 to 254; the values of 126 to 0 are those of 128 to 254, negative, and that of 255 is 1.
constexpr float kDynamicHalf[128] = {
    0.f,          5.5000004e-7f,  3.2500002e-6f,  7.75e-6f,       2.1249998e-5f,  4.375e-5f,     6.625e-5f,
    8.875e-5f,    0.00015625001f, 0.00026875004f, 0.00038125002f, 0.00049375003f, 0.0006062501f, 0.00071875006f,
    0.00083125f,  0.0009437501f,  0.0012812499f,  0.00184375f,    0.00240625f,    0.00296875f,   0.0035312497f,
    0.00409375f,  0.0046562497f,  0.0052187503f,  0.00578125f,    0.00634375f,    0.00690625f,   0.00746875f,
    0.00803125f,  0.00859375f,    0.009156249f,   0.00971875f,    0.01140625f,    0.01421875f,   0.01703125f,
    0.019843752f, 0.02265625f,    0.02546875f,    0.028281251f,   0.03109375f,    0.03390625f,   0.036718752f,
    0.03953125f,  0.042343747f,   0.04515625f,    0.04796875f,    0.05078125f,    0.05359375f,   0.05640625f,
    0.059218753f, 0.06203125f,    0.06484375f,    0.067656256f,   0.070468746f,   0.07328125f,   0.07609375f,
    0.07890625f,  0.08171876f,    0.08453125f,    0.08734375f,    0.09015625f,    0.092968754f,  0.09578126f,
    0.09859375f,  0.107031256f,   0.12109375f,    0.13515624f,    0.14921875f,    0.16328125f,   0.17734376f,
    0.19140625f,  0.20546874f,    0.21953125f,    0.23359375f,    0.24765624f,    0.26171875f,   0.27578127f,
    0.28984374f,  0.30390626f,    0.31796873f,    0.33203125f,    0.34609374f,    0.36015624f,   0.37421876f,
    0.38828123f,  0.40234375f,    0.41640624f,    0.43046874f,    0.44453126f,    0.45859373f,   0.47265625f,
    0.4867187f,   0.50078124f,    0.5148437f,     0.5289062f,     0.54296875f,    0.5570313f,    0.5710938f,
    0.58515626f,  0.5992187f,     0.61328125f,    0.6273438f,     0.6414063f,     0.65546876f,   0.6695312f,
    0.68359375f,  0.6976563f,     0.7117188f,     0.72578126f,    0.7398437f,     0.75390625f,   0.7679688f,
    0.78203124f,  0.79609376f,    0.8101562f,     0.82421875f,    0.8382813f,     0.85234374f,   0.86640626f,
    0.8804687f,   0.89453125f,    0.9085938f,     0.92265624f,    0.93671876f,    0.9507812f,    0.96484375f,
    0.9789063f,   0.99296874f,
};
struct DynamicValues {
  float of[256] = {};
  constexpr DynamicValues() {
    for (int i = 0; i < 128; i++) of[127 + i] = kDynamicHalf[i];
    for (int i = 1; i < 128; i++) of[127 - i] = -kDynamicHalf[i];
    of[255] = 1.f;
  }
};
static constexpr DynamicValues kDynamic;

// A product that does not become part of a multiply-add: a scale has the bits of PyTorch's two operations.
INL F rounded(F product) {
  __asm__("" : IN_VECTOR(product));
  return product;
}

#ifdef __AVX512F__
// The low and the high 16 bits of kDynamicHalf.
struct DynamicHalves {
  uint16_t low[128] = {}, high[128] = {};
  constexpr DynamicHalves() {
    for (int i = 0; i < 128; i++) {
      const uint32_t bits = __builtin_bit_cast(uint32_t, kDynamicHalf[i]);
      low[i] = uint16_t(bits), high[i] = uint16_t(bits >> 16);
    }
  }
};
alignas(64) static constexpr DynamicHalves kDynamicHalves;

// The values of 32 bytes, as two vectors: by look-ups in 64 words, as a gather takes a load a value.
struct DynamicTable {
  I low[4], high[4];
  INL_MEMBER DynamicTable() {
    UNROLL_FOR (int i = 0; i < 4; i++) {
      low[i] = iload(kDynamicHalves.low + 32 * i);
      high[i] = iload(kDynamicHalves.high + 32 * i);
    }
  }
  static INL_MEMBER I find(const I* values, I place, __mmask32 upper) {
    return _mm512_mask_mov_epi16(_mm512_permutex2var_epi16(values[0], place, values[1]), upper,
                                 _mm512_permutex2var_epi16(values[2], place, values[3]));
  }
  INL_MEMBER void of(I bytes, F& first, F& second) const {
    // in the order in which interleaved words are neighbours
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    const I codes = _mm512_cvtepu8_epi16(_mm256_permutevar8x32_epi32(_mm512_castsi512_si256(bytes), order));
    const I from_zero = _mm512_sub_epi16(codes, _mm512_set1_epi16(127)), place = _mm512_abs_epi16(from_zero);
    const __mmask32 upper = _mm512_test_epi16_mask(place, _mm512_set1_epi16(64));
    const __mmask32 one = _mm512_test_epi16_mask(place, _mm512_set1_epi16(128));
    const I sign = _mm512_and_si512(from_zero, _mm512_set1_epi16(int16_t(0x8000)));
    const I top = _mm512_mask_mov_epi16(find(high, place, upper), one, _mm512_set1_epi16(0x3f80));
    const I bottom = find(low, place, upper), signed_top = _mm512_or_si512(top, sign);
    first = as_float(_mm512_unpacklo_epi16(bottom, signed_top));
    second = as_float(_mm512_unpackhi_epi16(bottom, signed_top));
  }
};
// out[i] = the value of codes[i] * scale + offset, for n bytes.
INL void widen_nested(float* out, const uint8_t* codes, i64 n, F scale, F offset) {
  const DynamicTable table;
  F first, second;
  i64 i = 0;
  for (; i + 32 <= n; i += 32) {
    table.of(_mm512_castsi256_si512(_mm256_loadu_si256((const __m256i*)(codes + i))), first, second);
    store(out + i, rounded(first * scale) + offset);
    store(out + i + L, rounded(second * scale) + offset);
  }
  if (i == n) return;
  table.of(_mm512_maskz_loadu_epi8((1u << (n - i)) - 1, codes + i), first, second);
  store_lanes(out + i, rounded(first * scale) + offset, lanes_of(n - i));
  if (n - i > L) store_lanes(out + i + L, rounded(second * scale) + offset, n - i - L);
}
#else
INL void widen_nested(float* out, const uint8_t* codes, i64 n, F scale, F offset) {
  for_lanes(n, [&](i64 c, i64 m) __attribute__((always_inline)) {
    alignas(64) float values[L] = {};
    for (i64 i = 0; i < m; i++) values[i] = kDynamic.of[codes[c + i]];
    store_lanes(out + c, rounded(load(values) * scale) + offset, m);
  });
}
#endif

// n doubly quantised scales from number `first` of the whole weight on, as fp32.
COLD void copy_nested(float* out, const QuantizedMatrix& w, i64 first, i64 n) {
  const uint8_t* codes = static_cast<const uint8_t*>(w.scales.data);
  for (i64 i = first, last; i < first + n; i = last) {
    const i64 block = i / kNestedBlock;
    last = (block + 1) * kNestedBlock < first + n ? (block + 1) * kNestedBlock : first + n;
    widen_nested(out + i - first, codes + i, last - i, set(w.nested[block]), set(w.offset));
  }
}
