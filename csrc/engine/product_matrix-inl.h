// The tile of product_float-inl.h for bf16 weights and R rows on BF16's matrix product (tile_matrix-inl.h): bfmmla multiplies two
// rows of 4 values along k by 4 values of two outputs, and sums to the bits of bfdot.
#pragma once

// Values k to k + 3 of rows m and next of x.
INL I four_of_rows(const Activations& x, i64 m, i64 next, i64 k) {
  uint64_t first, second;
  __builtin_memcpy(&first, x.bf16 + m * x.stride + k, 8);
  __builtin_memcpy(&second, x.bf16 + next * x.stride + k, 8);
  return vreinterpretq_u32_u64(vcombine_u64(vcreate_u64(first), vcreate_u64(second)));
}
// Words of k, k + 1 and of k + 2, k + 3 for L outputs from n on.
INL void words_of_step(const Bf16Step& step, const char* w, int n, I words[2]) {
  words[0] = step.pairs<0>(w, n);
  words[1] = step.pairs<1>(w, n);
}
INL void words_of_step(const PairStep&, const char* w, int n, I words[2]) {
  words[0] = iload(w + n * 4);
  words[1] = iload(w + PairStep::kBytes + n * 4);
}

template <class Step, int R, int V, class N>
static void pair_matrix(const Step& step, const char* w, N n, const Activations& x, i64 m, i64 K, float* y, i64 ldy) {
  constexpr int P = (R + 1) / 2;
  F acc[P][2][V];  // sums of rows 2 p and 2 p + 1 for outputs n, n + 1 and for n + 2, n + 3
  UNROLL_FOR (int p = 0; p < P; p++)
    UNROLL_FOR (int v = 0; v < V; v++) acc[p][0][v] = acc[p][1][v] = zero();
  for (i64 k = 0; k < K; k += 4, w += 4 / Step::kDepth * Step::kBytes) {
    I a[P];
    UNROLL_FOR (int p = 0; p < P; p++) a[p] = four_of_rows(x, m + 2 * p, m + (2 * p + 1 < R ? 2 * p + 1 : 2 * p), k);
    UNROLL_FOR (int v = 0; v < V; v++) {
      I b[2];
      words_of_step(step, w, n + v * L, b);
      const I low = vzip1q_u32(b[0], b[1]), high = vzip2q_u32(b[0], b[1]);
      UNROLL_FOR (int p = 0; p < P; p++) {
        acc[p][0][v] = vbfmmlaq_f32(acc[p][0][v], vreinterpretq_bf16_u32(a[p]), vreinterpretq_bf16_u32(low));
        acc[p][1][v] = vbfmmlaq_f32(acc[p][1][v], vreinterpretq_bf16_u32(a[p]), vreinterpretq_bf16_u32(high));
      }
    }
  }
  UNROLL_FOR (int p = 0; p < P; p++)
    UNROLL_FOR (int v = 0; v < V; v++) {
      const I low = as_int(acc[p][0][v]), high = as_int(acc[p][1][v]);
      store(y + 2 * p * ldy + n + v * L, as_float(zip_low64(low, high)));
      if (2 * p + 1 < R) store(y + (2 * p + 1) * ldy + n + v * L, as_float(zip_high64(low, high)));
    }
}
