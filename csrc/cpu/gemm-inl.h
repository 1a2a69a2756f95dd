// Matrix product C = A B (+ bias) (+ C) on the micro-kernel of tile-inl.h, for any layout of A and B: forward,
// input gradient and weight gradient of a linear layer.
//
// B is packed once for all threads (gemm_panels-inl.h), so that the loads of the micro-kernel run straight through L1. A is
// broadcast where it lies when its rows are words already, else each item packs its block. A block of C (kGemmRows x some
// hundred columns) gathers in scratch memory, in L2, over all of k.
//
// An element of C is summed over k in blocks of kGemmDepth, whatever M, N, the threads and the items are: a row of the
// result depends on no other row, and its bits on nothing but K.
//
// Floor: 2 M N K flops.
#include "gemm_block-inl.h"
#include "gemm_rows-inl.h"
#include "gemm_short-inl.h"

#ifndef GPTFAST_TILES
// Words [w0, w0 + words) of columns [c, c + kPanel) of B, stored by columns: transposed in registers. The lines of the
// next columns are asked for on the way: a column is too short a stretch for the processor to see it coming.
template <bool PAIR>
APART static void gemm_pack_columns(const GemmParams& p, i64 w0, i64 words, i64 c0, uint32_t* out) {
  constexpr i64 per_word = PAIR ? 2 : 1;
  const Matrix& b = p.b;
  for (i64 v = 0; v < kPanel; v += L)
    for (i64 w = 0; w < words; w += L) {
      const i64 k = (w0 + w) * per_word, first = c0 + v;
      I r[L];
      for (i64 c = 0; c < L; c++) {
        const i64 column = first + c;
        r[c] = column < p.N ? gemm_words<PAIR>(at(b.data, b.dtype, column * b.stride), b.dtype, k, p.K - k) : iset(0);
        if (column + L < p.N) prefetch(at(b.data, b.dtype, (column + L) * b.stride + k));
      }
      transpose(r);
      for (i64 i = 0; i < L && w + i < words; i++) istore(out + packed_place(w + i, v), r[i]);
    }
}
// The same of B stored by rows, for `panels` panels side by side, so that long stretches of a row are read.
template <bool PAIR>
APART static void gemm_pack_rows(const GemmParams& p, i64 w0, i64 words, i64 c0, i64 panels, uint32_t* out) {
  constexpr i64 per_word = PAIR ? 2 : 1;
  const Matrix& b = p.b;
  const i64 end = c0 + panels * kPanel;
  F unused = zero();
  for (i64 w = 0; w < words; w++) {
    const i64 k = (w0 + w) * per_word;
    const void* row = at(b.data, b.dtype, k * b.stride);
    const void* next = PAIR && k + 1 < p.K ? at(row, b.dtype, b.stride) : nullptr;
    for (i64 c = c0; c < end; c += L) {
      const i64 n = p.N - c < 0 ? 0 : p.N - c < L ? p.N - c : L;
      uint32_t* to = out + packed_place(w, c - c0);
      istore(to,
             n ? gemm_word_row<PAIR>(at(row, b.dtype, c), next ? at(next, b.dtype, c) : nullptr, b.dtype, n, &unused)
               : iset(0));
      if (n && k + 4 * per_word < p.K) prefetch(at(row, b.dtype, 4 * per_word * b.stride + c));
    }
  }
}

// Item t: block t / groups of words, kPackPanels panels of columns from group t % groups on.
template <bool PAIR> static void gemm_pack_group(const GemmParams& p, i64 t) {
  const i64 panels = (p.n1 - p.n0 + kPanel - 1) / kPanel, groups = (panels + kPackPanels - 1) / kPackPanels;
  const i64 block = t / groups, first = t % groups * kPackPanels;
  const i64 count = panels - first < kPackPanels ? panels - first : kPackPanels;
  const i64 w0 = p.k0 + block * kGemmDepth, words = p.k1 - w0 < kGemmDepth ? p.k1 - w0 : kGemmDepth;
  uint32_t* out = p.packed + (block * panels + first) * kGemmDepth * kPanel;
  if (!p.b.by_columns) return gemm_pack_rows<PAIR>(p, w0, words, p.n0 + first * kPanel, count, out);
  for (i64 n = 0; n < count; n++)
    gemm_pack_columns<PAIR>(p, w0, words, p.n0 + (first + n) * kPanel, out + n * kGemmDepth * kPanel);
}
static void gemm_pack(const GemmParams& p, i64 begin, i64 end) {
  if (kOnlyBf16 && !p.pairs) return base.gemm_pack(p, begin, end);
  for (i64 t = begin; t < end; t++)
    if (kPairs && p.pairs) gemm_pack_group<kPairs>(p, t);
    else if constexpr (!kOnlyBf16) gemm_pack_group<false>(p, t);
}

static void gemm(const GemmParams& p, i64 item) {
  if (kOnlyBf16 && !p.pairs) return base.gemm(p, item);
#ifdef GPTFAST_PAIRS
  if (p.pairs && !p.packed) return gemm_item<RowsBlock<true>>(p, item);
#ifdef GPTFAST_SHORT
  if (is_short(p)) return gemm_item<ShortBlock>(p, item);
#endif
  if (p.pairs) return gemm_item<GemmBlock<true>>(p, item);
#endif
  if constexpr (!kOnlyBf16) p.packed ? gemm_item<GemmBlock<false>>(p, item) : gemm_item<RowsBlock<false>>(p, item);
}
#else
static void gemm(const GemmParams& p, i64 item) {
  p.pairs&& p.packed ? gemm_item<GemmBlock<true>>(p, item) : base.gemm(p, item);
}
#endif

static void fill(Kernels& k) {
  own_table = &k;
#ifndef GPTFAST_TILES
  k.gemm_pack = gemm_pack;
#endif
  k.gemm = gemm;
}
