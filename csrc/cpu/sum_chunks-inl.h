// out[c] = sum_k partial[k][c], in the order of k. Floor: one read of the partial sums.
static void sum_chunks(const PartialSums& p, i64 c_begin, i64 c_end) {
  for (i64 c = c_begin; c < c_end; c += L) {
    const i64 n = c_end - c < L ? c_end - c : L;
    F s = zero();
    for (i64 k = 0; k < p.parts; k++) s = s + load_lanes(p.partial + k * p.C + c, n);
    alignas(64) float buffer[L];
    float* out = write_row(at(p.out, p.dtype, c), p.dtype, buffer);
    store_lanes(out, s, n);
    finish_row(at(p.out, p.dtype, c), p.dtype, out, n);
  }
}

static void fill(Kernels& k) { k.sum_chunks = sum_chunks; }
