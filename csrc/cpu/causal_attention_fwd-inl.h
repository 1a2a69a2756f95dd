// Forward of causal_attention: out = softmax(scale q k^T + mask) v by tiles of 64 queries x 64 keys with a running
// maximum and sum per query (Milakov and Gimelshein, arXiv 1805.02867; FlashAttention, arXiv 2205.14135).
//
//   S^T[j][i] = sum_d k[j][d] q^T[d][i]      k broadcast as it lies, q^T packed once per block
//   O^T[d][i] = sum_j v[j][d] P^T[j][i]      v broadcast as it lies (AMX: turned once a key head), P^T as produced
//
// Floor: 4 T S D flops a query head, half of them under a causal mask; k and v are read once a group of query heads.
// Where the CPU multiplies bf16 (PAIR) k and q are read as pairs along d, v and P as pairs along j; elsewhere
// half-precision inputs are widened to fp32 once a key head.
#include "key_words-inl.h"

template <bool PAIR> struct AttentionForward {
  const AttentionParams& p;
  const i64 b, h, D, words;
  const DropoutKey dropout;
  const F scale;  // of scores, in units of log2
  Visible visible;
  uint32_t *q, *k_packed, *v_packed, *pairs;
  float *s, *o, *m, *l, *alpha;
  const uint32_t *k, *v;  // words of all keys: rows k[j * k_stride], and v as v_words says
  const KeyWords v_words;
  i64 k_stride, packed = 0;

  // k as it lies serves when its rows are words without gaps; gaps are packed away, as rows kilobytes apart collide in L1
  bool k_direct() const { return PAIR ? p.k.st == D && D % 2 == 0 : p.dtype == DType::f32 && p.k.st == D; }
  bool v_direct() const { return !PAIR && p.dtype == DType::f32 && p.v.st == D; }

  void carve(Arena a) {
    q = a.take<uint32_t>(words * kQueries);
    s = a.take<float>(kKeys * kQueries);
    pairs = PAIR ? a.take<uint32_t>(kKeys / 2 * kQueries) : reinterpret_cast<uint32_t*>(s);
    o = a.take<float>(round_up(D, L) * kQueries);
    m = a.take<float>(kQueries);
    l = a.take<float>(kQueries);
    alpha = a.take<float>(kQueries);
    k_packed = a.take<uint32_t>(k_direct() ? 0 : round_up(p.S, kKeys) * words + L);
    v_packed = a.take<uint32_t>(v_direct() ? 0 : v_words.size);
    bytes = a.used;
  }
  size_t bytes = 0;

  AttentionForward(const AttentionParams& params, i64 bh)
      : p(params), b(bh / key_heads(p)), h(bh % key_heads(p)), D(p.D), words(words_of<PAIR>(D)),
        dropout(dropout_key(p, b)), scale(set(scale_of(p) * kLog2e)), v_words(key_words<PAIR>(p)) {
    carve({nullptr});
    carve({static_cast<char*>(scratch(bytes))});
    k = k_direct() ? static_cast<const uint32_t*>(head_row(p.k, p.dtype, b, h, 0)) : k_packed;
    v = v_direct() ? static_cast<const uint32_t*>(head_row(p.v, p.dtype, b, h, 0)) : v_packed;
    k_stride = words;
  }

  APART void pack_keys(i64 end) {  // makes keys [0, end) available
    if (end <= packed) return;
    if (!k_direct()) pack_rows<PAIR>(k_packed, words, KeyRows{p.k, p.dtype, b, h}, packed, end, D);
    if constexpr (PAIR) {
#ifdef GPTFAST_PAIRS
      const i64 from = packed / kKeysPacked * kKeysPacked;  // what was missing at the end counted as 0
      pack_key_words(v_packed, v_words, KeyRows{p.v, p.dtype, b, h}, from, end, D);
#endif
    } else if (!v_direct()) {
      pack_rows<PAIR>(v_packed, D, KeyRows{p.v, p.dtype, b, h}, packed, end, D);
    }
    packed = end;
  }

  const uint32_t* v_rows(i64 j) const { return v + (PAIR ? j / 2 : j) * v_words.key; }

  // s -> P^T of one vector of queries over one group of keys; returns nothing, updates m, l, alpha of the vector.
  template <bool DROP, bool EDGE> APART void softmax(int v, i64 j0, const Group* groups, int n) {
    float* sv = s + v * L;
    F top = load(m + v * L);
    for (int g = 0; g < n; g++) {
      if (v < groups[g].va || v >= groups[g].vb) continue;
      for (i64 j = groups[g].begin; j < groups[g].end; j++) {
        F x = load(sv + j * kQueries);
        if (EDGE) store(sv + j * kQueries, x = select(is_visible(visible, v, j0 + j), x, set(kMasked)));
        top = max(x, top);
      }
    }
    // The maximum is taken off before the scale: scale * maximum is rounded, for large scores by more than exp2 has room
    // for. Where products are of bf16 and the other half of the work, it is taken off in a pass of its own, and only where
    // it is large: the rounding is then seen.
    const F rescale = exp2<6>((load(m + v * L) - top) * scale);
    F shift = top * scale;
    if (PAIR && bits(lt(set(kFar), abs(shift)))) {
      for (int g = 0; g < n; g++)
        if (v >= groups[g].va && v < groups[g].vb)
          for (i64 j = groups[g].begin; j < groups[g].end; j++) store(sv + j * kQueries, load(sv + j * kQueries) - top);
      shift = zero();
    }
    const auto weight = [scale = scale, top, shift](F s) __attribute__((always_inline)) {
      return PAIR ? exp2<4>(s * scale - shift) : exp2<6>((s - top) * scale);
    };
    store(m + v * L, top);
    store(alpha + v * L, rescale);
    F sum0 = zero(), sum1 = zero();
    I drawn[16];
    i64 have_bits = -1;
    for (int g = 0; g < n; g++) {
      if (v < groups[g].va || v >= groups[g].vb) continue;
      for (i64 j = groups[g].begin; j < groups[g].end; j += 2) {
        if (DROP && have_bits != (j0 + j) / 32) {
          have_bits = (j0 + j) / 32;
          dropout_words(dropout, visible, v, have_bits * 32, drawn);
        }
        F x = weight(load(sv + j * kQueries)), y = weight(load(sv + (j + 1) * kQueries));
        if (EDGE) {
          x = select_or_zero(is_visible(visible, v, j0 + j), x);
          y = select_or_zero(is_visible(visible, v, j0 + j + 1), y);
        }
        sum0 = sum0 + x;
        sum1 = sum1 + y;
        if (DROP) {
          const I w = drawn[(j0 + j) / 2 % 16];
          x = select_or_zero(keeps_even(dropout, w), x);
          y = select_or_zero(keeps_odd(dropout, w), y);
        }
        if constexpr (PAIR) {
#ifdef GPTFAST_PAIRS
          istore(pairs + j / 2 * kQueries + v * L, pair_bf16(x, y));
#endif
        } else {
          store(sv + j * kQueries, x);
          store(sv + (j + 1) * kQueries, y);
        }
      }
    }
    store(l + v * L, fma(load(l + v * L), rescale, sum0 + sum1));
  }

  // O^T += V^T P^T over one group.
  APART void accumulate_pv(TileOp op, i64 j0, const Group& g) {
    const i64 from = PAIR ? g.begin / 2 : g.begin, count = PAIR ? (g.end - g.begin + 1) / 2 : g.end - g.begin;
    product<PAIR>({op, v_rows(j0 + g.begin), v_words.channel, v_words.key, pairs + from * kQueries + g.va * L, kQueries,
                   count, o + g.va * L, kQueries, D, g.vb - g.va, alpha + g.va * L});
  }
  APART void rescale_output() {
    for (i64 d = 0; d < D; d++)
      for (int v = 0; v < kVectors; v++) {
        float* x = o + d * kQueries + v * L;
        store(x, load(x) * load(alpha + v * L));
      }
  }

  template <bool DROP> void softmax_of(bool edge, i64 j0, const Group* groups, int n) {
    for (int v = 0; v < visible.vectors; v++)
      edge ? softmax<DROP, true>(v, j0, groups, n) : softmax<DROP, false>(v, j0, groups, n);
  }
  APART void key_tile(i64 j0, bool first) {
    const i64 keys = visible.last - j0 < kKeys ? visible.last - j0 : kKeys;
    Group groups[kKeys / kGroup];
    bool edge;
    const int n = tile_groups(visible, j0, keys, groups, &edge);
    for (int g = 0; g < n; g++)
      product<PAIR>({TileOp::set, k + (j0 + groups[g].begin) * k_stride, k_stride, 1, q + groups[g].va * L, kQueries,
                     words, s + groups[g].begin * kQueries + groups[g].va * L, kQueries,
                     groups[g].end - groups[g].begin, groups[g].vb - groups[g].va, nullptr});
    if (p.softcap > 0.f) cap_scores(s, groups, n, p.scale / p.softcap);
    p.dropout.threshold ? softmax_of<true>(edge, j0, groups, n) : softmax_of<false>(edge, j0, groups, n);
    if (!edge) return accumulate_pv(first ? TileOp::set : TileOp::scale, j0, groups[0]);
    if (first) __builtin_memset(o, 0, size_t(D * kQueries) * 4);
    else rescale_output();
    const bool finite = finite_keys<PAIR>(v_rows(j0), v_words, PAIR ? (keys + 1) / 2 : keys, D);
    for (int g = 0; g < n; g++) {
      if (finite) accumulate_pv(TileOp::accumulate, j0, groups[g]);
      else guarded_product<PAIR>(o, v_rows(j0), v_words, pairs, groups[g], D);
    }
  }

  void block(i64 r0) {
    const i64 rows = p.T * p.group, queries = rows - r0 < kQueries ? rows - r0 : kQueries;
    visible_keys(visible, p, b, h, r0, queries);
    pack_keys(visible.last);
    pack_transposed<PAIR>(q, {p.q, p.dtype, b, visible}, queries, D);
    for (int v = 0; v < kVectors; v++) {
      store(m + v * L, set(kMasked));
      store(l + v * L, zero());
    }
    const i64 j_first = visible.first / kKeys * kKeys;
    if (visible.last <= visible.first) __builtin_memset(o, 0, size_t(D * kQueries) * 4);
    for (i64 j0 = j_first; j0 < visible.last; j0 += kKeys) key_tile(j0, j0 == j_first);
    finish(queries);
  }

  // The sink of each row joins its sum l, which is then relative to the larger one of the row's maximum and its sink, and
  // what it adds to level lies in `lift`. Sums of before are to be multiplied by `fade`. A row that saw no key has its
  // sink alone.
  APART void add_sinks(float* lift, float* fade) {
    for (i64 i = 0; i < kQueries; i++) {
      const bool blind = l[i] == 0.f;
      if (blind) m[i] = 0.f;
      const float sink = p.sinks[visible.head[i]] * kLog2e, beyond = sink - m[i] * scale_of(p) * kLog2e;
      lift[i] = __builtin_fmaxf(beyond, blind ? kMasked : 0.f);
      fade[i] = blind ? 0.f : __builtin_exp2f(-lift[i]);
      l[i] = l[i] * fade[i] + __builtin_exp2f(beyond - lift[i]);
    }
  }
  APART void finish(i64 queries) {  // normalise and write; a query that saw no key gives 0 and level -inf
    const float kept = p.dropout.threshold ? dropout.scale : 1.f;
    float *lift = s, *fade = s + kQueries;  // the scores of the last tile are no longer needed
    if (p.sinks) add_sinks(lift, fade);
    for (int v = 0; v < kVectors; v++) {
      const F total = load(l + v * L);
      store(alpha + v * L, select(eq(total, zero()), zero(), set(kept) / total));
      if (p.sinks) store(alpha + v * L, load(alpha + v * L) * load(fade + v * L));
    }
    unpack_transposed({p.y, p.dtype, b, visible}, queries, D, o, alpha);
    for (i64 i = 0; i < queries; i++) {
      const i64 row = statistics_of(p, b, visible, i);
      p.shift[row] = l[i] == 0.f ? 0.f : m[i];
      p.level[row] = l[i] == 0.f ? -__builtin_inff() : __builtin_log2f(l[i]) + (p.sinks ? lift[i] : 0.f);
    }
  }
};

template <bool PAIR> static void attention_forward(const AttentionParams& p, i64 bh, i64 first, i64 step) {
  AttentionForward<PAIR> f(p, bh);
  for (i64 r0 = first * kQueries; r0 < p.T * p.group; r0 += step * kQueries) f.block(r0);
  end_products();
}
static void causal_attention_fwd(const AttentionParams& p, i64 bh, i64 first, i64 step) {
#ifdef GPTFAST_PAIRS
  if (p.dtype == DType::bf16) return attention_forward<true>(p, bh, first, step);
#endif
  if constexpr (kOnlyBf16) base.causal_attention_fwd(p, bh, first, step);
  else attention_forward<false>(p, bh, first, step);
}

static void fill(Kernels& k) {
  own_table = &k;
  k.causal_attention_fwd = causal_attention_fwd;
}
