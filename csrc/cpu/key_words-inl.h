// Keys as factors of the products of causal_attention that sum over keys: how they lie, their packing, and what keeps nan of
// keys that a query does not see away from it.
#pragma once
#include "attention_tile-inl.h"

// Where the values of keys lie for products that sum over keys: word w (PAIR: of keys 2 w and 2 w + 1) of channel d at
// w * key + d * channel. By rows of channels where AMX's tiles read them; these rows spread over L1's sets.
struct KeyWords {
  i64 key, channel, size;  // size: words of all
};
template <bool PAIR> INL KeyWords key_words(const AttentionParams& p) {
  const i64 words = round_up(p.S, kKeys) / (PAIR ? 2 : 1);
  if (kTiles && PAIR) return {1, words + 16, p.D * (words + 16)};
  return {p.D, 1, words * p.D + L};
}
#ifdef GPTFAST_PAIRS
constexpr i64 kKeysPacked = kTiles ? 2 * L : 2;  // keys that are packed together
// Keys [begin, end) of a head, begin a multiple of kKeysPacked; what is missing of the last ones counts as 0.
static void pack_key_words(uint32_t* out, const KeyWords& to, const KeyRows& row, i64 begin, i64 end, i64 D) {
  if constexpr (!kTiles) return pack_row_pairs(out + begin / 2 * D, D, row, begin, end, D);
  for (i64 j = begin; j < end; j += 2 * L)
    for (i64 d = 0; d < D; d += L) {
      const auto lanes = first_words(D - d);
      I x[L];
      for (i64 i = 0; i < L; i++) {
        const i64 first = j + 2 * i;
        const I low = first < end ? load_u16(static_cast<const uint16_t*>(row(first)) + d, lanes) : iset(0);
        const I high = first + 1 < end ? load_u16(static_cast<const uint16_t*>(row(first + 1)) + d, lanes) : iset(0);
        x[i] = ior(low, shl16(high));
      }
      transpose(x);
      for (i64 i = 0; i < L && d + i < D; i++) istore(out + (d + i) * to.channel + j / 2, x[i]);
    }
}
#endif

// Are rows [0, n) of `stride` words all finite? Scans fp32 values, or halves of words with PAIR.
template <bool PAIR> static bool all_finite(const uint32_t* x, i64 stride, i64 n, i64 words) {
  uint32_t bad = 0;
  for (i64 j = 0; j < n; j++)
    for (i64 w = 0; w < words; w++) {
      uint32_t u;
      __builtin_memcpy(&u, x + j * stride + w, 4);
      if constexpr (PAIR) bad |= ((u & 0x7f80u) == 0x7f80u) | ((u & 0x7f800000u) == 0x7f800000u);
      else bad |= (u & 0x7f800000u) == 0x7f800000u;
    }
  return !bad;
}
// The same of n words of keys, from x on.
template <bool PAIR> APART static bool finite_keys(const uint32_t* x, const KeyWords& at, i64 n, i64 D) {
  return at.channel == 1 ? all_finite<PAIR>(x, at.key, n, D) : all_finite<PAIR>(x, at.channel, D, n);
}
// block[d][query] += sum_j x[j][d] a[j][query] over a group, leaving out every a that is 0: nan and inf of keys that a
// query does not see stay away from it. Slow; used only when such keys are about.
template <bool PAIR>
APART static void guarded_product(float* block, const uint32_t* x, const KeyWords& at, const uint32_t* a,
                                  const Group& g, i64 D) {
  for (i64 j = g.begin; j < g.end; j++)
    for (int v = g.va; v < g.vb; v++) {
      I w = iload(a + (PAIR ? j / 2 : j) * kQueries + v * L);
      if (PAIR) w = j % 2 ? iand(w, iset(0xffff0000u)) : shl16(w);
      const F weight = as_float(w);
      for (i64 d = 0; d < D; d++) {
        uint32_t u;
        __builtin_memcpy(&u, x + (PAIR ? j / 2 : j) * at.key + d * at.channel, 4);
        if (PAIR) u = j % 2 ? u & 0xffff0000u : u << 16;
        float* out = block + d * kQueries + v * L;
        const F sum = load(out);
        store(out, select(eq(weight, zero()), sum, fma(as_float(iset(u)), weight, sum)));
      }
    }
}
