// delta of backward: of each query the sum over d of out[d] dout[d]. In one order wherever it is formed.
#pragma once
#include "causal_attention_tile.cuh"

namespace gptfast::cuda {

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
    for (int c = 0; c < CHUNKS; c++) {
      float x[8], y[8];
      both[c].values(x), both[CHUNKS + c].values(y);
      float part = 0.f;  // a query that sees one key needs delta as exact as its only product
#pragma unroll
      for (int n = 0; n < 8; n++) part = fmaf(x[n], y[n], part);
      sum += part;
    }
  }
  sum += __shfl_xor_sync(kAllLanes, sum, 1);
  return sum + __shfl_xor_sync(kAllLanes, sum, 2);
}

}  // namespace gptfast::cuda
