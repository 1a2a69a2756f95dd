// The one micro-kernel behind matrix products and attention:  C[r][lane] (op)= sum_k A[r * ra + k * ka] * B[k * ldb + lane].
//
// A is broadcast from memory through two strides, so any layout of it serves; B and C hold lanes side by side. Register
// tiles: 8 rows x 2 vectors reach 97% of AVX-512's peak on data in L1, 6 x 2 99% of AVX2's.
//
// It is compiled apart from the kernels that call it (products-inl.h): unrolled tiles are most of what a compiler has to do.
#pragma once
#include "tile_words-inl.h"

constexpr int kTileRows = L == 16 ? 8 : L == 8 || kNeon ? 6 : 4, kTileVectors = kNeon ? 4 : 2;

#ifdef GPTFAST_MATRIX
#include "tile_matrix-inl.h"
#endif

template <bool PAIR, int R, int V, TileOp OP>
INL void tile(const uint32_t* A, i64 ra, i64 ka, const uint32_t* B, i64 ldb, i64 K, float* C, i64 ldc,
              const float* alpha) {
#ifdef GPTFAST_MATRIX
  if constexpr (PAIR && R > 1) return matrix_tile<R, V, OP>(A, ra, ka, B, ldb, K, C, ldc, alpha);
#endif
  F acc[R][V];
  UNROLL_FOR (int r = 0; r < R; r++)
    UNROLL_FOR (int v = 0; v < V; v++) {
      acc[r][v] = OP == TileOp::set || OP == TileOp::add ? zero() : load(C + r * ldc + v * L);
      if (OP == TileOp::scale) acc[r][v] = acc[r][v] * load(alpha + v * L);
    }
  for (i64 k = 0; k < K; k++) {
    I b[V];
    UNROLL_FOR (int v = 0; v < V; v++) b[v] = iload(B + k * ldb + v * L);
    UNROLL_FOR (int r = 0; r < R; r++) {
      const I a = broadcast_word(A + r * ra + k * ka);
      UNROLL_FOR (int v = 0; v < V; v++) acc[r][v] = multiply_words<PAIR>(a, b[v], acc[r][v]);
    }
  }
  UNROLL_FOR (int r = 0; r < R; r++)
    UNROLL_FOR (int v = 0; v < V; v++) {
      if (OP == TileOp::add) acc[r][v] = load(C + r * ldc + v * L) + acc[r][v];
      store(C + r * ldc + v * L, acc[r][v]);
    }
}
// M rows of V vectors: tiles of kTileRows, then 4, 2, 1.
template <bool PAIR, int V, TileOp OP>
static void tile_rows(const uint32_t* A, i64 ra, i64 ka, const uint32_t* B, i64 ldb, i64 K, float* C, i64 ldc,
                      const float* alpha, i64 M) {
  constexpr int R = V == 1 ? 2 * kTileRows : kTileRows;  // as many sums in flight
  i64 r = 0;
  // The two of attention's forward: with strides that the compiler knows they are 7% faster.
  constexpr i64 kWidth = kAttentionBlock;
  if (ldb == kWidth && ldc == kWidth) {
    if (OP == TileOp::set && ka == 1) {
      for (; r + R <= M; r += R) tile<PAIR, R, V, OP>(A + r * ra, ra, 1, B, kWidth, K, C + r * kWidth, kWidth, alpha);
    } else if (OP == TileOp::scale && ra == 1) {
      for (; r + R <= M; r += R) tile<PAIR, R, V, OP>(A + r, 1, ka, B, kWidth, K, C + r * kWidth, kWidth, alpha);
    }
  }
  for (; r + R <= M; r += R) tile<PAIR, R, V, OP>(A + r * ra, ra, ka, B, ldb, K, C + r * ldc, ldc, alpha);
  for (; r + 4 <= M; r += 4) tile<PAIR, 4, V, OP>(A + r * ra, ra, ka, B, ldb, K, C + r * ldc, ldc, alpha);
  for (; r + 2 <= M; r += 2) tile<PAIR, 2, V, OP>(A + r * ra, ra, ka, B, ldb, K, C + r * ldc, ldc, alpha);
  if (r < M) tile<PAIR, 1, V, OP>(A + r * ra, ra, ka, B, ldb, K, C + r * ldc, ldc, alpha);
}
// V vectors of columns at a time from vector v on, while there are as many. Returns the first one that is left.
template <bool PAIR, TileOp OP, int V> INL int tile_columns(const TileProduct& p, int v) {
  for (; v + V <= p.vectors; v += V)
    tile_rows<PAIR, V, OP>(p.A, p.ra, p.ka, p.B + v * L, p.ldb, p.K, p.C + v * L, p.ldc,
                           p.alpha + (OP == TileOp::scale ? v * L : 0), p.M);
  return v;
}
template <bool PAIR, TileOp OP> static void product_of(const TileProduct& p) {
  int v = 0;
  if constexpr (kTileVectors == 4) v = tile_columns<PAIR, OP, 4>(p, v);
  v = tile_columns<PAIR, OP, 2>(p, v);
  tile_columns<PAIR, OP, 1>(p, v);
}
template <bool PAIR> static void tile_product(const TileProduct& p) {
  switch (p.op) {
    case TileOp::set: return product_of<PAIR, TileOp::set>(p);
    case TileOp::accumulate: return product_of<PAIR, TileOp::accumulate>(p);
    case TileOp::add: return product_of<PAIR, TileOp::add>(p);
    case TileOp::scale: return product_of<PAIR, TileOp::scale>(p);
  }
}
