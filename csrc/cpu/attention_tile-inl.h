// What the forward and the backward of causal_attention share: which keys a block of queries sees, packing of rows
// into words, and the dropout bits.
//
// The `group` query heads that share a key head are one head of T * group rows to the kernels: row r is query r / group of the
// group's head r % group. The intervals of keys that rows see rise with r as they do for one head; k and v are read
// and packed once for all heads of a group, and the tiles of a block serve all of them; dk and dv are sums over the rows.
//
// Rows sit in the lanes. Scores, probabilities and their gradients are therefore held transposed, S^T[j][i], and
// maxima, sums, masks and rescaling are vertical vector operations; all products are products-inl.h on rows of q,
// k, v and dout as they lie in memory or after one packing.
#pragma once
#include "products-inl.h"

constexpr i64 kQueries = kAttentionBlock;  // lanes of a block: L-wide vectors 0 .. kVectors - 1
constexpr int kVectors = int(kQueries / L);
constexpr i64 kKeys = 64;     // keys of a tile
constexpr i64 kGroup = 16;    // keys that are skipped or masked together at the edge of visibility
constexpr float kFar = 64.f;  // a product scale * maximum, in units of log2, whose rounding 2^-19 may still be left in
constexpr float kMasked = -0x1.fffffep+127f;  // the lowest: scores are all of the numbers

// Lane n of the block is query query[n] of query head head[n] and sees keys [lo[n], hi[n]). Lanes past the last row
// repeat it.
struct Visible {
  alignas(64) int32_t lo[kQueries], hi[kQueries], query[kQueries], head[kQueries];
  int32_t vector_lo[kVectors], vector_hi[kVectors];  // union over the lanes of each vector; empty: hi <= lo
  int32_t all_lo, all_hi;                            // seen by every lane: a tile inside needs no mask
  int32_t first, last;                               // union over the block
  int vectors;                                       // that hold a query: 1 when one token is decoded
};

// Of rows r0 .. r0 + queries of key head `key_head`.
APART static void visible_keys(Visible& s, const AttentionParams& p, i64 b, i64 key_head, i64 r0, i64 queries) {
  i64 document = 0, i = r0 / p.group, member = r0 % p.group;
  s.vectors = int((queries + L - 1) / L);
  s.all_lo = s.last = 0;
  s.all_hi = s.first = int32_t(p.S);
  for (int v = 0; v < kVectors; v++) s.vector_lo[v] = int32_t(p.S), s.vector_hi[v] = 0;
  for (i64 n = 0; n < kQueries; n++) {
    if (n && n < queries && ++member == p.group) member = 0, i++;
    s.query[n] = int32_t(i);
    s.head[n] = int32_t(key_head * p.group + member);
    const i64 last = i + p.S - p.T;
    i64 lo = 0, hi = p.S;
    if (p.causal && hi > last + 1) hi = last + 1;
    if (p.window && lo < last - p.window + 1) lo = last - p.window + 1;
    if (p.seq_lens && hi > p.seq_lens[b]) hi = p.seq_lens[b];
    if (p.left_pad && lo < p.left_pad[b]) lo = p.left_pad[b];
    if (p.cu_seqlens) {
      while (document < p.documents && p.cu_seqlens[document + 1] <= i) document++;
      if (document == p.documents || i < p.cu_seqlens[0]) hi = 0;
      else {
        if (lo < p.cu_seqlens[document]) lo = p.cu_seqlens[document];
        if (hi > p.cu_seqlens[document + 1]) hi = p.cu_seqlens[document + 1];
      }
    }
    if (hi <= lo) lo = hi = 0;
    s.lo[n] = int32_t(lo);
    s.hi[n] = int32_t(hi);
    if (s.all_lo < s.lo[n]) s.all_lo = s.lo[n];
    if (s.all_hi > s.hi[n]) s.all_hi = s.hi[n];
    if (hi == lo) continue;
    const i64 v = n / L;
    if (s.vector_lo[v] > s.lo[n]) s.vector_lo[v] = s.lo[n];
    if (s.vector_hi[v] < s.hi[n]) s.vector_hi[v] = s.hi[n];
    if (s.first > s.lo[n]) s.first = s.lo[n];
    if (s.last < s.hi[n]) s.last = s.hi[n];
  }
}

// Keys [begin, end) of a tile and the vectors of queries [va, vb) that see any of them.
struct Group {
  i64 begin, end;
  int va, vb;
};
// The parts of the tile of `keys` keys from j0 on. One group of everything when no mask is needed (*edge false).
INL int tile_groups(const Visible& s, i64 j0, i64 keys, Group* groups, bool* edge) {
  *edge = j0 < s.all_lo || j0 + keys > s.all_hi || keys % 2;
  if (!*edge) {
    groups[0] = {0, keys, 0, s.vectors};
    return 1;
  }
  int n = 0;
  for (i64 g = 0; g < keys; g += kGroup) {
    const i64 end = g + kGroup < keys ? g + kGroup : keys;
    int va = kVectors, vb = 0;
    for (int v = 0; v < s.vectors; v++) {
      if (s.vector_hi[v] <= j0 + g || s.vector_lo[v] >= j0 + end) continue;
      if (va > v) va = v;
      vb = v + 1;
    }
    if (va < vb) groups[n++] = {g, end, va, vb};
  }
  return n;
}
// Lanes of vector v that see key j.
INL M is_visible(const Visible& s, int v, i64 j) {
  const I key = iset(uint32_t(j));
  return and_mask(igt(iload(s.hi + v * L), key), igt(iadd(key, iset(1)), iload(s.lo + v * L)));
}

// ---- scores ---------------------------------------------------------------------------------------------------------
// With a soft cap the scores of the kernels are tanh(inner q k^T), in units of the cap: what scale is to others, the cap is
// to them.

INL float scale_of(const AttentionParams& p) { return p.softcap > 0.f ? p.softcap : p.scale; }

// Relative error below 2e-7: an odd polynomial (Cephes, tanhf) near 0, beyond 1 - 2 / (e^2|x| + 1).
INL F tanh(F x) {
  const F s = x * x, a = abs(x);
  F p = set(-5.70498872745e-3f);
  p = fma(p, s, set(2.06390887954e-2f));
  p = fma(p, s, set(-5.37397155531e-2f));
  p = fma(p, s, set(1.33314422036e-1f));
  p = fma(p, s, set(-3.33332819422e-1f));
  const F far = set(1.f) - set(2.f) / (exp2<6>(a * set(2.f * kLog2e)) + set(1.f));
  return select(lt(a, set(0.625f)), fma(p * s, x, x), copysign(far, x));
}
// Products of a tile -> scores.
APART static void cap_scores(float* s, const Group* groups, int n, float inner) {
  const F factor = set(inner);
  for (int g = 0; g < n; g++)
    for (i64 j = groups[g].begin; j < groups[g].end; j++)
      for (int v = groups[g].va; v < groups[g].vb; v++) {
        float* x = s + j * kQueries + v * L;
        store(x, tanh(load(x) * factor));
      }
}

// ---- words and packing ----------------------------------------------------------------------------------------------

// Takes aligned pieces of this thread's scratch memory. Counts first (base == nullptr), then hands out.
struct Arena {
  char* base;
  size_t used = 0;
  template <class T> T* take(i64 n) {
    T* r = reinterpret_cast<T*>(base + used);
    used += size_t(round_up(n * i64(sizeof(T)), 64));
    return r;
  }
};

INL const void* head_row(const Heads& x, DType t, i64 b, i64 h, i64 i) {
  return at(x.data, t, b * x.sb + h * x.sh + i * x.st);
}
INL void* head_row(const MutHeads& x, DType t, i64 b, i64 h, i64 i) {
  return at(x.data, t, b * x.sb + h * x.sh + i * x.st);
}
INL i64 key_heads(const AttentionParams& p) { return p.H / p.group; }

// Where rows to pack lie: keys of a head by their number, rows of a block by their lane.
struct KeyRows {
  const Heads& x;
  DType t;
  i64 b, h;
  INL_MEMBER const void* operator()(i64 j) const { return head_row(x, t, b, h, j); }
};
template <class X> struct LaneRows {
  const X& x;
  DType t;
  i64 b;
  const Visible& lanes;
  INL_MEMBER auto operator()(i64 n) const { return head_row(x, t, b, lanes.head[n], lanes.query[n]); }
};
INL i64 statistics_of(const AttentionParams& p, i64 b, const Visible& lanes, i64 n) {
  return (b * p.H + lanes.head[n]) * p.T + lanes.query[n];
}

// Words of a row of D values: D (fp32) or ceil(D / 2) (pairs of bf16, an odd tail padded with 0).
template <bool PAIR> INL i64 words_of(i64 D) { return PAIR ? (D + 1) / 2 : D; }

// L words from word w on of the row at p.
template <bool PAIR> INL I load_words(const void* p, DType t, i64 w, i64 D) {
  if constexpr (PAIR) {
    const i64 n = D - 2 * w;
    if (n >= 2 * L) return iload(static_cast<const uint16_t*>(p) + 2 * w);
    alignas(64) uint16_t buffer[2 * L] = {};
    __builtin_memcpy(buffer, static_cast<const uint16_t*>(p) + 2 * w, size_t(n) * 2);
    return iload(buffer);
  }
  return as_int(load_any(at(p, t, w), t, D - w < L ? D - w : L));
}

// The rows of a block, transposed: out[word][lane], lanes past the last row 0.
template <bool PAIR> APART static void pack_transposed(uint32_t* out, const LaneRows<Heads>& row, i64 rows, i64 D) {
  const i64 words = words_of<PAIR>(D);
  for (int v = 0; v < kVectors; v++) {
    const void* from[L];
    for (int n = 0; n < L; n++) from[n] = v * L + n < rows ? row(v * L + n) : nullptr;
    for (i64 w = 0; w < words; w += L) {
      I r[L];
      for (int n = 0; n < L; n++) r[n] = from[n] ? load_words<PAIR>(from[n], row.t, w, D) : iset(0);
      transpose(r);
      for (int n = 0; n < L && w + n < words; n++) istore(out + (w + n) * kQueries + v * L, r[n]);
    }
  }
}
// Rows [begin, end) as rows of `stride` words; what the last vector spills past a row, the next overwrites.
template <bool PAIR, class Rows>
static void pack_rows(uint32_t* out, i64 stride, const Rows& row, i64 begin, i64 end, i64 D) {
  const i64 words = words_of<PAIR>(D);
  for (i64 i = begin; i < end; i++) {
    const void* p = row(i);
    for (i64 w = 0; w < words; w += L) istore(out + i * stride + w, load_words<PAIR>(p, row.t, w, D));
  }
}
#ifdef GPTFAST_PAIRS
// Rows (i, i + 1) side by side: out[(i - begin) / 2][d] = (x[i][d], x[i + 1][d]) for i in [begin, end); a missing last row
// counts as 0.
template <class Rows>
static void pack_row_pairs(uint32_t* out, i64 stride, const Rows& row, i64 begin, i64 end, i64 D) {
  for (i64 i = begin; i < end; i += 2) {
    const auto* p = static_cast<const uint16_t*>(row(i));
    const auto* q = i + 1 < end ? static_cast<const uint16_t*>(row(i + 1)) : nullptr;
    for (i64 d = 0; d < D; d += L) {
      const auto lanes = first_words(D - d);
      const I low = load_u16(p + d, lanes);
      const I high = q ? shl16(load_u16(q + d, lanes)) : iset(0);
      istore(out + (i - begin) / 2 * stride + d, ior(low, high));
    }
  }
}
#endif

// A block^T [d][lane] times `factor` per lane, written as its rows. Rows of `block` past D are never stored.
APART static void unpack_transposed(const LaneRows<MutHeads>& row, i64 rows, i64 D, const float* block,
                                    const float* factor) {
  for (int v = 0; v < kVectors && v * L < rows; v++) {
    const F f = load(factor + v * L);
    void* to[L];
    for (int n = 0; n < L && v * L + n < rows; n++) to[n] = row(v * L + n);
    for (i64 d = 0; d < D; d += L) {
      I r[L];
      for (int n = 0; n < L; n++) r[n] = as_int(load(block + (d + n) * kQueries + v * L) * f);
      transpose(r);
      for (int n = 0; n < L && v * L + n < rows; n++)
        store_any(at(to[n], row.t, d), row.t, as_float(r[n]), D - d < L ? D - d : L);
    }
  }
}

// ---- dropout --------------------------------------------------------------------------------------------------------

struct DropoutKey {
  uint32_t k0, k1, first_matrix, offset, threshold;  // first_matrix: of the query heads of a batch row
  float scale;  // of what is kept: 65536 / (65536 - threshold); 0 when everything is dropped
};
INL DropoutKey dropout_key(const AttentionParams& p, i64 b) {
  const Dropout& d = p.dropout;
  const bool nothing = d.threshold >= 65536;
  return {uint32_t(d.seed), uint32_t(d.seed >> 32),         d.first_matrix + uint32_t(b * p.H),
          d.offset,         nothing ? 65535u : d.threshold, nothing ? 0.f : 65536.f / float(65536 - d.threshold)};
}
// Decisions of 32 keys from j (a multiple of 32) on for the L rows of vector v: words[(j >> 1) & 15], low half for even j.
// Not inline: 40 rounds of Philox, once for 32 keys.
APART static void dropout_words(const DropoutKey& k, const Visible& lanes, int v, i64 j, I words[16]) {
  const Wide row = widen(iload(lanes.query + v * L));
  const Wide matrix = widen(iadd(iset(k.first_matrix), iload(lanes.head + v * L)));
  for (uint32_t q = 0; q < 4; q++) {
    I out[4];
    philox(k.k0, k.k1, widen(uint32_t(j >> 5 << 2) | q), row, matrix, widen(k.offset), out);
    UNROLL_FOR (int t = 0; t < 4; t++) words[t * 4 + int(q)] = out[t];
  }
}
INL M keeps_even(const DropoutKey& k, I word) { return uge(shl16(word), iset(k.threshold << 16)); }
INL M keeps_odd(const DropoutKey& k, I word) { return uge(word, iset(k.threshold << 16)); }
