// Matrix product C = A B (+ bias) (+ C) on the micro-kernel of tile_product-inl.h, for any layout of A and B: forward,
// input gradient and weight gradient of a linear layer.
//
// B is packed once for all threads, into [block of kGemmDepth words][panel of 32 columns][word][32], so that the loads
// of the micro-kernel run straight through L1. A is broadcast where it lies when its rows are words already, else each
// item packs its block. A block of C (kGemmRows x some hundred columns) gathers in scratch memory, in L2, over all of k.
//
// An element of C is summed over k in blocks of kGemmDepth, whatever M, N, the threads and the items are: a row of the
// result depends on no other row, and its bits on nothing but K.
//
// Floor: 2 M N K flops.
#include "tile_product-inl.h"

// A word is an fp32 value or, with PAIR, two bf16 that are neighbours along k.
template <bool PAIR> INL I gemm_words(const void* p, DType t, i64 element, i64 n) {  // n elements count, the rest is 0
#ifdef __AVX512BF16__
  if constexpr (PAIR) {
    if (t == DType::bf16 && n >= 2 * L) return iload(at(p, t, element));
    const F low = load_any(at(p, t, element), t, n < L ? n : L);
    const F high = n > L ? load_any(at(p, t, element + L), t, n < 2 * L ? n - L : L) : zero();
    return (I)_mm512_cvtne2ps_pbh(high, low);
  }
#endif
  return as_int(load_any(at(p, t, element), t, n < L ? n : L));
}
// L words of neighbouring columns of a row (PAIR: of two rows, the second may be missing) of n columns.
template <bool PAIR> INL I gemm_word_row(const void* first, const void* second, DType t, i64 n, F* sum) {
  const F x = load_any(first, t, n);
#ifdef __AVX512BF16__
  if constexpr (PAIR) {
    const F y = second ? load_any(second, t, n) : zero();
    *sum = *sum + (x + y);
    return pair_bf16(x, y);
  }
#endif
  *sum = *sum + x;
  return as_int(x);
}

constexpr i64 kPanel = kGemmPanel;
constexpr i64 kGemmPitch = kGemmRows + 16;  // words from row to row of a transposed block of A: spreads over L1's sets

// Words [w0, w0 + words) of columns [c, c + kPanel) of B, stored by columns: transposed in registers. The lines of the
// next columns are asked for on the way: a column is too short a stretch for the processor to see it coming.
template <bool PAIR> static void gemm_pack_columns(const GemmParams& p, i64 w0, i64 words, i64 c0, uint32_t* out) {
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
      for (i64 i = 0; i < L && w + i < words; i++) istore(out + (w + i) * kPanel + v, r[i]);
    }
}
// The same of B stored by rows, for `panels` panels side by side, so that long stretches of a row are read.
template <bool PAIR>
static void gemm_pack_rows(const GemmParams& p, i64 w0, i64 words, i64 c0, i64 panels, uint32_t* out) {
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
      uint32_t* to = out + ((c - c0) / kPanel * kGemmDepth + w) * kPanel + c % kPanel;
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
  for (i64 t = begin; t < end; t++) p.pairs ? gemm_pack_group<true>(p, t) : gemm_pack_group<false>(p, t);
}

// One item: rows [m0, m0 + rows) and columns [c0, c1) of C.
template <bool PAIR> struct GemmBlock {
  static constexpr i64 per_word = PAIR ? 2 : 1;
  const GemmParams& p;
  const i64 m0, rows, c0, c1, pitch;
  const bool direct;  // rows of A are words as they lie
  float *c, *sums;
  uint32_t* packed_a;

  GemmBlock(const GemmParams& params, i64 m, i64 begin, i64 end)
      : p(params), m0(m), rows(p.M - m < kGemmRows ? p.M - m : kGemmRows), c0(begin), c1(end),
        pitch(round_up(end - begin, kPanel)),
        direct(!p.a.by_columns && p.a.dtype == (PAIR ? DType::bf16 : DType::f32) && p.K % per_word == 0 &&
               p.a.stride % per_word == 0) {
    c = static_cast<float*>(scratch(size_t(kGemmRows * pitch + kGemmPitch * kGemmDepth + kGemmPitch) * 4));
    packed_a = reinterpret_cast<uint32_t*>(c + kGemmRows * pitch);
    sums = reinterpret_cast<float*>(packed_a + kGemmPitch * kGemmDepth);
  }

  // Words [w0, w0 + words) of the block of A: where they lie and with which strides.
  struct Words {
    const uint32_t* data;
    i64 row, k;
  };
  Words words_of_a(i64 w0, i64 words) {
    const i64 k0 = w0 * per_word;
    const Matrix& a = p.a;
    if (direct) {
      const void* data = at(a.data, a.dtype, m0 * a.stride + k0);
      return {static_cast<const uint32_t*>(data), a.stride / per_word, 1};
    }
    if (!a.by_columns) {
      for (i64 r = 0; r < rows; r++)
        for (i64 w = 0; w < words; w += L)
          istore(packed_a + r * kGemmDepth + w, gemm_words<PAIR>(at(a.data, a.dtype, (m0 + r) * a.stride), a.dtype,
                                                                 k0 + w * per_word, p.K - k0 - w * per_word));
      return {packed_a, kGemmDepth, 1};
    }
    for (i64 r = 0; r < rows; r += L) {
      const i64 n = rows - r < L ? rows - r : L;
      F sum = zero();
      for (i64 w = 0; w < words; w++) {
        const i64 k = k0 + w * per_word;
        const void* row = at(a.data, a.dtype, k * a.stride + m0 + r);
        const void* next = PAIR && k + 1 < p.K ? at(row, a.dtype, a.stride) : nullptr;
        istore(packed_a + w * kGemmPitch + r, gemm_word_row<PAIR>(row, next, a.dtype, n, &sum));
      }
      store(sums + r, load(sums + r) + sum);
    }
    return {packed_a, 1, kGemmPitch};
  }

  void multiply() {
    const i64 panels = (p.n1 - p.n0 + kPanel - 1) / kPanel;
    __builtin_memset(sums, 0, size_t(kGemmPitch) * 4);
    if (p.k0 >= p.k1) __builtin_memset(c, 0, size_t(kGemmRows * pitch) * 4);
    for (i64 block = 0; p.k0 + block * kGemmDepth < p.k1; block++) {
      const i64 w0 = p.k0 + block * kGemmDepth, words = p.k1 - w0 < kGemmDepth ? p.k1 - w0 : kGemmDepth;
      const Words a = words_of_a(w0, words);
      for (i64 column = c0; column < c1; column += kPanel) {
        const i64 panel = (column - p.n0) / kPanel;
        const uint32_t* b = p.packed + (block * panels + panel) * kGemmDepth * kPanel;
        float* to = c + column - c0;
        if (block == 0) product<PAIR, SET>(a.data, a.row, a.k, b, kPanel, words, to, pitch, rows, kPanel / L);
        else product<PAIR, ADD>(a.data, a.row, a.k, b, kPanel, words, to, pitch, rows, kPanel / L);
      }
    }
  }

  void finish() const {
    const bool last = p.k1 * per_word >= p.K;
    for (i64 r = 0; r < rows; r++) {
      const float* from = c + r * pitch;
      float* carry = p.carry ? p.carry + (m0 + r) * p.N + c0 : nullptr;
      void* to = at(row(p.c, m0 + r), p.c.dtype, c0);
      for_lanes(c1 - c0, [&](i64 j, i64 n) __attribute__((always_inline)) {
        F x = load(from + j);  // a row of the block is whole vectors
        if (p.k0) x = x + load_lanes(carry + j, n);
        if (!last) return store_lanes(carry + j, x, n);
        if (p.bias.data) x = x + load_any(at(p.bias.data, p.bias.dtype, c0 + j), p.bias.dtype, n);
        if (p.accumulate) x = x + load_any(at(to, p.c.dtype, j), p.c.dtype, n);
        store_any(at(to, p.c.dtype, j), p.c.dtype, x, n);
      });
    }
    if (!p.a_sums || c0 > 0) return;
    for (i64 r = 0; r < rows; r++) p.a_sums[m0 + r] = sums[r] + (p.k0 ? p.a_sums[m0 + r] : 0.f);
  }
};

// Item t: block t % row_blocks of rows, columns [n0 + t / row_blocks * columns, …).
static void gemm(const GemmParams& p, i64 t) {
  const i64 row_blocks = (p.M + kGemmRows - 1) / kGemmRows;
  const i64 m0 = t % row_blocks * kGemmRows, c0 = p.n0 + t / row_blocks * p.columns;
  const i64 c1 = c0 + p.columns < p.n1 ? c0 + p.columns : p.n1;
  if (p.pairs) {
    GemmBlock<true> block(p, m0, c0, c1);
    block.multiply();
    block.finish();
  } else {
    GemmBlock<false> block(p, m0, c0, c1);
    block.multiply();
    block.finish();
  }
}

static void fill(Kernels& k) {
  k.gemm_pack = gemm_pack;
  k.gemm = gemm;
}
