// The one micro-kernel behind attention:  C[r][lane] (op)= sum_k A[r * ra + k * ka] * B[k * ldb + lane].
//
// A is broadcast from memory through two strides, so any layout of it serves; B and C hold lanes side by side.
// "Words" are 32 bits: one fp32, or, with PAIR, two bf16 that are neighbours along k (vdpbf16ps adds both products in
// fp32). Register tiles: 8 rows x 2 vectors reach 97% of AVX-512's peak on data in L1, 6 x 2 99% of AVX2's.
#pragma once

enum Mode {
  SET,    // C = product
  ACC,    // C += product
  ADD,    // C += product, which was summed by itself: more exact over a long contraction
  SCALE,  // C = C * alpha[lane] + product
};

constexpr int kTileRows = L == 16 ? 8 : L == 8 || kNeon ? 6 : 4, kTileVectors = kNeon ? 4 : 2;

INL I broadcast_word(const uint32_t* p) {
  uint32_t w;
  __builtin_memcpy(&w, p, 4);  // bf16 pairs of a misaligned tensor are read here
  return iset(w);
}
template <bool PAIR> INL F multiply_words(I a, I b, F acc) {
#ifdef GPTFAST_PAIRS
  if constexpr (PAIR) return multiply_pairs(acc, a, b);
#endif
  return fma(as_float(a), as_float(b), acc);
}

#ifdef GPTFAST_MATRIX
#include "tile_matrix-inl.h"
#endif

template <bool PAIR, int R, int V, Mode MODE>
INL void tile(const uint32_t* A, i64 ra, i64 ka, const uint32_t* B, i64 ldb, i64 K, float* C, i64 ldc,
              const float* alpha) {
#ifdef GPTFAST_MATRIX
  if constexpr (PAIR && R > 1) return matrix_tile<R, V, MODE>(A, ra, ka, B, ldb, K, C, ldc, alpha);
#endif
  F acc[R][V];
  UNROLL_FOR (int r = 0; r < R; r++)
    UNROLL_FOR (int v = 0; v < V; v++) {
      acc[r][v] = MODE == SET || MODE == ADD ? zero() : load(C + r * ldc + v * L);
      if (MODE == SCALE) acc[r][v] = acc[r][v] * load(alpha + v * L);
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
      if (MODE == ADD) acc[r][v] = load(C + r * ldc + v * L) + acc[r][v];
      store(C + r * ldc + v * L, acc[r][v]);
    }
}
// M rows of V vectors: tiles of kTileRows, then 4, 2, 1.
template <bool PAIR, int V, Mode MODE>
static void tile_rows(const uint32_t* A, i64 ra, i64 ka, const uint32_t* B, i64 ldb, i64 K, float* C, i64 ldc,
                      const float* alpha, i64 M) {
  constexpr int R = V == 1 ? 2 * kTileRows : kTileRows;  // as many sums in flight
  i64 r = 0;
  for (; r + R <= M; r += R) tile<PAIR, R, V, MODE>(A + r * ra, ra, ka, B, ldb, K, C + r * ldc, ldc, alpha);
  for (; r + 4 <= M; r += 4) tile<PAIR, 4, V, MODE>(A + r * ra, ra, ka, B, ldb, K, C + r * ldc, ldc, alpha);
  for (; r + 2 <= M; r += 2) tile<PAIR, 2, V, MODE>(A + r * ra, ra, ka, B, ldb, K, C + r * ldc, ldc, alpha);
  if (r < M) tile<PAIR, 1, V, MODE>(A + r * ra, ra, ka, B, ldb, K, C + r * ldc, ldc, alpha);
}
// M rows of `vectors` vectors. alpha is read by SCALE only.
template <bool PAIR, Mode MODE>
static void product(const uint32_t* A, i64 ra, i64 ka, const uint32_t* B, i64 ldb, i64 K, float* C, i64 ldc, i64 M,
                    int vectors, const float* alpha = nullptr) {
  int v = 0;
  if constexpr (kTileVectors == 4)
    for (; v + 4 <= vectors; v += 4)
      tile_rows<PAIR, 4, MODE>(A, ra, ka, B + v * L, ldb, K, C + v * L, ldc, alpha + (MODE == SCALE ? v * L : 0), M);
  for (; v + 2 <= vectors; v += 2)
    tile_rows<PAIR, 2, MODE>(A, ra, ka, B + v * L, ldb, K, C + v * L, ldc, alpha + (MODE == SCALE ? v * L : 0), M);
  if (v < vectors)
    tile_rows<PAIR, 1, MODE>(A, ra, ka, B + v * L, ldb, K, C + v * L, ldc, alpha + (MODE == SCALE ? v * L : 0), M);
}
