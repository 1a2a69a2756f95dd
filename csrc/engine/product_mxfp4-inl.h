// Products with MXFP4 as it lies in a checkpoint (format.h): 16 bytes of each of L outputs are loaded and turned in registers, so
// that a vector holds a word of each. Levels are bytes, 12 more than the values doubled, and activations bytes in the order of the
// nibbles, so sums of a group are exact integers, and each output is summed in one order, as in byte_tile-inl.h.
//
// With one row the floor is the read of the blocks, a panel of which is asked for while the one before is multiplied: its rows lie
// far apart. Several rows read a panel that is unpacked first.
#include "byte_tile-inl.h"

constexpr LevelTable kMxfp4Bytes(Format::mxfp4, kMxfp4);
constexpr i64 kBlock = 16;        // bytes of 32 codes
constexpr i64 kScaleGroups = 16;  // groups whose scales are turned together
constexpr int kBlockVectors = L == 4 ? 4 : 2;

// r[w] lane i: word w of the 16 bytes at `p` + i `step`.
INL void words_of_rows(const uint8_t* p, i64 step, I r[4]) {
#if defined(GPTFAST_SCALAR) || defined(GPTFAST_NEON)
  UNROLL_FOR (int i = 0; i < 4; i++) r[i] = iload(p + i * step);
  transpose(r);
#else
  UNROLL_FOR (int i = 0; i < 4; i++) {
    const uint8_t* q = p + i * step;
#if defined(__AVX512F__)
    I x = _mm512_castsi128_si512(_mm_loadu_si128((const __m128i*)q));
    x = _mm512_inserti32x4(x, _mm_loadu_si128((const __m128i*)(q + 4 * step)), 1);
    x = _mm512_inserti32x4(x, _mm_loadu_si128((const __m128i*)(q + 8 * step)), 2);
    r[i] = _mm512_inserti32x4(x, _mm_loadu_si128((const __m128i*)(q + 12 * step)), 3);
#else
    const I x = _mm256_castsi128_si256(_mm_loadu_si128((const __m128i*)q));
    r[i] = _mm256_inserti128_si256(x, _mm_loadu_si128((const __m128i*)(q + 4 * step)), 1);
#endif
  }
#if defined(__AVX512F__)
  const I a = _mm512_unpacklo_epi32(r[0], r[1]), b = _mm512_unpackhi_epi32(r[0], r[1]);
  const I c = _mm512_unpacklo_epi32(r[2], r[3]), d = _mm512_unpackhi_epi32(r[2], r[3]);
  r[0] = _mm512_unpacklo_epi64(a, c), r[1] = _mm512_unpackhi_epi64(a, c);
  r[2] = _mm512_unpacklo_epi64(b, d), r[3] = _mm512_unpackhi_epi64(b, d);
#else
  const I a = _mm256_unpacklo_epi32(r[0], r[1]), b = _mm256_unpackhi_epi32(r[0], r[1]);
  const I c = _mm256_unpacklo_epi32(r[2], r[3]), d = _mm256_unpackhi_epi32(r[2], r[3]);
  r[0] = _mm256_unpacklo_epi64(a, c), r[1] = _mm256_unpackhi_epi64(a, c);
  r[2] = _mm256_unpacklo_epi64(b, d), r[3] = _mm256_unpackhi_epi64(b, d);
#endif
#endif
}

// The scales of groups [g, g + kScaleGroups) of V vectors of outputs from n on: to[group][output]. What is beyond the last group is
// not read. A byte of 0, 2^-127, is taken for 0.
template <int V> INL void turn_scales(const uint8_t* scales, i64 groups, i64 n, i64 g, float (*to)[V * L]) {
  alignas(64) uint8_t last[V * L][kScaleGroups] = {};
  const uint8_t* from = scales + n * groups + g;
  i64 step = groups;
  if (g + kScaleGroups > groups) {
    for (int i = 0; i < V * L; i++) __builtin_memcpy(last[i], from + i * groups, size_t(groups - g));
    from = last[0], step = kScaleGroups;
  }
  UNROLL_FOR (int v = 0; v < V; v++) {
    I words[4];
    words_of_rows(from + v * L * step, step, words);
    UNROLL_FOR (int i = 0; i < 4; i++) {
      const I w = words[i], exponents[4] = {shl(w, 23), shl(w, 15), shl(w, 7), shr(w, 1)};
      UNROLL_FOR (int b = 0; b < 4; b++) store(to[4 * i + b] + v * L, as_float(iand(exponents[b], iset(0x7f800000u))));
    }
  }
}
// Nibbles of step i of a group, in bytes: the low ones of word i / 2, or the high ones.
INL I nibbles_of(const I words[4], int i) {
  return iand(i % 2 ? shr(words[i / 2], 4) : words[i / 2], iset(0x0f0f0f0fu));
}

// One row.
template <int V, class N>
static void block_tile(const uint8_t* levels, const Blocks& w, N n, const Activations& x, i64 groups, float* y) {
  const Lookup16 bytes(levels);
  const uint8_t* blocks = w.blocks + n * groups * kBlock;
  const uint8_t* ahead = blocks + kPanel * groups * kBlock;
  alignas(64) float scales[kScaleGroups][V * L];
  F acc[V];
  UNROLL_FOR (int v = 0; v < V; v++) acc[v] = zero();
  for (i64 g = 0; g < groups; g++, blocks += kBlock, ahead += V * L * kBlock) {
    if (g % kScaleGroups == 0) {
      turn_scales<V>(w.scales, groups, n, g, scales);
      prefetch_range(reinterpret_cast<const char*>(w.scales + (kPanel + n) * groups + g * V * L), kScaleGroups * V * L);
    }
    UNROLL_FOR (int i = 0; i < V * L * kBlock; i += 64) __builtin_prefetch(ahead + i, 0, 2);
    const int8_t* q = x.q + g * kGroup;
    I words[V][4], sum[V];
    UNROLL_FOR (int v = 0; v < V; v++) {
      words_of_rows(blocks + v * L * groups * kBlock, groups * kBlock, words[v]);
      sum[v] = broadcast4(x.acc_init + g);
    }
    UNROLL_FOR (int i = 0; i < 8; i++) {
      const I a = broadcast4(q + 4 * i);
      UNROLL_FOR (int v = 0; v < V; v++) sum[v] = dot4_small(sum[v], bytes.of(nibbles_of(words[v], i)), a);
    }
    UNROLL_FOR (int v = 0; v < V; v++)
      acc[v] = fma(to_float_signed(sum[v]), load(scales[g % kScaleGroups] + v * L) * set(x.scale[g]), acc[v]);
  }
  UNROLL_FOR (int v = 0; v < V; v++) store(y + n + v * L, acc[v]);
}

// A panel that is unpacked: of each group [32] fp32 scales, then [8][32] quads of levels, in the order of the nibbles.
struct UnpackedQuads {
  static constexpr Format kFormat = Format::int8;  // by its order of quads
  static constexpr bool kSigned = false, kRolled = true;
  static constexpr i64 kScales = kPanel * 4, kBytes = kScales + kPanel * kGroup;
  explicit UnpackedQuads(const uint8_t*) {}
  INL_MEMBER I quad(const char* w, int n, int q) const { return iload(w + (q * kPanel + n) * 4); }
  INL_MEMBER I dot(I acc, I w, I x) const { return dot4_small(acc, w, x); }
  INL F scales(const char* group, int n) { return load(reinterpret_cast<const float*>(group) + n); }
};
static void unpack_blocks(const uint8_t* levels, const Blocks& w, i64 groups, char* to) {
  const Lookup16 bytes(levels);
  alignas(64) float scales[kScaleGroups][L];
  for (i64 n = 0; n < kPanel; n += L) {
    const uint8_t* ahead = w.blocks + (kPanel + n) * groups * kBlock;
    for (i64 g = 0; g < groups; g++, ahead += L * kBlock) {
      if (g % kScaleGroups == 0) turn_scales<1>(w.scales, groups, n, g, scales);
      UNROLL_FOR (int i = 0; i < L * kBlock; i += 64) __builtin_prefetch(ahead + i, 0, 2);
      char* group = to + g * UnpackedQuads::kBytes;
      store(reinterpret_cast<float*>(group) + n, load(scales[g % kScaleGroups]));
      I words[4];
      words_of_rows(w.blocks + (n * groups + g) * kBlock, groups * kBlock, words);
      UNROLL_FOR (int i = 0; i < 8; i++)
        istore(group + UnpackedQuads::kScales + (i * kPanel + n) * 4, bytes.of(nibbles_of(words, i)));
    }
  }
}

static void product_of_blocks(const Blocks& panel, const Activations& x, i64 M, i64 K, float* y, i64 ldy) {
  const i64 groups = K / kGroup;
  const uint8_t* levels = kMxfp4Bytes.byte;
  if (M == 1)
    return tiles_of_panel<kBlockVectors>([&](auto n) { block_tile<kBlockVectors>(levels, panel, n, x, groups, y); });
  char* unpacked = static_cast<char*>(scratch(size_t(groups * UnpackedQuads::kBytes)));
  unpack_blocks(levels, panel, groups, unpacked);
  byte_rows<UnpackedQuads>(levels, unpacked, x, M, K, y, ldy);
}
static void mxfp4_product(const char* w, const Activations& x, i64 M, i64 K, float* y, i64 ldy) {
  const uint8_t* blocks = reinterpret_cast<const uint8_t*>(w);
  product_of_blocks({blocks, blocks + kPanel * K / 2}, x, M, K, y, ldy);
}

static void fill(Kernels& k) {
  k.product[int(Format::mxfp4)] = mxfp4_product;
  k.product_of_blocks = product_of_blocks;
}
