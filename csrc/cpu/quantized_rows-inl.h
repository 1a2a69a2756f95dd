// y = x W^T + bias for few rows of x: each code is read and looked up once for up to 8 rows.
//
// A chunk is 4 L bytes of a row of codes: L words of 4 bytes or 8 nibbles. Code j of all words is one vector, and x is laid
// out to meet it: [chunk][row][j][L], x[chunk, lane * kPerLane + place(j)]. With PAIR x is bf16, the table too, and words are
// of 16 bits: half as many vectors, whose neighbours are multiplied in pairs. The sum of a chunk, times the fp32 scales of its
// lanes' groups, is added up; its bits depend on K alone.
//
// Floor: the read of the codes, N K / 2 bytes and the scales; or, from L2, a look-up in 16 fp32 (32 bf16) a cycle.
#include "codes-inl.h"
#include "tile_words-inl.h"

template <class C> constexpr i64 kDepth = C::kPerLane * L;                                  // codes of a chunk
template <bool PAIR, class C> constexpr int kParts = PAIR ? C::kPerLane / 2 : C::kPerLane;  // vectors of a chunk

// Bytes are as fast in fp32: they take as long to become bf16.
INL bool in_pairs(const QuantizedRowsParams& p) {
  return kPairs && p.x.dtype == DType::bf16 && p.w.format != Codes::int8;
}

template <class T, class C> static void spread(const QuantizedRowsParams& p) {
  constexpr int parts = C::kPerLane * int(sizeof(T)) / 4, lanes = int(kDepth<C>) / parts;
  const i64 K = p.w.K, padded = round_up(K, kDepth<C>);
  T* row_of_x = static_cast<T*>(scratch(size_t(padded) * sizeof(T)));
  for (i64 m = 0; m < p.M; m++) {
    if constexpr (sizeof(T) == 4) copy_row(row_of_x, row(p.x, m), p.x.dtype, K);
    else __builtin_memcpy(row_of_x, row(p.x, m), size_t(K) * sizeof(T));
    for (i64 k = K; k < padded; k++) row_of_x[k] = 0;
    T* to = reinterpret_cast<T*>(p.spread) + m * kDepth<C>;
    for (const T* from = row_of_x; from < row_of_x + padded; from += kDepth<C>, to += p.M * kDepth<C>)
      UNROLL_FOR (int j = 0; j < parts; j++)
        for (int lane = 0; lane < lanes; lane++) to[j * lanes + lane] = from[lane * parts + C::place(j)];
  }
}
static void quantized_spread(const QuantizedRowsParams& p) {
  if (in_pairs(p)) spread<uint16_t, Nibbles>(p);
  else if (p.w.format == Codes::int8) spread<float, Bytes>(p);
  else spread<float, Nibbles>(p);
}

// The fp32 scales of an item's outputs, rows of them with L zeros after each, and those of the lanes of a chunk.
template <class C> struct LaneScales {
  const int shift, in_chunk;
  const i64 groups, stride;
  const I lanes;
  float* const data;
  LaneScales(const QuantizedMatrix& w, i64 n0, i64 count)
      : shift(__builtin_ctzll(uint64_t(w.group))), in_chunk(int(kDepth<C> >> shift)),
        groups((w.K + w.group - 1) >> shift), stride(round_up(groups, L) + L),
        lanes(shr(iota(), shift - __builtin_ctz(unsigned(C::kPerLane)))),
        data(static_cast<float*>(scratch(size_t(count * stride) * 4))) {
    for (i64 n = 0; n < count; n++) {
      const void* from = row(w.scales, n0 + n);
      for_lanes(groups, [&](i64 c, i64 m) __attribute__((always_inline)) {
        store(data + n * stride + c, load_any(at(from, w.scales.dtype, c), w.scales.dtype, m));
      });
      store(data + (n + 1) * stride - L, zero());
    }
  }
  INL_MEMBER F of(const float* scales, i64 chunk) const {
    const float* first = scales + (chunk * kDepth<C> >> shift);
    return in_chunk <= 1 ? set(*first) : permute(load(first), lanes);
  }
};

// Adds chunk `chunk` of O outputs, whose codes lie `pitch` bytes apart, for R rows of x.
template <bool PAIR, int R, int O, class C>
INL void add_chunk(const C& codes, const LaneScales<C>& lanes, const float* scales, i64 chunk, const uint8_t* from,
                   i64 pitch, const float* x, F acc[R][O]) {
  I words[O];
  F sums[R][O];
  UNROLL_FOR (int o = 0; o < O; o++) words[o] = iload(from + o * pitch);
  UNROLL_FOR (int j = 0; j < kParts<PAIR, C>; j++) {
    I v[O];
    UNROLL_FOR (int o = 0; o < O; o++) {
#ifdef GPTFAST_PAIRS
      if constexpr (PAIR) v[o] = codes.pair_part(words[o], j);
      else
#endif
        v[o] = as_int(codes.part(words[o], j));
    }
    UNROLL_FOR (int r = 0; r < R; r++) {
      const I of_x = iload(x + (r * kParts<PAIR, C> + j) * L);
      UNROLL_FOR (int o = 0; o < O; o++) sums[r][o] = multiply_words<PAIR>(v[o], of_x, j == 0 ? zero() : sums[r][o]);
    }
  }
  UNROLL_FOR (int o = 0; o < O; o++) {
    const F scale = lanes.of(scales + o * lanes.stride, chunk);
    UNROLL_FOR (int r = 0; r < R; r++) acc[r][o] = fma(sums[r][o], scale, acc[r][o]);
  }
}
// Adds the last, incomplete chunk of one output for one row of x to the L sums of `acc`. Compiled once: few K have one.
template <bool PAIR, class C>
COLD void add_last_chunk(const C& codes, const LaneScales<C>& lanes, const float* scales, i64 chunk,
                         const uint8_t* from, i64 bytes, const float* x, float* acc) {
  alignas(64) uint8_t last[4 * L] = {};
  __builtin_memcpy(last, from, size_t(bytes));
  F sums[1][1] = {{load(acc)}};
  add_chunk<PAIR, 1, 1>(codes, lanes, scales, chunk, last, 4 * L, x, sums);
  store(acc, sums[0][0]);
}
// Outputs [n, n + O) for rows [m, m + R) of x.
template <bool PAIR, int R, int O, class C>
static void dot_rows(const QuantizedRowsParams& p, const C& codes, i64 n, const LaneScales<C>& lanes,
                     const float* scales, i64 m, float* out) {
  const QuantizedMatrix& w = p.w;
  const uint8_t* bytes = w.codes + n * w.row_bytes;
  const i64 chunks = (w.K + kDepth<C> - 1) / kDepth<C>, complete = w.row_bytes / (4 * L);
  const i64 whole = complete < chunks ? complete : chunks, row_step = kParts<PAIR, C> * L, step = row_step * p.M;
  const float* x = p.spread + m * row_step;
  F acc[R][O];
  UNROLL_FOR (int r = 0; r < R; r++)
    UNROLL_FOR (int o = 0; o < O; o++) acc[r][o] = zero();
  for (i64 chunk = 0; chunk < whole; chunk++)
    add_chunk<PAIR, R, O>(codes, lanes, scales, chunk, bytes + chunk * 4 * L, w.row_bytes, x + chunk * step, acc);
  if (whole < chunks) {
    alignas(64) float sums[R][O][L];
    UNROLL_FOR (int r = 0; r < R; r++)
      UNROLL_FOR (int o = 0; o < O; o++) store(sums[r][o], acc[r][o]);
    ROLLED_FOR (int r = 0; r < R; r++)
      ROLLED_FOR (int o = 0; o < O; o++)
        add_last_chunk<PAIR>(codes, lanes, scales + o * lanes.stride, whole, bytes + o * w.row_bytes + whole * 4 * L,
                             w.row_bytes - whole * 4 * L, x + whole * step + r * row_step, sums[r][o]);
    UNROLL_FOR (int r = 0; r < R; r++)
      UNROLL_FOR (int o = 0; o < O; o++) acc[r][o] = load(sums[r][o]);
  }
  UNROLL_FOR (int r = 0; r < R; r++)
    UNROLL_FOR (int o = 0; o < O; o++) out[r * kQuantizedRows + o] = sum(acc[r][o]);
}
// R rows of x for all outputs of an item: as many outputs at once as hide the latency of a sum.
template <bool PAIR, int R, class C>
static void dot_outputs(const QuantizedRowsParams& p, const C& codes, i64 n0, i64 count, const LaneScales<C>& lanes,
                        i64 m, float* out) {
  constexpr int O = L == 16 && R <= 4 ? 4 / (R == 4 ? 2 : 1) : 1;
  i64 n = 0;
  for (; n + O <= count; n += O)
    dot_rows<PAIR, R, O>(p, codes, n0 + n, lanes, lanes.data + n * lanes.stride, m, out + n);
  if constexpr (O > 1)
    for (; n < count; n++) dot_rows<PAIR, R, 1>(p, codes, n0 + n, lanes, lanes.data + n * lanes.stride, m, out + n);
}

template <bool PAIR, class C> static void rows_item(const QuantizedRowsParams& p, const C& codes, i64 item) {
  alignas(64) float out[kFewRows][kQuantizedRows];
  const i64 n0 = item * kQuantizedRows, count = p.w.N - n0 < kQuantizedRows ? p.w.N - n0 : kQuantizedRows;
  const LaneScales<C> lanes(p.w, n0, count);
  i64 m = 0;
  if constexpr (L == 16)
    for (; m + 8 <= p.M; m += 8) dot_outputs<PAIR, 8>(p, codes, n0, count, lanes, m, out[m]);
  for (; m + 4 <= p.M; m += 4) dot_outputs<PAIR, 4>(p, codes, n0, count, lanes, m, out[m]);
  for (; m + 2 <= p.M; m += 2) dot_outputs<PAIR, 2>(p, codes, n0, count, lanes, m, out[m]);
  if (m < p.M) dot_outputs<PAIR, 1>(p, codes, n0, count, lanes, m, out[m]);
  for (m = 0; m < p.M; m++)
    for_lanes(count, [&](i64 c, i64 n) __attribute__((always_inline)) {
      F y = load_lanes(out[m] + c, n);
      if (p.bias.data) y = y + load_any(at(p.bias.data, p.bias.dtype, n0 + c), p.bias.dtype, n);
      store_any(at(row(p.y, m), p.y.dtype, n0 + c), p.y.dtype, y, n);
    });
}
static void quantized_rows(const QuantizedRowsParams& p, i64 item) {
  if (in_pairs(p)) rows_item<kPairs>(p, Nibbles(p.w.format), item);
  else with_codes(p.w.format, [&](const auto& codes) { rows_item<false>(p, codes, item); });
}

static void fill(Kernels& k) {
  k.quantized_spread = quantized_spread;
  k.quantized_rows = quantized_rows;
}
