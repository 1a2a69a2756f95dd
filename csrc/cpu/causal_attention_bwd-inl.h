// Backward of causal_attention (FlashAttention-2, arXiv 2307.08691, section 3.1.2): one key head at a time, blocks of
// its rows (attention_tile-inl.h) outside, key tiles inside, every sum in one fixed order and no atomics, so gradients
// repeat bit for bit.
//
//   P^T = exp2(c (k q^T - shift) - level)    dP^T = v dout^T             delta_i = sum_d out[i][d] dout[i][d]
//   dv[j] += sum_i P'[i][j] dout[i]         dS^T = P^T (keep dP^T / (1 - p) - delta)      P' = dropped P
//   dk[j] += sum_i dS[i][j] q[i]            dq^T[d][i] += sum_j k[j][d] dS^T[j][i]
//
// With a soft cap S^T = tanh(inner k q^T), c that of the cap, and dS^T has the factor 1 - S^T^2. The sink of a head has the
// weight p_i = exp2(sink log2(e) - c shift - level) in row i and the value 0: dsink = -sum_i p_i delta_i.
//
// Floor: 10 T S D flops a query head, half of them under a causal mask; k and v are read, dk and dv written once a group.
//
// dk[j] and dv[j] are summed in fp32: blocks of 64 rows in their order; within a block, rows in their order. With a group
// of query heads that is by query, then by head, and rounding to the dtype comes after the whole group.
// Where key heads are few, the blocks of each are dealt to a number of slices that depends on the shape alone; their
// sums of dk and dv are added in the order of the slices, so the threads do not show in the bits.
#include "key_words-inl.h"

INL i64 key_gradient_floats(const AttentionParams& p) {
  return p.S * round_up(p.D, 16);
}  // room for dk or dv of a slice

// dk and dv of a head from the sums of its slices, each followed by the next 2 * key_gradient_floats later.
APART static void write_key_gradients(const AttentionParams& p, i64 bh, const float* dk, const float* dv, i64 slices) {
  const i64 b = bh / key_heads(p), h = bh % key_heads(p), stride = round_up(p.D, L), next = 2 * key_gradient_floats(p);
  const F to_dk = set(p.scale), to_dv = set(p.dropout.threshold ? dropout_key(p, b).scale : 1.f);
  for (i64 j = 0; j < p.S; j++)
    for (i64 d = 0; d < p.D; d += L) {
      const i64 n = p.D - d < L ? p.D - d : L, from = j * stride + d;
      F k_sum = load(dk + from), v_sum = load(dv + from);
      for (i64 slice = 1; slice < slices; slice++) {
        k_sum = k_sum + load(dk + slice * next + from);
        v_sum = v_sum + load(dv + slice * next + from);
      }
      store_any(at(head_row(p.dk, p.dtype, b, h, j), p.dtype, d), p.dtype, k_sum * to_dk, n);
      store_any(at(head_row(p.dv, p.dtype, b, h, j), p.dtype, d), p.dtype, v_sum * to_dv, n);
    }
}
#ifndef GPTFAST_TILES
static void causal_attention_bwd_sum(const AttentionParams& p, i64 bh, i64 slices) {
  const float* dk = p.partial + bh * slices * 2 * key_gradient_floats(p);
  write_key_gradients(p, bh, dk, dk + key_gradient_floats(p), slices);
}
#endif

template <bool PAIR> struct AttentionBackward {
  const AttentionParams& p;
  const i64 b, h, D, words, stride;  // stride: D rounded up to whole vectors, for rows whose lanes are d
  static constexpr i64 kRow = PAIR ? kQueries / 2 : kQueries;  // words of a row of P^T or dS^T
  const DropoutKey dropout;
  const F scale;
  Visible visible;
  uint32_t *q_t, *g_t, *q_rows, *g_rows;    // q and dout: transposed; rows (PAIR: pairs of rows)
  uint32_t *k_packed, *v_packed, *k_pairs;  // keys as words along d, and (PAIR) as pairs along j
  uint32_t *p_rows, *ds_rows, *ds_lanes;    // P', dS as words along i; dS with queries in the lanes
  float *s, *dp, *dq, *shift, *minus_level, *delta, *dk, *dv, *factor;
  const uint32_t *k, *v, *k_for_dq;
  const KeyWords k_words;  // how k_for_dq lies
  size_t bytes = 0;

  bool direct(const Heads& x) const { return PAIR ? x.st == D && D % 2 == 0 : p.dtype == DType::f32 && x.st == D; }
  void carve(Arena a) {
    const i64 keys = round_up(p.S, kKeys);
    q_t = a.take<uint32_t>(words * kQueries);
    g_t = a.take<uint32_t>(words * kQueries);
    q_rows = a.take<uint32_t>(kRow * stride);
    g_rows = a.take<uint32_t>(kRow * stride);
    s = a.take<float>(kKeys * kQueries);
    dp = a.take<float>(kKeys * kQueries);
    p_rows = PAIR ? a.take<uint32_t>(kKeys * kRow) : reinterpret_cast<uint32_t*>(s);
    ds_rows = PAIR ? a.take<uint32_t>(kKeys * kRow) : reinterpret_cast<uint32_t*>(dp);
    ds_lanes = PAIR ? a.take<uint32_t>(kKeys / 2 * kQueries) : ds_rows;
    dq = a.take<float>(round_up(D, L) * kQueries);
    shift = a.take<float>(kQueries);
    minus_level = a.take<float>(kQueries);
    delta = a.take<float>(kQueries);
    factor = a.take<float>(kQueries);
    k_packed = a.take<uint32_t>(direct(p.k) ? 0 : keys * words + L);
    v_packed = a.take<uint32_t>(direct(p.v) ? 0 : keys * words + L);
    k_pairs = a.take<uint32_t>(PAIR ? k_words.size : 0);
    dk = a.take<float>(p.partial ? 0 : p.S * stride);
    dv = a.take<float>(p.partial ? 0 : p.S * stride);
    bytes = a.used;
  }

  AttentionBackward(const AttentionParams& params, i64 bh, i64 slice, i64 slices)
      : p(params), b(bh / key_heads(p)), h(bh % key_heads(p)), D(p.D), words(words_of<PAIR>(D)), stride(round_up(D, L)),
        dropout(dropout_key(p, b)), scale(set(scale_of(p) * kLog2e)), k_words(key_words<PAIR>(p)) {
    carve({nullptr});
    carve({static_cast<char*>(scratch(bytes))});
    if (p.partial) {
      dk = p.partial + (bh * slices + slice) * 2 * key_gradient_floats(p);
      dv = dk + key_gradient_floats(p);
    }
    k = direct(p.k) ? static_cast<const uint32_t*>(head_row(p.k, p.dtype, b, h, 0)) : k_packed;
    v = direct(p.v) ? static_cast<const uint32_t*>(head_row(p.v, p.dtype, b, h, 0)) : v_packed;
    k_for_dq = PAIR ? k_pairs : k;
    const KeyRows k_rows{p.k, p.dtype, b, h}, v_rows{p.v, p.dtype, b, h};
    if (!direct(p.k)) pack_rows<PAIR>(k_packed, words, k_rows, 0, p.S, D);
    if (!direct(p.v)) pack_rows<PAIR>(v_packed, words, v_rows, 0, p.S, D);
#ifdef GPTFAST_PAIRS
    if (PAIR) pack_key_words(k_pairs, k_words, k_rows, 0, p.S, D);
#endif
    __builtin_memset(dk, 0, size_t(p.S * stride) * 4);
    __builtin_memset(dv, 0, size_t(p.S * stride) * 4);
  }

  const uint32_t* dq_rows(i64 j) const { return k_for_dq + (PAIR ? j / 2 : j) * k_words.key; }

  // Rows of a block with d in the lanes, zeros past the last query and past D.
  APART void pack_lanes(uint32_t* out, const LaneRows<Heads>& row, i64 queries) {
    __builtin_memset(out, 0, size_t(kRow * stride) * 4);
    if constexpr (PAIR) {
#ifdef GPTFAST_PAIRS
      pack_row_pairs(out, stride, row, 0, queries, D);
#endif
    } else {
      pack_rows<PAIR>(out, stride, row, 0, queries, D);
    }
  }
  // delta is summed as dP^T is: a query that sees one key only, as nearly all do where scores are large, has delta = dP to
  // the bit, and dS = 0.
  APART void row_statistics(i64 queries) {
    auto* o_t = reinterpret_cast<uint32_t*>(dq);  // not in use yet
    pack_transposed<PAIR>(o_t, {p.out, p.dtype, b, visible}, queries, D);
    for (int v = 0; v < kVectors; v++) {
      F dot = zero();
      for (i64 w = 0; w < words; w++)
        dot = multiply_words<PAIR>(iload(o_t + w * kQueries + v * L), iload(g_t + w * kQueries + v * L), dot);
      store(delta + v * L, dot);
    }
    for (i64 i = 0; i < kQueries; i++) {
      const i64 row = statistics_of(p, b, visible, i);
      shift[i] = i < queries ? p.shift[row] : 0.f;
      minus_level[i] = i < queries ? -p.level[row] : -1e30f;  // P = 0 past the last row
    }
  }

  // What the rows of the block add to the gradients of their sinks.
  APART void sink_gradients(i64 r0, i64 queries) {
    const i64 blocks = (p.T * p.group + kQueries - 1) / kQueries;
    float* to = p.dsinks + (b * blocks + r0 / kQueries) * p.H;
    for (i64 member = 0; member < p.group; member++) to[h * p.group + member] = 0.f;
    for (i64 i = 0; i < queries; i++) {
      const i64 head = visible.head[i];
      const float level = p.sinks[head] * kLog2e - shift[i] * scale_of(p) * kLog2e;
      if (minus_level[i] != __builtin_inff()) to[head] -= __builtin_exp2f(level + minus_level[i]) * delta[i];
    }
  }

  // s, dp -> P' and dS of one vector of queries over one group of keys.
  template <bool DROP, bool EDGE, bool CAP> APART void slopes(int v, i64 j0, const Group* groups, int n) {
    float *sv = s + v * L, *dpv = dp + v * L;
    const F top = load(shift + v * L), bottom = load(minus_level + v * L), center = load(delta + v * L);
    const F kept = set(dropout.scale);
    I bits[16];
    i64 have_bits = -1;
    for (int g = 0; g < n; g++) {
      if (v < groups[g].va || v >= groups[g].vb) continue;
      for (i64 j = groups[g].begin; j < groups[g].end; j += 2) {
        const F sx = load(sv + j * kQueries), sy = load(sv + (j + 1) * kQueries);
        F x = exp2<PAIR ? 4 : 6>(fma(sx - top, scale, bottom));
        F y = exp2<PAIR ? 4 : 6>(fma(sy - top, scale, bottom));
        F gx = load(dpv + j * kQueries), gy = load(dpv + (j + 1) * kQueries), px = x, py = y;
        if (DROP) {
          if (have_bits != (j0 + j) / 32) {
            have_bits = (j0 + j) / 32;
            dropout_words(dropout, visible, v, have_bits * 32, bits);
          }
          const I w = bits[(j0 + j) / 2 % 16];
          const M keep_x = keeps_even(dropout, w), keep_y = keeps_odd(dropout, w);
          gx = select_or_zero(keep_x, gx * kept);
          gy = select_or_zero(keep_y, gy * kept);
          px = select_or_zero(keep_x, px);
          py = select_or_zero(keep_y, py);
        }
        x = x * (gx - center);
        y = y * (gy - center);
        if (CAP) {
          x = fnma(x * sx, sx, x);
          y = fnma(y * sy, sy, y);
        }
        if (EDGE) {
          const M see_x = is_visible(visible, v, j0 + j), see_y = is_visible(visible, v, j0 + j + 1);
          x = select_or_zero(see_x, x);
          y = select_or_zero(see_y, y);
          px = select_or_zero(see_x, px);
          py = select_or_zero(see_y, py);
        }
        if constexpr (PAIR) {
#ifdef GPTFAST_PAIRS
          store_pair_rows(p_rows + j * kRow + v * L / 2, px, py);
          store_pair_rows(ds_rows + j * kRow + v * L / 2, x, y);
          istore(ds_lanes + j / 2 * kQueries + v * L, pair_bf16(x, y));
#endif
        } else {
          store(sv + j * kQueries, px);
          store(sv + (j + 1) * kQueries, py);
          store(dpv + j * kQueries, x);
          store(dpv + (j + 1) * kQueries, y);
        }
      }
    }
  }
#ifdef GPTFAST_PAIRS
  static void store_pair_rows(uint32_t* row, F x, F y) {  // x at this row of pairs along i, y at the next
    store_halves(row, row + kRow, join_bf16(x, y));
  }
#endif

  template <bool DROP> void slopes_of(bool edge, i64 j0, const Group* groups, int n) {
    for (int v = 0; v < visible.vectors; v++) {
      if (p.softcap > 0.f) slopes<DROP, true, true>(v, j0, groups, n);
      else if (edge) slopes<DROP, true, false>(v, j0, groups, n);
      else slopes<DROP, false, false>(v, j0, groups, n);
    }
  }
  APART void key_tile(i64 j0) {
    const i64 keys = visible.last - j0 < kKeys ? visible.last - j0 : kKeys;
    Group groups[kKeys / kGroup];
    bool edge;
    const int n = tile_groups(visible, j0, keys, groups, &edge);
    for (int t = 0; t < n; t++) {
      const Group& g = groups[t];
      const i64 at_s = g.begin * kQueries + g.va * L, count = g.end - g.begin;
      product<PAIR>({TileOp::set, k + (j0 + g.begin) * words, words, 1, q_t + g.va * L, kQueries, words, s + at_s,
                     kQueries, count, g.vb - g.va, nullptr});
      product<PAIR>({TileOp::set, v + (j0 + g.begin) * words, words, 1, g_t + g.va * L, kQueries, words, dp + at_s,
                     kQueries, count, g.vb - g.va, nullptr});
    }
    if (p.softcap > 0.f) cap_scores(s, groups, n, p.scale / p.softcap);
    p.dropout.threshold ? slopes_of<true>(edge, j0, groups, n) : slopes_of<false>(edge, j0, groups, n);
    const bool finite = !edge || finite_keys<PAIR>(dq_rows(j0), k_words, PAIR ? (keys + 1) / 2 : keys, D);
    for (int t = 0; t < n; t++) accumulate(j0, groups[t], finite);
  }
  APART void accumulate(i64 j0, const Group& g, bool finite) {
    // queries [va, vb) as words of rows: contraction of dv and dk
    const i64 from = g.va * L * kRow / kQueries, length = (g.vb - g.va) * L * kRow / kQueries;
    const i64 count = g.end - g.begin, lanes = stride / L;
    constexpr TileOp op = TileOp::accumulate;
    product<PAIR>({op, p_rows + g.begin * kRow + from, kRow, 1, g_rows + from * stride, stride, length,
                   dv + (j0 + g.begin) * stride, stride, count, int(lanes), nullptr});
    product<PAIR>({op, ds_rows + g.begin * kRow + from, kRow, 1, q_rows + from * stride, stride, length,
                   dk + (j0 + g.begin) * stride, stride, count, int(lanes), nullptr});
    if (!finite) return guarded_product<PAIR>(dq, dq_rows(j0), k_words, ds_lanes, g, D);
    const i64 first = PAIR ? g.begin / 2 : g.begin, pairs = PAIR ? (count + 1) / 2 : count;
    product<PAIR>({op, dq_rows(j0 + g.begin), k_words.channel, k_words.key, ds_lanes + first * kQueries + g.va * L,
                   kQueries, pairs, dq + g.va * L, kQueries, D, g.vb - g.va, nullptr});
  }

  void block(i64 r0) {
    const i64 rows = p.T * p.group, queries = rows - r0 < kQueries ? rows - r0 : kQueries;
    visible_keys(visible, p, b, h, r0, queries);
    const LaneRows<Heads> q{p.q, p.dtype, b, visible}, g{p.dout, p.dtype, b, visible};
    pack_transposed<PAIR>(q_t, q, queries, D);
    pack_transposed<PAIR>(g_t, g, queries, D);
    pack_lanes(q_rows, q, queries);
    pack_lanes(g_rows, g, queries);
    row_statistics(queries);
    if (p.dsinks) sink_gradients(r0, queries);
    __builtin_memset(dq, 0, size_t(D * kQueries) * 4);
    for (i64 j0 = visible.first / kKeys * kKeys; j0 < visible.last; j0 += kKeys) key_tile(j0);
    for (int v = 0; v < kVectors; v++) store(factor + v * L, set(p.scale));
    unpack_transposed({p.dq, p.dtype, b, visible}, queries, D, dq, factor);
  }
};

template <bool PAIR> static void attention_backward(const AttentionParams& p, i64 bh, i64 slice, i64 slices) {
  AttentionBackward<PAIR> w(p, bh, slice, slices);
  for (i64 r0 = slice * kQueries; r0 < p.T * p.group; r0 += slices * kQueries) w.block(r0);
  end_products();
  if (!p.partial) write_key_gradients(p, bh, w.dk, w.dv, 1);
}
static void causal_attention_bwd(const AttentionParams& p, i64 bh, i64 slice, i64 slices) {
#ifdef GPTFAST_PAIRS
  if (p.dtype == DType::bf16) return attention_backward<true>(p, bh, slice, slices);
#endif
  if constexpr (kOnlyBf16) base.causal_attention_bwd(p, bh, slice, slices);
  else attention_backward<false>(p, bh, slice, slices);
}

static void fill(Kernels& k) {
  own_table = &k;
#ifndef GPTFAST_TILES
  k.causal_attention_bwd_sum = causal_attention_bwd_sum;
#endif
  k.causal_attention_bwd = causal_attention_bwd;
}
