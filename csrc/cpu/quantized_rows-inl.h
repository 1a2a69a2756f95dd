// y = x W^T + bias for few rows of x: each code is read and looked up once for up to 8 rows, in fp32.
//
// A chunk is 4 L bytes of a row of codes: L words of 4 bytes or 8 nibbles. Code j of all words is one vector, and x is laid
// out to meet it: [chunk][j][row][L], x[chunk, lane * kPerLane + place(j)]. The sum of a chunk, times the scales of its
// lanes' groups, is added up; its bits depend on K alone.
//
// Floor: the read of the codes, N K / 2 bytes and the scales.
#include "codes-inl.h"

template <class C> constexpr i64 kDepth = C::kPerLane * L;  // codes of a chunk

template <class C> static void spread(const QuantizedRowsParams& p) {
  const i64 K = p.w.K, chunks = (K + kDepth<C> - 1) / kDepth<C>;
  float* row_of_x = static_cast<float*>(scratch(size_t(chunks * kDepth<C>) * 4));
  for (i64 m = 0; m < p.M; m++) {
    copy_row(row_of_x, row(p.x, m), p.x.dtype, K);
    for (i64 k = K; k < chunks * kDepth<C>; k++) row_of_x[k] = 0;
    float* to = p.spread + m * L;
    for (i64 chunk = 0; chunk < chunks; chunk++)
      for (int j = 0; j < C::kPerLane; j++, to += p.M * L)
        for (int lane = 0; lane < L; lane++) to[lane] = row_of_x[chunk * kDepth<C> + lane * C::kPerLane + C::place(j)];
  }
}
static void quantized_spread(const QuantizedRowsParams& p) {
  if (p.w.format == Codes::int8) spread<Bytes>(p);
  else spread<Nibbles>(p);
}

// Scales of the lanes of a chunk, of the fp32 scales of a row.
template <class C> struct LaneScales {
  const float* scales;
  const i64 group, groups;
  const I lanes;
  LaneScales(const float* s, const QuantizedMatrix& w)
      : scales(s), group(w.group), groups((w.K + w.group - 1) / w.group),
        lanes(shr(iota(), __builtin_ctzll(uint64_t(w.group / C::kPerLane)))) {}
  INL_MEMBER F of(i64 chunk) const {
    const i64 first = chunk * kDepth<C> / group;
    if (kDepth<C> <= group) return set(scales[first]);
    const i64 left = groups - first;
    return permute(load_n(scales + first, left < L ? left : L), lanes);
  }
};

// Output n for rows [m, m + R) of x.
template <int R, class C>
INL void dot_rows(const QuantizedRowsParams& p, const C& codes, i64 n, const float* scales, i64 m, float* out) {
  const QuantizedMatrix& w = p.w;
  const LaneScales<C> lanes(scales, w);
  const uint8_t* bytes = w.codes + n * w.row_bytes;
  const i64 whole = w.row_bytes / (4 * L), chunks = (w.K + kDepth<C> - 1) / kDepth<C>;
  F acc[R];
  UNROLL_FOR (int r = 0; r < R; r++) acc[r] = zero();
  for (i64 chunk = 0; chunk < chunks; chunk++) {
    alignas(64) uint8_t tail[4 * L] = {};
    const uint8_t* from = bytes + chunk * 4 * L;
    if (chunk >= whole) {
      __builtin_memcpy(tail, from, size_t(w.row_bytes - chunk * 4 * L));
      from = tail;
    }
    const I words = iload(from);
    const float* x = p.spread + (chunk * C::kPerLane * p.M + m) * L;
    F sums[R];
    UNROLL_FOR (int j = 0; j < C::kPerLane; j++) {
      const F v = codes.part(words, j);
      UNROLL_FOR (int r = 0; r < R; r++) {
        const F of_x = load(x + (j * p.M + r) * L);
        sums[r] = j == 0 ? v * of_x : fma(v, of_x, sums[r]);
      }
    }
    const F scale = lanes.of(chunk);
    UNROLL_FOR (int r = 0; r < R; r++) acc[r] = fma(sums[r], scale, acc[r]);
  }
  UNROLL_FOR (int r = 0; r < R; r++) out[r * kQuantizedRows] = sum(acc[r]);
}

template <class C> static void rows_item(const QuantizedRowsParams& p, const C& codes, i64 item) {
  alignas(64) float out[kFewRows][kQuantizedRows];
  const QuantizedMatrix& w = p.w;
  const i64 n0 = item * kQuantizedRows, count = w.N - n0 < kQuantizedRows ? w.N - n0 : kQuantizedRows;
  const i64 groups = (w.K + w.group - 1) / w.group;
  float* buffer = static_cast<float*>(scratch(size_t(groups + L) * 4));
  for (i64 n = 0; n < count; n++) {
    const float* scales = read_row(row(w.scales, n0 + n), w.scales.dtype, groups, buffer);
    i64 m = 0;
    if constexpr (L == 16)
      for (; m + 8 <= p.M; m += 8) dot_rows<8>(p, codes, n0 + n, scales, m, out[m] + n);
    for (; m + 4 <= p.M; m += 4) dot_rows<4>(p, codes, n0 + n, scales, m, out[m] + n);
    for (; m + 2 <= p.M; m += 2) dot_rows<2>(p, codes, n0 + n, scales, m, out[m] + n);
    if (m < p.M) dot_rows<1>(p, codes, n0 + n, scales, m, out[m] + n);
  }
  for (i64 m = 0; m < p.M; m++)
    for_lanes(count, [&](i64 c, i64 n) __attribute__((always_inline)) {
      F y = load_lanes(out[m] + c, n);
      if (p.bias.data) y = y + load_any(at(p.bias.data, p.bias.dtype, n0 + c), p.bias.dtype, n);
      store_any(at(row(p.y, m), p.y.dtype, n0 + c), p.y.dtype, y, n);
    });
}
static void quantized_rows(const QuantizedRowsParams& p, i64 item) {
  with_codes(p.w.format, [&](const auto& codes) { rows_item(p, codes, item); });
}

static void fill(Kernels& k) {
  k.quantized_spread = quantized_spread;
  k.quantized_rows = quantized_rows;
}
