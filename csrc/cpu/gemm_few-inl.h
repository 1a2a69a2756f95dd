// C = A^T B for an A (K, M) of few columns and a B (K, N) whose rows are bf16: the gradients of low-rank factors.
//
// B is read once where it lies, without packing: two rows are interleaved into the pairs that are multiplied. A block of kDepth
// rows at a time gathers in C, in fp32. An element is summed over k in order, whatever M, N and the threads are.
//
// Floor: 2 M N K flops, or the read of B.
#include "tile_words-inl.h"

#ifdef GPTFAST_PAIRS
constexpr i64 kDepth = 64;     // rows of B whose columns are read one after another
constexpr i64 kStrip = 2 * L;  // columns of a tile

// R rows of C, kStrip columns: += over `pairs` pairs of rows of B, of which the last may lack its second row.
template <int R>
static void few_tile(const uint32_t* a, i64 a_pitch, const uint16_t* b, i64 ldb, i64 pairs, bool odd, HalfLanes lanes,
                     float* c) {
  F acc[R][2];
  UNROLL_FOR (int r = 0; r < R; r++) {
    acc[r][0] = load(c + r * kFewColumns);
    acc[r][1] = load(c + r * kFewColumns + L);
  }
  for (i64 k = 0; k < pairs; k++, b += 2 * ldb, a += a_pitch) {
    const I x = load_halves(b, lanes), y = odd && k + 1 == pairs ? iset(0) : load_halves(b + ldb, lanes);
    const I low = interleave_halves_low(x, y), high = interleave_halves_high(x, y);
    UNROLL_FOR (int r = 0; r < R; r++) {
      const I word = iset(a[r]);
      acc[r][0] = multiply_words<true>(word, low, acc[r][0]);
      acc[r][1] = multiply_words<true>(word, high, acc[r][1]);
    }
  }
  UNROLL_FOR (int r = 0; r < R; r++) {
    store(c + r * kFewColumns, acc[r][0]);
    store(c + r * kFewColumns + L, acc[r][1]);
  }
}

// The rows of A as words: pairs along K, kMostFew columns.
static void gemm_few_pack(const GemmFewParams& p) {
  const i64 words = (p.K + 1) / 2;
  alignas(64) float first[kMostFew] = {}, second[kMostFew] = {};
  for (i64 w = 0; w < words; w++) {
    copy_row(first, row(p.a, 2 * w), p.a.dtype, p.M);
    if (2 * w + 1 < p.K) copy_row(second, row(p.a, 2 * w + 1), p.a.dtype, p.M);
    else __builtin_memset(second, 0, sizeof second);
    for (i64 m = 0; m < kMostFew; m += L)
      istore(p.packed + w * kMostFew + m, pair_bf16(load(first + m), load(second + m)));
  }
}

// Item t: columns from t * kFewColumns on.
static void gemm_few(const GemmFewParams& p, i64 t) {
  const i64 c0 = t * kFewColumns, count = p.N - c0 < kFewColumns ? p.N - c0 : kFewColumns;
  float* c = static_cast<float*>(scratch(size_t(kMostFew * kFewColumns) * 4));
  __builtin_memset(c, 0, size_t(kMostFew * kFewColumns) * 4);
  const uint16_t* b = static_cast<const uint16_t*>(p.b.data) + c0;
  for (i64 k = 0; k < p.K; k += kDepth) {
    const i64 rows = p.K - k < kDepth ? p.K - k : kDepth;
    for (i64 j = 0; j < count; j += kStrip) {
      const HalfLanes lanes = first_halves(count - j);
      const uint16_t* from = b + k * p.b.stride + j;
      const uint32_t* a = p.packed + k / 2 * kMostFew;
      for (i64 r = 0; j + kStrip < count && r < rows; r++) prefetch(from + r * p.b.stride + kStrip);
      i64 m = 0;
      for (; m + 8 <= p.M; m += 8)
        few_tile<8>(a + m, kMostFew, from, p.b.stride, (rows + 1) / 2, rows % 2, lanes, c + m * kFewColumns + j);
      for (; m < p.M; m += 4)
        few_tile<4>(a + m, kMostFew, from, p.b.stride, (rows + 1) / 2, rows % 2, lanes, c + m * kFewColumns + j);
    }
  }
  for (i64 m = 0; m < p.M; m++)
    for (i64 j = 0; j < count; j += kStrip) {
      const F low = load(c + m * kFewColumns + j), high = load(c + m * kFewColumns + j + L);
      void* to = at(row(p.c, m), p.c.dtype, c0 + j);
      const i64 n = count - j;
      store_any(to, p.c.dtype, first_columns(low, high), n < L ? n : L);
      if (n > L) store_any(at(to, p.c.dtype, L), p.c.dtype, last_columns(low, high), n < 2 * L ? n - L : L);
    }
}
#else
constexpr void (*gemm_few_pack)(const GemmFewParams&) = nullptr;
constexpr void (*gemm_few)(const GemmFewParams&, i64) = nullptr;
#endif

static void fill(Kernels& k) {
  k.gemm_few_pack = gemm_few_pack;
  k.gemm_few = gemm_few;
}
