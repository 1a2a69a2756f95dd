// Token plus position embedding, and the gradient of a table.
//
// Backward gets the ids sorted, with the permutation that sorted them (a stable one, so equal ids stay in row order). The
// rows of a run of equal ids are added in that order, in fp32, by the thread that owns the first row of the run.
// Floor: forward two reads and one write of (N, C); backward one read of (N, C) and one write of the table.

static void embedding_fwd(const EmbeddingParams& p, i64 row_begin, i64 row_end) {
  if (is_left_to_base(p.out.dtype)) return base.embedding_fwd(p, row_begin, row_end);
  for (i64 r = row_begin; r < row_end; r++) {
    const void* token = row(p.wte, p.ids[r]);
    const void* place = p.wpe.data ? row(p.wpe, p.positions ? p.positions[r] : r % p.T) : nullptr;
    void* y = row(p.out, r);
    with_own_dtype(p.out.dtype, [&](auto t) {
      for_lanes<t.value>(p.C, [&](i64 c, i64 k) __attribute__((always_inline)) {
        F x = load_as<t.value>(token, c, k);
        if (place) x = x + load_any(at(place, p.wpe.dtype, c), p.wpe.dtype, k);
        put_as<t.value>(p.out.non_temporal, y, c, x, k);
      });
    });
  }
  stream_end();
}

// Columns [c, c + W L) of the sum of rows [first, last) in their order; `lanes` of the last vector count.
template <int W> INL void sum_run(const EmbeddingBwdParams& p, i64 first, i64 last, void* to, i64 c, i64 lanes) {
  F sums[W];
  UNROLL_FOR (int w = 0; w < W; w++) sums[w] = zero();
  for (i64 n = first; n < last; n++) {
    const void* g = row(p.dout, p.order[n]);
    UNROLL_FOR (int w = 0; w < W; w++)
      sums[w] = sums[w] + load_any(at(g, p.dout.dtype, c + w * L), p.dout.dtype, lanes);
  }
  UNROLL_FOR (int w = 0; w < W; w++) store_any(at(to, p.dtable.dtype, c + w * L), p.dtable.dtype, sums[w], lanes);
}
// The runs that begin in [begin, end).
static void embedding_bwd(const EmbeddingBwdParams& p, i64 begin, i64 end) {
  constexpr int kWidth = 4;  // vectors of sums in registers
  for (i64 first = begin; first < end; first++) {
    const i64 id = p.keys[first];
    if (first > 0 && p.keys[first - 1] == id) continue;
    i64 last = first + 1;
    while (last < p.N && p.keys[last] == id) last++;
    void* to = row(p.dtable, id);
    i64 c = 0;
    for (; c + kWidth * L <= p.C; c += kWidth * L) sum_run<kWidth>(p, first, last, to, c, L);
    for (; c < p.C; c += L) sum_run<1>(p, first, last, to, c, lanes_of(p.C - c));
  }
}

static void fill(Kernels& k) {
  k.embedding_fwd = embedding_fwd;
  k.embedding_bwd = embedding_bwd;
}
