// Products of the engine on AMX's tiles (csrc/cpu/tiles-inl.h); see product_tiles-inl.h.
//
// bf16: 32 k at a time, for any number of rows, one too: a row has its bits whatever it is computed with. Where the rows fit into
// two tiles the weights of a step are unpacked into L1; else those of 256 k are, and all rows of x are multiplied by them.
// int8: a tile product sums a group of 32 k for 16 rows and 16 outputs, which are then scaled and added in registers. These are
// integers, so the results are byte_tile's to the bit; rows that fill no tile are left to it.
//
// Floor, for 32 k: bf16, 32 rows and 32 outputs: four tile products and four loads. int8, 16 rows and 16 outputs: a product of
// half the depth, two loads and a store, then for each row a conversion, a product and a multiply-add, which wait for the port that
// tile products and stores take too.
#include "../cpu/tiles-inl.h"
#include "bf16_step-inl.h"

constexpr i64 kStep = 2 * kTile;                // values along k
constexpr i64 kStepBytes = kStep * kPanel * 2;  // of weights as pairs
constexpr i64 kStepsPerTile = kStep / Bf16Step::kDepth;
constexpr i64 kBlock = 256;  // values along k of weights that are unpacked for more rows: 16 KB of L1
constexpr i64 kBlockBytes = kBlock / Bf16Step::kDepth * Bf16Step::kBytes;  // of them as they are packed

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

// What is asked for while rows are multiplied, a part of it a tile.
struct Ahead {
  const char* next = nullptr;
  i64 bytes = 0;
  INL_MEMBER void ask(i64 m, i64 rows, i64 M) const {
    for (i64 i = bytes * m / M / 64 * 64; i < bytes * (m + rows) / M; i += 64) prefetch(next + i);
  }
};
// R tiles of rows from m on, M of them, added to y or not; weights(k) are the pairs of a step.
template <int R, class Weights>
INL void pair_tiles(const Activations& x, i64 m, i64 M, i64 K, float* y, i64 ldy, bool add, Weights weights) {
  tiles_begin<R, 2>(y + m * ldy, ldy * 4, add);
  i64 k = 0;
  for (; k + kStep <= K; k += kStep) tiles_step<R, 2>(x.bf16 + m * x.stride + k, x.stride * 2, weights(k), kPanel * 4);
  if (k < K) {
    const LastStep last(x, m, M, k, K);
    tiles_step<R, 2>(last.rows, kStep * 2, weights(k), kPanel * 4);
  }
  tiles_end<R, 2>(y + m * ldy, ldy * 4);
}
template <class Weights>
INL void pair_rows(const Activations& x, i64 M, i64 K, float* y, i64 ldy, bool add, const Ahead& ahead,
                   Weights weights) {
  Tiles tiles;
  i64 m = 0;
  if (M >= kTile) tiles.use(kTile, kTile);
  for (; m + 2 * kTile <= M; m += 2 * kTile) {
    ahead.ask(m, 2 * kTile, M);
    pair_tiles<2>(x, m, 2 * kTile, K, y, ldy, add, weights);
  }
  if (m + kTile <= M) pair_tiles<1>(x, m, kTile, K, y, ldy, add, weights), m += kTile;
  if (m < M) {
    tiles.use(M - m, kTile);
    pair_tiles<1>(x, m, M - m, K, y, ldy, add, weights);
  }
  tiles.end();
}

// In one pass over the weights.
static void few_rows(const char* panel, const Activations& x, i64 M, i64 K, float* y, i64 ldy) {
  const Bf16Step step(panel);
  const char* w = panel + header_bytes(Format::bf16);
  alignas(64) char pairs[kStepBytes];
  pair_rows(x, M, K, y, ldy, false, {}, [&](i64 k) __attribute__((always_inline)) {
    unpack_step(step, w, k, K, pairs);
    return static_cast<const char*>(pairs);
  });
}
// Of values [k, k + depth) along k of a panel, for all rows; the sums begin as 0 where k is 0, else as y.
static void add_block(const char* panel, i64 k, i64 depth, const Ahead& ahead, const Activations& x, i64 M, float* y,
                      i64 ldy) {
  const Bf16Step step(panel);
  const char* w = panel + header_bytes(Format::bf16) + k / Bf16Step::kDepth * Bf16Step::kBytes;
  alignas(64) char pairs[kBlock * kPanel * 2];
  for (i64 i = 0; i < depth; i += kStep) unpack_step(step, w, i, depth, pairs + i * kPanel * 2);
  pair_rows(x.columns(k), M, depth, y, ldy, k > 0, ahead,
            [&](i64 i) __attribute__((always_inline)) { return static_cast<const char*>(pairs + i * kPanel * 2); });
}
static void bf16_products(const char* panels, i64 count, const Activations& x, i64 M, i64 K, float* y, i64 ldy) {
  const i64 bytes = panel_bytes(Format::bf16, K);
  if (M <= kTile || M == 2 * kTile) {
    for (i64 p = 0; p < count; p++) few_rows(panels + p * bytes, x, M, K, y + p * kPanel, ldy);
    return;
  }
  for (i64 k = 0; k < K; k += kBlock)
    for (i64 p = 0; p < count; p++) {
      const char* next = p + 1 < count ? panels + (p + 1) * bytes : panels + kBlockBytes;
      const Ahead ahead{next + header_bytes(Format::bf16) + k / Bf16Step::kDepth * Bf16Step::kBytes, kBlockBytes};
      add_block(panels + p * bytes, k, K - k < kBlock ? K - k : kBlock, ahead, x, M, y + p * kPanel, ldy);
    }
}
static void bf16_product(const char* panel, const Activations& x, i64 M, i64 K, float* y, i64 ldy) {
  bf16_products(panel, 1, x, M, K, y, ldy);
}

// ---- int8 ---------------------------------------------------------------------------------------------------------------

template <int N> struct Slot {
  static constexpr int value = N;
};
constexpr i64 kGroups = 16, kGroupBytes = group_bytes(Format::int8);  // groups that are made signed together, in L1

// Rows r, r + 1, … of 16 at 4r + {0, 1, 2, 3} rows from the first: four addresses and two strides for 16 rows, in registers.
struct SixteenRows {
  const float* first[4];
  i64 row, third;
  SixteenRows(const float* p, i64 row) : first{p, p + 4 * row, p + 8 * row, p + 12 * row}, row(row), third(3 * row) {
    asm("" : "+r"(this->row), "+r"(this->third));
  }
  template <int R> INL_MEMBER float at() const {
    constexpr int i = R % 4;
    return first[R / 4][i == 0 ? 0 : i == 1 ? row : i == 2 ? 2 * row : third];
  }
  INL_MEMBER void next() {
    UNROLL_FOR (int i = 0; i < 4; i++) {
      first[i]++;
      asm("" : "+r"(first[i]));
    }
  }
};
// The integer sums of a group into tile T, and from there into memory.
template <int T> INL void sum_group(const int8_t* q, i64 stride, const char* codes, int32_t* sums) {
  tile_load<4 + T>(q, stride);
  tile_load<6 + T>(codes, kPanel * 4);
  tile_zero<T>();
  tile_signed_bytes<T, 4 + T, 6 + T>();
  tile_store<T>(sums + T * kTile * kTile, kTile * 4);
}
template <int R = 0> INL void add_group(const int32_t* sums, F scale, const SixteenRows& x_scale, F (&acc)[kTile]) {
  if constexpr (R < kTile) {
    const F both_scales = scale * set(x_scale.at<R>());
    acc[R] = fma(to_float_signed(iload(sums + R * kTile)), both_scales, acc[R]);
    add_group<R + 1>(sums, scale, x_scale, acc);
  }
}
// 16 rows from m on, 16 outputs from n on, `count` groups of signed bytes from group g on. The sums of a group are on their way through
// tiles and memory while those of the one before are scaled.
static void byte_tiles(const char* w, int n, const Activations& x, i64 m, i64 g, i64 count, float* y, i64 ldy) {
  alignas(64) int32_t sums[2 * kTile * kTile];
  F acc[kTile];
  UNROLL_FOR (int r = 0; r < kTile; r++) acc[r] = g ? load(y + (m + r) * ldy + n) : zero();
  const int8_t* q = x.q + m * x.stride + g * kGroup;
  const char *codes = w + kPanel * 2 + n * 4, *scales = w + n * 2;
  SixteenRows x_scale(x.scale + m * (x.stride / kGroup) + g, x.stride / kGroup);
  const auto sum = [&](auto t) __attribute__((always_inline)) {
    sum_group<t.value>(q, x.stride, codes, sums);
    q += kGroup, codes += kGroupBytes;
  };
  const auto add = [&](auto t) __attribute__((always_inline)) {
    add_group(sums + t.value * kTile * kTile, load_f16(reinterpret_cast<const uint16_t*>(scales)), x_scale, acc);
    scales += kGroupBytes;
    x_scale.next();
  };
  sum(Slot<0>());
  i64 i = 0;
  for (; i + 2 < count; i += 2) sum(Slot<1>()), add(Slot<0>()), sum(Slot<0>()), add(Slot<1>());
  if (i + 1 < count) sum(Slot<1>()), add(Slot<0>()), add(Slot<1>());
  else add(Slot<0>());
  UNROLL_FOR (int r = 0; r < kTile; r++) store(y + (m + r) * ldy + n, acc[r]);
}
// Unsigned bytes w + offset as signed ones.
static void make_signed(const char* from, i64 groups, int offset, char* to) {
  const I more = iset(0x01010101u * uint32_t(128 - offset)), sign = iset(0x80808080u);
  for (i64 g = 0; g < groups; g++, from += kGroupBytes, to += kGroupBytes) {
    __builtin_memcpy(to, from, kPanel * 2);
    UNROLL_FOR (i64 i = kPanel * 2; i < kGroupBytes; i += 64)
      istore(to + i, wxor3(iadd(iload(from + i), more), sign, iset(0)));
  }
}
static void (*base_int8)(const char*, const Activations&, i64, i64, float*, i64);  // of avx512_bf16
static void int8_product(const char* w, const Activations& x, i64 M, i64 K, float* y, i64 ldy) {
  const i64 whole = M / kTile * kTile, groups = (K + kGroup - 1) / kGroup;
  if (whole) {
    alignas(64) char block[kGroups * kGroupBytes];
    Tiles tiles;
    tiles.use(kTile, kGroup / 4);
    for (i64 g = 0; g < groups; g += kGroups) {
      const i64 count = groups - g < kGroups ? groups - g : kGroups;
      make_signed(w + g * kGroupBytes, count, x.offset, block);
      for (i64 m = 0; m < whole; m += kTile) {
        byte_tiles(block, 0, x, m, g, count, y, ldy);
        byte_tiles(block, int(kTile), x, m, g, count, y, ldy);
      }
    }
    tiles.end();
  }
  if (whole < M) base_int8(w, x.from(whole), M - whole, K, y + whole * ldy, ldy);
}

static void fill(Kernels& k) {
  k.most_rows = kMostRows, k.gathers = true;
  base_int8 = k.product[int(Format::int8)];
  k.product[int(Format::bf16)] = bf16_product;
  k.products[int(Format::bf16)] = bf16_products;
  k.product[int(Format::int8)] = int8_product;
}
