// Panels of a quantised weight for the products of gemm_block-inl.h: decoded, scaled, and rounded to bf16 with PAIR. What is
// decoded at a time is a stretch of the weight (QuantizedPackParams::gemm), never all of it. And rows as bf16, for the products
// of libraries.
//
// Floor: the read of the codes; the decoding is some ten instructions for 32 weights, which as many as 2048 rows share.
#include "codes-inl.h"
#include "gemm_panels-inl.h"

constexpr i64 kMostGroups = 16;  // of a row in kGemmDepth words, or in the columns of an item: 512 / 32

INL void widen_scales(const QuantizedMatrix& w, i64 n, i64 k, i64 count, float* out) {
  const i64 first = k / w.group, last = (k + count + w.group - 1) / w.group;
  const i64 groups = (w.K + w.group - 1) / w.group;
  const i64 end = last < groups ? last : groups;
  copy_scales(out, w, n, first, end - first);
}
template <bool PAIR, class C> INL I code_words(const C& codes, const uint8_t* row, i64 k, float scale) {
#ifdef GPTFAST_PAIRS
  if constexpr (PAIR) return codes.pairs(row, k, set(scale));
#endif
  return as_int(codes.load(row, k) * set(scale));
}

// Words [w0, w0 + words) along k of outputs [c0, c0 + kPanel), transposed in registers; words up to a multiple of L are
// written.
template <bool PAIR, class C>
APART static void pack_outputs(const QuantizedMatrix& w, const C& codes, i64 w0, i64 words, i64 c0, uint32_t* out) {
  constexpr i64 per_word = PAIR ? 2 : 1;
  alignas(64) float scales[L][kMostGroups];
  const i64 base = w0 * per_word;
  for (i64 v = 0; v < kPanel; v += L) {
    for (i64 c = 0; c < L && c0 + v + c < w.N; c++) widen_scales(w, c0 + v + c, base, words * per_word, scales[c]);
    for (i64 word = 0; word < words; word += L) {
      const i64 k = base + word * per_word, group = (k - base / w.group * w.group) / w.group;
      I r[L];
      for (i64 c = 0; c < L; c++) {
        const i64 n = c0 + v + c;
        const uint8_t* codes_of_n = w.codes + n * w.row_bytes;
        r[c] = n < w.N ? code_words<PAIR>(codes, codes_of_n, k, scales[c][group]) : iset(0);
        if (n + L < w.N) prefetch(codes_of_n + L * w.row_bytes + k * 4 / C::kPerLane);
      }
      transpose(r);
      for (i64 i = 0; i < L; i++) istore(out + packed_place(word + i, v), r[i]);
    }
  }
}
// Words along the outputs, [w0, w0 + words), of inputs [c0, c0 + panels * kPanel); rows up to a multiple of 16 are written.
template <bool PAIR, class C>
APART static void pack_inputs(const QuantizedMatrix& w, const C& codes, i64 w0, i64 words, i64 c0, i64 panels,
                              uint32_t* out) {
  constexpr i64 per_word = PAIR ? 2 : 1;
  alignas(64) float scales[per_word][kMostGroups];
  const i64 end = c0 + panels * kPanel, rounded = round_up(words, 16);
  for (i64 word = 0; word < rounded; word++) {
    const i64 n = (w0 + word) * per_word;
    const bool first = word < words, second = PAIR && first && n + 1 < w.N;
    if (first) widen_scales(w, n, c0, end - c0, scales[0]);
    if (second) widen_scales(w, n + 1, c0, end - c0, scales[per_word - 1]);
    const uint8_t* codes_of_n = w.codes + n * w.row_bytes;
    for (i64 c = c0; c < end; c += L) {
      I x = iset(0);
      const i64 group = c / w.group - c0 / w.group;
      if (first && c < w.K) {
        const F low = codes.load(codes_of_n, c) * set(scales[0][group]);
        x = as_int(low);
#ifdef GPTFAST_PAIRS
        if constexpr (PAIR)
          x = pair_bf16(low, second ? codes.load(codes_of_n + w.row_bytes, c) * set(scales[1][group]) : zero());
#endif
      }
      istore(out + packed_place(word, c - c0), x);
    }
  }
}

// Item t, as of gemm_pack: block t / groups of words, kPackPanels panels from group t % groups on.
template <bool PAIR, class C> static void pack_item(const QuantizedPackParams& q, const C& codes, i64 t) {
  const GemmParams& p = q.gemm;
  const i64 panels = (p.n1 - p.n0 + kPanel - 1) / kPanel, groups = (panels + kPackPanels - 1) / kPackPanels;
  const i64 block = t / groups, first = t % groups * kPackPanels;
  const i64 count = panels - first < kPackPanels ? panels - first : kPackPanels;
  const i64 w0 = p.k0 + block * kGemmDepth, words = p.k1 - w0 < kGemmDepth ? p.k1 - w0 : kGemmDepth;
  uint32_t* out = p.packed + (block * panels + first) * kGemmDepth * kPanel;
  if (!q.transposed) return pack_inputs<PAIR>(q.w, codes, w0, words, p.n0 + first * kPanel, count, out);
  for (i64 n = 0; n < count; n++)
    pack_outputs<PAIR>(q.w, codes, w0, words, p.n0 + (first + n) * kPanel, out + n * kGemmDepth * kPanel);
}
static void quantized_pack(const QuantizedPackParams& q, i64 item) {
  if (kOnlyBf16 && !q.gemm.pairs) return base.quantized_pack(q, item);
  with_codes(q.w.format, [&](const auto& codes) {
    if (kPairs && q.gemm.pairs) pack_item<kPairs>(q, codes, item);
    else if constexpr (!kOnlyBf16) pack_item<false>(q, codes, item);
  });
}

template <class C> APART static void decode_row(const QuantizedDecodeParams& p, const C& codes, i64 n) {
  const QuantizedMatrix& w = p.w;
  const uint8_t* codes_of_n = w.codes + n * w.row_bytes;
  uint16_t* out = p.out + n * (p.last - p.first) - p.first;
  alignas(64) float scales[kMostGroups];
  for (i64 k0 = p.first; k0 < p.last; k0 += kMostGroups * w.group) {
    const i64 k1 = p.last - k0 < kMostGroups * w.group ? p.last : k0 + kMostGroups * w.group;
    widen_scales(w, n, k0, k1 - k0, scales);
    for (i64 g = 0; k0 + g * w.group < k1; g++) {
      const i64 k = k0 + g * w.group, count = k1 - k < w.group ? k1 - k : w.group;
      const F scale = set(scales[g]);
      for_lanes(count, [&](i64 c, i64 lanes) __attribute__((always_inline)) {
        store_any(out + k + c, DType::bf16, codes.load(codes_of_n, k + c) * scale, lanes);
      });
    }
  }
}
static void quantized_decode(const QuantizedDecodeParams& p, i64 begin, i64 end) {
  with_codes(p.w.format, [&](const auto& codes) {
    for (i64 n = begin; n < end; n++) decode_row(p, codes, n);
  });
}

static void fill(Kernels& k) {
  k.quantized_pack = quantized_pack;
  k.quantized_decode = quantized_decode;
}
