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
      ROLLED_FOR (int j = 0; j < parts; j++)  // g++ makes vectors of the loop in it, and takes 0.1 s each time
        for (int lane = 0; lane < lanes; lane++) to[j * lanes + lane] = from[lane * parts + C::place(j)];
  }
}
static void quantized_spread(const QuantizedRowsParams& p) {
  if (kOnlyBf16 && !in_pairs(p)) return base.quantized_spread(p);
  if constexpr (kOnlyBf16)
    return p.w.format == Codes::mxfp4 ? spread<uint16_t, LowNibbles>(p) : spread<uint16_t, Nibbles>(p);
  if (p.w.format == Codes::int8) spread<float, Bytes>(p);
  else if (p.w.format == Codes::mxfp4) in_pairs(p) ? spread<uint16_t, LowNibbles>(p) : spread<float, LowNibbles>(p);
  else in_pairs(p) ? spread<uint16_t, Nibbles>(p) : spread<float, Nibbles>(p);
}

// out[r * kQuantizedRows + o] = the sum over the lanes of acc[r][o], to the same bits for any R and O.
template <int R, int O> INL void store_sums(const F acc[R][O], float* out) {
#ifdef __AVX512F__
  if constexpr (R * O % 4 == 0) {                                    // four side by side, in the order of `sum`
    const auto fold = [](F x, F y) __attribute__((always_inline)) {  // halves of x, then of y
      return _mm512_shuffle_f32x4(x, y, 0x44) + _mm512_shuffle_f32x4(x, y, 0xee);
    };
    UNROLL_FOR (int i = 0; i < R * O; i += 4) {
      const auto of = [&](int k) __attribute__((always_inline)) { return acc[(i + k) / O][(i + k) % O]; };
      const F ab = fold(of(0), of(1)), cd = fold(of(2), of(3));
      F s = _mm512_shuffle_f32x4(ab, cd, 0x88) + _mm512_shuffle_f32x4(ab, cd, 0xdd);
      s = s + _mm512_permute_ps(s, 0x4e);
      s = s + _mm512_permute_ps(s, 0xb1);
      float four[4];
      _mm_storeu_ps(O == 4 ? out + i / O * kQuantizedRows : four, _mm512_castps512_ps128(permute(s, shl(iota(), 2))));
      if constexpr (O != 4)
        UNROLL_FOR (int k = 0; k < 4; k++) out[(i + k) / O * kQuantizedRows + (i + k) % O] = four[k];
    }
    return;
  }
#endif
  UNROLL_FOR (int r = 0; r < R; r++)
    UNROLL_FOR (int o = 0; o < O; o++) out[r * kQuantizedRows + o] = sum(acc[r][o]);
}

// The scales of an item's outputs as fp32, where they lie or as copies, and how those of a chunk come to its lanes.
template <class C> struct Scales {
  struct Spread {
    int groups;  // of a chunk; 0 is a part of one
    I lanes;     // the group of each lane
  };
  const int shift;
  const i64 stride;  // groups of an output
  Spread whole, last;
  const float* data;  // L values may be read from each on
  Scales(const QuantizedMatrix& w, i64 n0, i64 count)
      : shift(__builtin_ctzll(uint64_t(w.group))), stride((w.K + w.group - 1) >> shift) {
    whole = {int(kDepth<C> >> shift), shr(iota(), shift - __builtin_ctz(unsigned(C::kPerLane)))};
    last.groups = int(stride - first(w.row_bytes / (4 * L)));
    last.lanes = iselect(igt(iset(uint32_t(last.groups)), whole.lanes), whole.lanes, iset(0));
    const Rows& from = w.scales;
    data = static_cast<const float*>(row(from, n0));
    if (w.format != Codes::mxfp4 && !w.nested && from.dtype == DType::f32 && (w.N - n0 - count) * stride >= L) return;
    float* copies = static_cast<float*>(scratch(size_t(count * stride + L) * 4));
    if (w.nested) copy_nested(copies, w, n0 * stride, count * stride);
    else
      for (i64 n = 0; n < count; n++) copy_scales(copies + n * stride, w, n0 + n, 0, stride);
    store(copies + count * stride, zero());
    data = copies;
  }
  INL_MEMBER i64 first(i64 chunk) const { return chunk * kDepth<C> >> shift; }
  static INL_MEMBER F of(const float* scales, const Spread& chunk) {
#ifdef __AVX512F__
    return permute(load(scales), chunk.lanes);
#else
    return chunk.groups <= 1 ? set(*scales) : select(igt(chunk.lanes, iset(0)), set(scales[1]), set(*scales));
#endif
  }
};

// Adds a chunk of O outputs, whose codes lie `pitch` bytes apart and whose scales `stride`, for R rows of x.
template <bool PAIR, int R, int O, class C>
INL void add_chunk(const C& codes, const float* scales, i64 stride, const typename Scales<C>::Spread& spread,
                   const uint8_t* from, i64 pitch, const float* x, F acc[R][O]) {
  I words[O];
  F sums[R][O];
  UNROLL_FOR (int o = 0; o < O; o++) {
    words[o] = iload(from + o * pitch);
#ifdef __AVX512F__
    __asm__("" : IN_VECTOR(words[o]));  // else g++ reads them again for each part
#endif
  }
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
    const F scale = Scales<C>::of(scales + o * stride, spread);
    UNROLL_FOR (int r = 0; r < R; r++) acc[r][o] = fma(sums[r][o], scale, acc[r][o]);
  }
}
// Outputs [n0 + n, n0 + count), O at once as long as there are so many, for rows [m, m + R) of x; returns the first that is left.
// A last, incomplete chunk goes the same way: the loop is compiled once, as g++ else keeps its sums in memory. Called, so that its
// registers are its own.
template <bool PAIR, int R, int O, class C>
APART static i64 dot_rows(const QuantizedRowsParams& p, const C& codes, i64 n0, i64 n, i64 count, const Scales<C>& of,
                          i64 m, float* out) {
  const QuantizedMatrix& w = p.w;
  const i64 chunks = (w.K + kDepth<C> - 1) / kDepth<C>, complete = w.row_bytes / (4 * L);
  const i64 row_step = kParts<PAIR, C> * L, step = row_step * p.M, stride = of.stride;
  alignas(64) uint8_t copies[O][4 * L];
  for (; n + O <= count; n += O) {
    const float *x = p.spread + m * row_step, *scales = of.data + n * stride;
    const uint8_t* from = w.codes + (n0 + n) * w.row_bytes;
    i64 pitch = w.row_bytes, end = complete < chunks ? complete : chunks;
    typename Scales<C>::Spread spread = of.whole;
    F acc[R][O];
    UNROLL_FOR (int r = 0; r < R; r++)
      UNROLL_FOR (int o = 0; o < O; o++) acc[r][o] = zero();
    for (i64 chunk = 0;;) {
      for (; chunk < end; chunk++, from += 4 * L, x += step)
        add_chunk<PAIR, R, O>(codes, scales + of.first(chunk), stride, spread, from, pitch, x, acc);
      if (end == chunks) break;
      end = chunks, spread = of.last;
      if ((w.N - n0 - n - O) * w.row_bytes >= 4 * L) continue;  // codes of the next output, which meet zeros of x
      __builtin_memset(copies, 0, sizeof copies);
      ROLLED_FOR (int o = 0; o < O; o++)
        __builtin_memcpy(copies[o], from + o * pitch, size_t(w.row_bytes - complete * 4 * L));
      from = copies[0], pitch = 4 * L;
    }
    store_sums<R, O>(acc, out + n);
  }
  return n;
}
// R rows of x for all outputs of an item: as many outputs at once as hide the latency of a sum.
template <bool PAIR, int R, class C>
static void dot_outputs(const QuantizedRowsParams& p, const C& codes, i64 n0, i64 count, const Scales<C>& scales, i64 m,
                        float* out) {
  constexpr int O = L == 16 && R <= 4 ? 4 / (R == 4 ? 2 : 1) : 1;
  const i64 n = dot_rows<PAIR, R, O>(p, codes, n0, 0, count, scales, m, out);
  if (O > 1 && n < count) dot_rows<PAIR, R, 1>(p, codes, n0, n, count, scales, m, out);
}

template <bool PAIR, class C> static void rows_item(const QuantizedRowsParams& p, const C& codes, i64 item) {
  alignas(64) float out[kFewRows][kQuantizedRows];
  const i64 n0 = item * kQuantizedRows, count = p.w.N - n0 < kQuantizedRows ? p.w.N - n0 : kQuantizedRows;
  const Scales<C> scales(p.w, n0, count);
  i64 m = 0;
  if constexpr (L == 16)
    for (; m + 8 <= p.M; m += 8) dot_outputs<PAIR, 8>(p, codes, n0, count, scales, m, out[m]);
  for (; m + 4 <= p.M; m += 4) dot_outputs<PAIR, 4>(p, codes, n0, count, scales, m, out[m]);
  for (; m + 2 <= p.M; m += 2) dot_outputs<PAIR, 2>(p, codes, n0, count, scales, m, out[m]);
  if (m < p.M) dot_outputs<PAIR, 1>(p, codes, n0, count, scales, m, out[m]);
  for (m = 0; m < p.M; m++)
    for_lanes(count, [&](i64 c, i64 n) __attribute__((always_inline)) {
      F y = load_lanes(out[m] + c, n);
      if (p.bias.data) y = y + load_any(at(p.bias.data, p.bias.dtype, n0 + c), p.bias.dtype, n);
      store_any(at(row(p.y, m), p.y.dtype, n0 + c), p.y.dtype, y, n);
    });
}
static void quantized_rows(const QuantizedRowsParams& p, i64 item) {
  if (kOnlyBf16 && !in_pairs(p)) return base.quantized_rows(p, item);
  // x is laid out to meet the codes: here it does not matter which half of a byte comes first
  if constexpr (kOnlyBf16) return rows_item<true>(p, Nibbles(p.w.format), item);
  if (p.w.format == Codes::int8) rows_item<false>(p, Bytes(p.w.format), item);
  else if (in_pairs(p)) rows_item<kPairs>(p, Nibbles(p.w.format), item);
  else rows_item<false>(p, Nibbles(p.w.format), item);
}

static void fill(Kernels& k) {
  k.quantized_spread = quantized_spread;
  k.quantized_rows = quantized_rows;
}
