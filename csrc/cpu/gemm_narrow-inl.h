// C = A B for an A (M, K) whose rows are bf16 and a B (K, N) of few columns: x A^T and dy B of low-rank updates.
//
// A is read once where it lies, its pairs along k in the lanes: B is packed as N rows of K values, and a tile of rows of A
// and of B has a vector of sums for each element. With the columns in the lanes, as in gemm-inl.h, a rank of 8 fills a quarter
// of a panel. An element is summed over k in lanes, then over the lanes, whatever M, N and the threads are.
//
// Floor: the read of A; 2 M N K flops.
#include "tile_words-inl.h"

#ifdef GPTFAST_PAIRS
constexpr int kNarrow = 8;  // columns of a tile
constexpr int kHigh = 3;    // rows of one, so that a word of B meets three of A

INL i64 narrow_depth(i64 K) { return (K + 2 * L - 1) / (2 * L) * (2 * L); }

// R rows of A from `a` on, kNarrow of B from `b` on; the first n sums of a row to c.
template <int R>
static void narrow_tile(const uint16_t* a, i64 lda, const uint16_t* b, i64 K, float* c, i64 ldc, i64 n) {
  F acc[R][kNarrow];
  UNROLL_FOR (int r = 0; r < R; r++)
    UNROLL_FOR (int j = 0; j < kNarrow; j++) acc[r][j] = zero();
  const i64 depth = narrow_depth(K);
  for (i64 k = 0; k < K; k += 2 * L) {
    const HalfLanes lanes = first_halves(K - k);
    I x[R];
    UNROLL_FOR (int r = 0; r < R; r++) {
      x[r] = load_halves(a + r * lda + k, lanes);
      prefetch(a + (R + r) * lda + k);
    }
    UNROLL_FOR (int j = 0; j < kNarrow; j++) {
      const I word = iload(b + j * depth + k);
      UNROLL_FOR (int r = 0; r < R; r++) acc[r][j] = multiply_words<true>(x[r], word, acc[r][j]);
    }
  }
  UNROLL_FOR (int r = 0; r < R; r++) {
    float sums[kNarrow];
    UNROLL_FOR (int j = 0; j < kNarrow; j++) sums[j] = sum(acc[r][j]);
    __builtin_memcpy(c + r * ldc, sums, size_t(n) * 4);
  }
}

// B by rows of K values as bf16, whole groups of kNarrow of them, of narrow_depth(K) each; 0 where B has none.
static void gemm_narrow_pack(const GemmNarrowParams& p) {
  const i64 depth = narrow_depth(p.K), columns = (p.N + kNarrow - 1) / kNarrow * kNarrow;
  const auto inside = [&](i64 k) { return k >= p.K ? 0 : p.K - k < L ? p.K - k : L; };
  if (p.b.by_columns) {
    for (i64 j = 0; j < columns; j++)
      for (i64 k = 0; k < depth; k += L) {
        const i64 n = j < p.N ? inside(k) : 0;
        const F x = n ? load_any(at(p.b.data, p.b.dtype, j * p.b.stride + k), p.b.dtype, n) : zero();
        store_any(p.packed + j * depth + k, DType::bf16, x, L);
      }
    return;
  }
  for (i64 j = 0; j < columns; j += L)
    for (i64 k = 0; k < depth; k += L) {
      const i64 n = p.N - j < L ? p.N - j : L, count = inside(k);
      I r[L];
      for (i64 i = 0; i < L; i++)
        r[i] = i < count && n > 0 ? as_int(load_any(at(p.b.data, p.b.dtype, (k + i) * p.b.stride + j), p.b.dtype, n))
                                  : iset(0);
      transpose(r);
      for (i64 i = 0; i < L && j + i < columns; i++)
        store_any(p.packed + (j + i) * depth + k, DType::bf16, as_float(r[i]), L);
    }
}

static void gemm_narrow(const GemmNarrowParams& p, i64 row_begin, i64 row_end) {
  const uint16_t* a = static_cast<const uint16_t*>(p.a.data);
  const i64 depth = narrow_depth(p.K);
  for (i64 m = row_begin; m < row_end;) {
    const bool three = m + kHigh <= row_end;
    for (i64 j = 0; j < p.N; j += kNarrow) {
      const i64 n = p.N - j < kNarrow ? p.N - j : kNarrow;
      (three ? narrow_tile<kHigh> : narrow_tile<1>)(a + m * p.a.stride, p.a.stride, p.packed + j * depth, p.K,
                                                    p.c + m * p.c_stride + j, p.c_stride, n);
    }
    m += three ? kHigh : 1;
  }
}
#else
constexpr void (*gemm_narrow_pack)(const GemmNarrowParams&) = nullptr;
constexpr void (*gemm_narrow)(const GemmNarrowParams&, i64, i64) = nullptr;
#endif

static void fill(Kernels& k) {
  k.gemm_narrow_pack = gemm_narrow_pack;
  k.gemm_narrow = gemm_narrow;
}
