// Products of the engine on AMX's tiles (csrc/cpu/tiles-inl.h); see product_tiles-inl.h.
//
// bf16: 32 k at a time, for any number of rows, one too: a row has its bits whatever it is computed with. The weights of a step
// are unpacked into L1 where the rows fit into two tiles, else the whole panel is unpacked before.
// int8: a tile product sums a group of 32 k for 16 rows and 16 outputs, which are then scaled and added in registers. These are
// integers, so the results are byte_tile's to the bit; rows that fill no tile are left to it.
//
// Floor, for 32 k: bf16, 32 rows and 32 outputs: four tile products and four loads. int8, 16 rows and 16 outputs: a product of
// half the depth, two loads and a store, then for each row an addition, a conversion, a product and a multiply-add.
#include "../cpu/tiles-inl.h"
#include "bf16_step-inl.h"

constexpr i64 kStep = 2 * kTile;                // values along k
constexpr i64 kStepBytes = kStep * kPanel * 2;  // of weights as pairs
constexpr i64 kStepsPerTile = kStep / Bf16Step::kDepth;

// The weights of values k to k + 32 of a panel of depth K as pairs, zeros past K.
static void unpack_step(const Bf16Step& step, const char* w, i64 k, i64 K, char* pairs) {
  w += k / Bf16Step::kDepth * Bf16Step::kBytes;
  for (i64 i = 0; i < kStepsPerTile; i++, w += Bf16Step::kBytes, pairs += 2 * PairStep::kBytes) {
    const bool some = k + i * Bf16Step::kDepth < K;
    if (some) prefetch_range(w + kAhead, Bf16Step::kBytes);
    UNROLL_FOR (int n = 0; n < kPanel; n += L) {
      istore(pairs + n * 4, some ? step.pairs<0>(w, n) : iset(0));
      istore(pairs + PairStep::kBytes + n * 4, some ? step.pairs<1>(w, n) : iset(0));
    }
  }
}

// Rows of x of the last values along k, which end in zeros here: what lies behind them in x may be anything.
struct LastStep {
  alignas(64) uint16_t rows[2 * kTile][kStep];
  LastStep(const Activations& x, i64 m, i64 M, i64 k, i64 K) {
    for (i64 r = 0; r < M; r++) istore(rows[r], load_halves(x.bf16 + (m + r) * x.stride + k, first_halves(K - k)));
  }
};

// R tiles of rows from m on, M of them; weights(k) are the pairs of a step.
template <int R, class Weights>
INL void pair_tiles(const Activations& x, i64 m, i64 M, i64 K, float* y, i64 ldy, Weights weights) {
  tiles_begin<R, 2>(nullptr, 0, false);
  i64 k = 0;
  for (; k + kStep <= K; k += kStep) tiles_step<R, 2>(x.bf16 + m * x.stride + k, x.stride * 2, weights(k), kPanel * 4);
  if (k < K) {
    const LastStep last(x, m, M, k, K);
    tiles_step<R, 2>(last.rows, kStep * 2, weights(k), kPanel * 4);
  }
  tiles_end<R, 2>(y + m * ldy, ldy * 4);
}
template <class Weights> INL void pair_rows(const Activations& x, i64 M, i64 K, float* y, i64 ldy, Weights weights) {
  Tiles tiles;
  i64 m = 0;
  if (M >= kTile) tiles.use(kTile, kTile);
  for (; m + 2 * kTile <= M; m += 2 * kTile) pair_tiles<2>(x, m, 2 * kTile, K, y, ldy, weights);
  if (m + kTile <= M) pair_tiles<1>(x, m, kTile, K, y, ldy, weights), m += kTile;
  if (m < M) {
    tiles.use(M - m, kTile);
    pair_tiles<1>(x, m, M - m, K, y, ldy, weights);
  }
  tiles.end();
}

static void bf16_product(const char* panel, const Activations& x, i64 M, i64 K, float* y, i64 ldy) {
  const Bf16Step step(panel);
  const char* w = panel + header_bytes(Format::bf16);
  if (M <= kTile || M == 2 * kTile) {  // one pass over the weights
    alignas(64) char pairs[kStepBytes];
    return pair_rows(x, M, K, y, ldy, [&](i64 k) __attribute__((always_inline)) {
      unpack_step(step, w, k, K, pairs);
      return static_cast<const char*>(pairs);
    });
  }
  char* pairs = static_cast<char*>(scratch(size_t(round_up(K, kStep) * kPanel * 2)));
  for (i64 k = 0; k < K; k += kStep) unpack_step(step, w, k, K, pairs + k * kPanel * 2);
  pair_rows(x, M, K, y, ldy,
            [&](i64 k) __attribute__((always_inline)) { return static_cast<const char*>(pairs + k * kPanel * 2); });
}

// 16 rows from m on, 16 outputs from n on.
static void byte_tiles(const char* w, int n, const Activations& x, i64 m, i64 K, float* y, i64 ldy) {
  const i64 groups = x.stride / kGroup;
  F acc[kTile];
  UNROLL_FOR (int r = 0; r < kTile; r++) acc[r] = zero();
  for (i64 g = 0; g * kGroup < K; g++, w += group_bytes(Format::int8)) {
    alignas(64) int32_t sums[kTile][kTile];
    tile_load<4>(x.q + m * x.stride + g * kGroup, x.stride);
    tile_load<6>(w + kPanel * 2 + n * 4, kPanel * 4);
    tile_zero<0>();
    tile_bytes<0, 4, 6>();
    tile_store<0>(sums, kTile * 4);
    const F scale = load_f16(reinterpret_cast<const uint16_t*>(w) + n);
    UNROLL_FOR (int r = 0; r < kTile; r++) {
      const i64 at = (m + r) * groups + g;
      const F total = to_float_signed(iadd(iload(sums[r]), broadcast4(x.acc_init + at)));
      acc[r] = fma(total, scale * set(x.scale[at]), acc[r]);
    }
  }
  UNROLL_FOR (int r = 0; r < kTile; r++) store(y + (m + r) * ldy + n, acc[r]);
}
static void (*base_int8)(const char*, const Activations&, i64, i64, float*, i64);  // of avx512_bf16
static void int8_product(const char* w, const Activations& x, i64 M, i64 K, float* y, i64 ldy) {
  i64 m = 0;
  if (M >= kTile) {
    Tiles tiles;
    tiles.use(kTile, kGroup / 4);
    for (; m + kTile <= M; m += kTile) {
      byte_tiles(w, 0, x, m, K, y, ldy);
      byte_tiles(w, int(kTile), x, m, K, y, ldy);
    }
    tiles.end();
  }
  if (m < M) base_int8(w, x.from(m), M - m, K, y + m * ldy, ldy);
}

static void fill(Kernels& k) {
  base_int8 = k.product[int(Format::int8)];
  k.product[int(Format::bf16)] = bf16_product;
  k.product[int(Format::int8)] = int8_product;
}
