// The two products of a low-rank update (adapter.h): x A^T, and its product with panels of B. Sums are in fp32.
#include "tiles-inl.h"

INL F load_factors(const float* p) { return load(p); }
INL F load_factors(const uint16_t* p) { return load_bf16(p); }

constexpr int kDownRows = 2, kDownRanks = L == 16 ? 8 : 4, kUpRows = 4;

template <int R, int J, class T>
static void down_tile(const float* x, i64 ldx, const i64* rows, i64 K, const T* A, i64 lda, float scale, float* h,
                      i64 ldh) {
  const float* from[R];
  F acc[R][J];
  UNROLL_FOR (int r = 0; r < R; r++) {
    from[r] = x + rows[r] * ldx;
    UNROLL_FOR (int j = 0; j < J; j++) acc[r][j] = zero();
  }
  for (i64 k = 0; k < K; k += L) {
    F v[R];
    UNROLL_FOR (int r = 0; r < R; r++) v[r] = K - k >= L ? load(from[r] + k) : load_n(from[r] + k, K - k);
    UNROLL_FOR (int j = 0; j < J; j++) {
      const F a = load_factors(A + j * lda + k);
      UNROLL_FOR (int r = 0; r < R; r++) acc[r][j] = fma(v[r], a, acc[r][j]);
    }
  }
  UNROLL_FOR (int r = 0; r < R; r++)
    UNROLL_FOR (int j = 0; j < J; j++) h[rows[r] * ldh + j] = scale * sum(acc[r][j]);
}
// Ranks in tiles of J, then of half as many: most are powers of two.
template <int J, class Tile> INL void ranks_in_tiles(i64 j, i64 r, Tile tile) {
  for (; j + J <= r; j += J) tile.template operator()<J>(j);
  if constexpr (J > 1) ranks_in_tiles<J / 2>(j, r, tile);
}
template <class T>
static void down(const float* x, i64 ldx, const i64* rows, i64 M, i64 K, const LowRank& u, float* h, i64 ldh) {
  const T* A = reinterpret_cast<const T*>(u.A);
  const i64 lda = u.row / i64(sizeof(T));
  ranks_in_tiles<kDownRanks>(0, u.r, [&]<int J>(i64 j) {
    rows_of_tiles<kDownRows>(
        M, [&]<int R>(i64 m) { down_tile<R, J>(x, ldx, rows + m, K, A + j * lda, lda, u.scale, h + j, ldh); });
  });
}
static void lora_down(const float* x, i64 ldx, const i64* rows, i64 M, i64 K, const LowRank& u, float* h, i64 ldh) {
  u.half ? down<uint16_t>(x, ldx, rows, M, K, u, h, ldh) : down<float>(x, ldx, rows, M, K, u, h, ldh);
}

constexpr int kUpVectors = int(kPanel / L), kUpTile = kUpVectors < 2 ? kUpVectors : 2;

template <int R, class T>
static void up_tile(const float* h, i64 ldh, const i64* rows, i64 rank, const T* B, float* y, i64 ldy) {
  const float* from[R];
  F acc[R][kUpTile];
  UNROLL_FOR (int r = 0; r < R; r++) {
    from[r] = h + rows[r] * ldh;
    UNROLL_FOR (int v = 0; v < kUpTile; v++) acc[r][v] = zero();
  }
  for (i64 j = 0; j < rank; j++)
    UNROLL_FOR (int v = 0; v < kUpTile; v++) {
      const F b = load_factors(B + j * kPanel + v * L);
      UNROLL_FOR (int r = 0; r < R; r++) acc[r][v] = fma(set(from[r][j]), b, acc[r][v]);
    }
  UNROLL_FOR (int r = 0; r < R; r++)
    UNROLL_FOR (int v = 0; v < kUpTile; v++) {
      float* to = y + rows[r] * ldy + v * L;
      store(to, load(to) + acc[r][v]);
    }
}
template <class T>
static void up(const float* h, i64 ldh, const i64* rows, i64 M, const LowRank& u, i64 panel, i64 count, float* y,
               i64 ldy) {
  rows_of_tiles<kUpRows>(M, [&]<int R>(i64 m) {
    const T* B = reinterpret_cast<const T*>(u.B + panel * u.panel());
    for (i64 p = 0; p < count; p++, B += u.r * kPanel)
      for (i64 n = 0; n < kPanel; n += kUpTile * L) up_tile<R>(h, ldh, rows + m, u.r, B + n, y + p * kPanel + n, ldy);
  });
}
static void lora_up(const float* h, i64 ldh, const i64* rows, i64 M, const LowRank& u, i64 panel, i64 count, float* y,
                    i64 ldy) {
  u.half ? up<uint16_t>(h, ldh, rows, M, u, panel, count, y, ldy) : up<float>(h, ldh, rows, M, u, panel, count, y, ldy);
}

static void fill(Kernels& k) {
  k.lora_down = lora_down;
  k.lora_up = lora_up;
}
