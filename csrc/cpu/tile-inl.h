// The one micro-kernel behind matrix products and attention:  C[r][lane] (op)= sum_k A[r * ra + k * ka] * B[k * ldb + lane].
//
// A is broadcast from memory through two strides, so any layout of it serves; B and C hold lanes side by side. Register
// tiles: 8 rows x 2 vectors reach 97% of AVX-512's peak on data in L1, 6 x 2 99% of AVX2's.
//
// It is compiled apart from the kernels that call it (products-inl.h): unrolled tiles are most of what a compiler has to do.
#pragma once
#include "tile_words-inl.h"

constexpr int kTileRows = L == 16 ? 8 : L == 8 || kNeon ? 6 : 4, kTileVectors = kNeon ? 4 : 2;

template <TileOp OP> struct TileOpConstant {
  constexpr operator TileOp() const { return OP; }
};
// What the sums of a tile begin with; alpha is read by `scale` only.
template <int R, int V, class Op>
INL void tile_begin(Op op, F (&acc)[R][V], const float* C, i64 ldc, const float* alpha) {
  if (op == TileOp::set || op == TileOp::add) {
    UNROLL_FOR (int r = 0; r < R; r++)
      UNROLL_FOR (int v = 0; v < V; v++) acc[r][v] = zero();
    return;
  }
  UNROLL_FOR (int r = 0; r < R; r++)
    UNROLL_FOR (int v = 0; v < V; v++) {
      acc[r][v] = load(C + r * ldc + v * L);
      if (op == TileOp::scale) acc[r][v] = acc[r][v] * load(alpha + v * L);
    }
}
template <int R, int V, class Op> INL void tile_end(Op op, F (&acc)[R][V], float* C, i64 ldc) {
  UNROLL_FOR (int r = 0; r < R; r++)
    UNROLL_FOR (int v = 0; v < V; v++) {
      if (op == TileOp::add) acc[r][v] = load(C + r * ldc + v * L) + acc[r][v];
      store(C + r * ldc + v * L, acc[r][v]);
    }
}

#ifdef GPTFAST_MATRIX
#include "tile_matrix-inl.h"
#endif

// `op`: a TileOp, or one that the compiler knows (TileOpConstant).
template <bool PAIR, int R, int V, class Op>
INL void tile(Op op, const uint32_t* A, i64 ra, i64 ka, const uint32_t* B, i64 ldb, i64 K, float* C, i64 ldc,
              const float* alpha) {
#ifdef GPTFAST_MATRIX
  if constexpr (PAIR && R > 1) return matrix_tile<R, V>(op, A, ra, ka, B, ldb, K, C, ldc, alpha);
#endif
  F acc[R][V];
  tile_begin<R, V>(op, acc, C, ldc, alpha);
  for (i64 k = 0; k < K; k++) {
    I b[V];
    UNROLL_FOR (int v = 0; v < V; v++) b[v] = iload(B + k * ldb + v * L);
    UNROLL_FOR (int r = 0; r < R; r++) {
      const I a = broadcast_word(A + r * ra + k * ka);
      UNROLL_FOR (int v = 0; v < V; v++) acc[r][v] = multiply_words<PAIR>(a, b[v], acc[r][v]);
    }
  }
  tile_end<R, V>(op, acc, C, ldc);
}
// M rows of V vectors: tiles of kTileRows, then 4, 2, 1.
template <bool PAIR, int V>
static void tile_rows(TileOp op, const uint32_t* A, i64 ra, i64 ka, const uint32_t* B, i64 ldb, i64 K, float* C,
                      i64 ldc, const float* alpha, i64 M) {
  constexpr int R = V == 1 ? 2 * kTileRows : kTileRows;  // as many sums in flight
  i64 r = 0;
  // The two of attention's forward: with what the compiler knows of them they are 7% faster.
  constexpr i64 kWidth = kAttentionBlock;
  if (!kScalar && ldb == kWidth && ldc == kWidth) {
    if (op == TileOp::set && ka == 1) {
      constexpr TileOpConstant<TileOp::set> set;
      for (; r + R <= M; r += R) tile<PAIR, R, V>(set, A + r * ra, ra, 1, B, kWidth, K, C + r * kWidth, kWidth, alpha);
    } else if (op == TileOp::scale && ra == 1) {
      constexpr TileOpConstant<TileOp::scale> scale;
      for (; r + R <= M; r += R) tile<PAIR, R, V>(scale, A + r, 1, ka, B, kWidth, K, C + r * kWidth, kWidth, alpha);
    }
  }
  for (; r + R <= M; r += R) tile<PAIR, R, V>(op, A + r * ra, ra, ka, B, ldb, K, C + r * ldc, ldc, alpha);
  for (; r + 4 <= M; r += 4) tile<PAIR, 4, V>(op, A + r * ra, ra, ka, B, ldb, K, C + r * ldc, ldc, alpha);
  for (; r + 2 <= M; r += 2) tile<PAIR, 2, V>(op, A + r * ra, ra, ka, B, ldb, K, C + r * ldc, ldc, alpha);
  if (r < M) tile<PAIR, 1, V>(op, A + r * ra, ra, ka, B, ldb, K, C + r * ldc, ldc, alpha);
}
// V vectors of columns at a time from vector v on, while there are as many. Returns the first one that is left.
template <bool PAIR, int V> INL int tile_columns(const TileProduct& p, int v) {
  for (; v + V <= p.vectors; v += V)
    tile_rows<PAIR, V>(p.op, p.A, p.ra, p.ka, p.B + v * L, p.ldb, p.K, p.C + v * L, p.ldc,
                       p.op == TileOp::scale ? p.alpha + v * L : nullptr, p.M);
  return v;
}
template <bool PAIR> static void tile_product(const TileProduct& p) {
  int v = 0;
  if constexpr (kTileVectors == 4) v = tile_columns<PAIR, 4>(p, v);
  v = tile_columns<PAIR, 2>(p, v);
  tile_columns<PAIR, 1>(p, v);
}
