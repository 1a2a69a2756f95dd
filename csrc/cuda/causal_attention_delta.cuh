// delta of backward: of each query the sum over d of out[d] dout[d]. In one order wherever it is formed.
#pragma once
#include "causal_attention_tile.cuh"

namespace gptfast::cuda {

// What one chunk of eight columns adds. A query that sees one key needs delta as exact as its only product.
template <class E> DEV_INLINE float delta_of_chunk(const Raw<E, 8>& out, const Raw<E, 8>& dout) {
  float x[8], y[8], part = 0.f;
  out.values(x), dout.values(y);
#pragma unroll
  for (int n = 0; n < 8; n++) part = fmaf(x[n], y[n], part);
  return part;
}
DEV_INLINE float delta_of_lanes(float sum) {
  sum += __shfl_xor_sync(kAllLanes, sum, 1);
  return sum + __shfl_xor_sync(kAllLanes, sum, 2);
}
// delta of query i of a head, by four neighbouring lanes, which all get it: each takes every fourth chunk of eight columns.
template <class E> DEV_INLINE float query_delta(const AttentionParams& p, int b, int h, int i, bool inside) {
  constexpr int CHUNKS = sizeof(E) == 4 ? 2 : 4;  // of out and of dout, on their way at once
  const E *out = row_of<E>(p.out, b, h, inside ? i : 0), *dout = row_of<E>(p.dout, b, h, inside ? i : 0);
  float sum = 0.f;
  for (int first = int(threadIdx.x) % 4 * 8; first < p.D; first += CHUNKS * 32) {
    Raw<E, 8> both[2 * CHUNKS];  // of out, then of dout
    load_chunks<E>(
        both, p, [&](int n) { return n < CHUNKS ? out : dout; }, [&](int n) { return first + n % CHUNKS * 32; },
        [&](int) { return inside; });
#pragma unroll
    for (int c = 0; c < CHUNKS; c++) sum += delta_of_chunk<E>(both[c], both[CHUNKS + c]);
  }
  return delta_of_lanes(sum);
}
// The same of queries i and i + 8, where rows are whole chunks of 16 bits and no wider than WIDTH: all of both is on its way
// before any is used. One query after the other would wait for memory twice. Kept in p.delta for the kernel of dk and dv.
template <class E, int WIDTH>
DEV_INLINE void query_deltas(float (&delta)[2], const AttentionParams& p, int b, int h, int i) {
  constexpr int CHUNKS = WIDTH / 32;
  Raw<E, 8> out[2][CHUNKS], dout[2][CHUNKS];
  const int first = int(threadIdx.x) % 4 * 8;
#pragma unroll
  for (int n = 0; n < 2; n++) {
    const bool inside = i + 8 * n < p.T;
    const int row = inside ? i + 8 * n : 0;
    const E *x = row_of<E>(p.out, b, h, row) + first, *y = row_of<E>(p.dout, b, h, row) + first;
#pragma unroll
    for (int c = 0; c < CHUNKS; c++) {
      out[n][c].zero(), dout[n][c].zero();
      if (inside && first + c * 32 < p.D) out[n][c].load(x + c * 32), dout[n][c].load(y + c * 32);
    }
  }
#pragma unroll
  for (int n = 0; n < 2; n++) {
    float sum = 0.f;
#pragma unroll
    for (int c = 0; c < CHUNKS; c++) sum += delta_of_chunk<E>(out[n][c], dout[n][c]);
    delta[n] = delta_of_lanes(sum);
    if (i + 8 * n < p.T && threadIdx.x % 4 == 0) p.delta[(i64(b) * p.H + h) * p.T + i + 8 * n] = delta[n];
  }
}

}  // namespace gptfast::cuda
