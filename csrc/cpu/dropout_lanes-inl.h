// The decisions of dropout along a row, for the kernels that drop.
#pragma once

// Decisions of columns [j, j + n) of row (m, i), in order; j is a multiple of 32, `lanes` has room for
// round_up(n, 8 * L) values.
static void dropout_lanes(uint16_t* lanes, const Dropout& d, i64 m, i64 i, i64 j, i64 n) {
  const Wide c1 = widen(uint32_t(i) + d.first_row), c2 = widen(uint32_t(m)), c3 = widen(d.offset);
  for (i64 k = 0; 8 * k < n; k += L) {
    I out[4];
    const I calls = iadd(iset(uint32_t(j / 8 + k)), iota());
    philox(uint32_t(d.seed), uint32_t(d.seed >> 32), widen(calls), c1, c2, c3, out);
    spread_pieces(out);
    UNROLL_FOR (int w = 0; w < 4; w++) istore(lanes + 8 * k + 2 * L * w, out[w]);
  }
}
INL float dropout_scale(const Dropout& d) { return d.threshold >= 65536 ? 0.f : 65536.f / float(65536 - d.threshold); }
// x where the element at `lanes` is kept, times `scale`; 0 elsewhere, also for nan. Reads L decisions.
INL F drop(F x, const uint16_t* lanes, uint32_t threshold, float scale) {
  return select_or_zero(uge(iload_u16(lanes), iset(threshold)), x * set(scale));
}
