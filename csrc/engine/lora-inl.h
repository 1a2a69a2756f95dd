// The two products of a low-rank update (adapter.h), on fp32: x A^T, and its product with a panel of B.
#include "tiles-inl.h"

constexpr int kDownRows = 2, kDownRanks = L == 16 ? 8 : 4, kUpRows = 4;

template <int R, int J>
static void down_tile(const float* x, i64 ldx, i64 K, const float* A, float scale, float* h, i64 ldh) {
  const i64 lda = lora_stride(K);
  F acc[R][J];
  UNROLL_FOR (int r = 0; r < R; r++)
    UNROLL_FOR (int j = 0; j < J; j++) acc[r][j] = zero();
  for (i64 k = 0; k < K; k += L) {
    F v[R];
    UNROLL_FOR (int r = 0; r < R; r++) v[r] = K - k >= L ? load(x + r * ldx + k) : load_n(x + r * ldx + k, K - k);
    UNROLL_FOR (int j = 0; j < J; j++) {
      const F a = load(A + j * lda + k);
      UNROLL_FOR (int r = 0; r < R; r++) acc[r][j] = fma(v[r], a, acc[r][j]);
    }
  }
  UNROLL_FOR (int r = 0; r < R; r++)
    UNROLL_FOR (int j = 0; j < J; j++) h[r * ldh + j] = scale * sum(acc[r][j]);
}
static void lora_down(const float* x, i64 ldx, i64 M, i64 K, const LowRank& u, float* h, i64 ldh) {
  const i64 lda = lora_stride(K);
  rows_of_tiles<kDownRanks>(u.r, [&]<int J>(i64 j) {
    rows_of_tiles<kDownRows>(
        M, [&]<int R>(i64 m) { down_tile<R, J>(x + m * ldx, ldx, K, u.A + j * lda, u.scale, h + m * ldh + j, ldh); });
  });
}

constexpr int kUpVectors = int(kPanel / L), kUpTile = kUpVectors < 2 ? kUpVectors : 2;

template <int R> static void up_tile(const float* h, i64 ldh, i64 rank, const float* B, float* y, i64 ldy) {
  F acc[R][kUpTile];
  UNROLL_FOR (int r = 0; r < R; r++)
    UNROLL_FOR (int v = 0; v < kUpTile; v++) acc[r][v] = zero();
  for (i64 j = 0; j < rank; j++)
    UNROLL_FOR (int v = 0; v < kUpTile; v++) {
      const F b = load(B + j * kPanel + v * L);
      UNROLL_FOR (int r = 0; r < R; r++) acc[r][v] = fma(set(h[r * ldh + j]), b, acc[r][v]);
    }
  UNROLL_FOR (int r = 0; r < R; r++)
    UNROLL_FOR (int v = 0; v < kUpTile; v++) {
      float* to = y + r * ldy + v * L;
      store(to, load(to) + acc[r][v]);
    }
}
static void lora_up(const float* h, i64 ldh, i64 M, const LowRank& u, i64 panel, float* y, i64 ldy) {
  const float* B = u.B + panel * u.r * kPanel;
  for (i64 n = 0; n < kPanel; n += kUpTile * L)
    rows_of_tiles<kUpRows>(M, [&]<int R>(i64 m) { up_tile<R>(h + m * ldh, ldh, u.r, B + n, y + m * ldy + n, ldy); });
}

static void fill(Kernels& k) {
  k.lora_down = lora_down;
  k.lora_up = lora_up;
}
