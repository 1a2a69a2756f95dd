// Tiles of a packed weight on their way into shared memory, 32 codes a thread, for the kernels of many rows in 16 bits.
#pragma once
#include "causal_attention_tile.cuh"
#include "quantized_codes.cuh"

namespace gptfast::cuda {

// 32 neighbouring codes, which have one scale: zeros where there are none.
template <Codes F> struct CodeRun {
  static constexpr int LENGTH = 32, CHUNKS = F == Codes::int8 ? 2 : 1, PER_WORD = kCodesOfWord<F>;
  uint4 codes[CHUNKS];
  uint32_t scale[1];

  DEV_INLINE void load(const PackedWeight& w, i64 n, int k) {
    const int group = k >> (F == Codes::mxfp4 ? 5 : w.group_shift);  // known, it saves registers
    scale[0] = 0;
#pragma unroll
    for (int i = 0; i < CHUNKS; i++) codes[i] = make_uint4(0, 0, 0, 0);
    if (n >= w.N || group >= w.groups) return;
    const uint4* from = reinterpret_cast<const uint4*>(w.codes + n * w.row_bytes + k * 4 / PER_WORD);
#pragma unroll
    for (int i = 0; i < CHUNKS; i++) codes[i] = from[i];
    scale[0] = scale_bits<F>(w, w.scales, n * w.groups + group);
  }
  // As weights, rounded once, to columns `column` … of a row of a tile.
  template <class E, int WIDTH>
  DEV_INLINE void store(const Tile<E, WIDTH>& tile, int row, int column, const PackedWeight& w,
                        const Decoder<float>& decoder) const {
    float by[1];
    scale_values<F>(by, w, scale);
#pragma unroll
    for (int chunk = 0; chunk < LENGTH / 8; chunk++) {
      uint32_t pairs[4];
#pragma unroll
      for (int i = 0; i < 8 / PER_WORD; i++) {
        const int word = chunk * 8 / PER_WORD + i;
        float x[PER_WORD];
        word_values<F>(word_at(codes[word / 4], word % 4), decoder, x);
#pragma unroll
        for (int c = 0; c < PER_WORD; c += 2) pairs[(i * PER_WORD + c) / 2] = pair<E>(x[c] * by[0], x[c + 1] * by[0]);
      }
      *reinterpret_cast<uint4*>(tile.chunk(row, column / 8 + chunk)) =
          make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
    }
  }
};

// Bias of columns c and c + 1.
DEV_INLINE float2 bias_pair(const Vector& bias, i64 c, i64 columns) {
  float first[1] = {0.f}, second[1] = {0.f};
  if (bias.data && c < columns) load_any<1>(first, bias.data, bias.dtype, c);
  if (bias.data && c + 1 < columns) load_any<1>(second, bias.data, bias.dtype, c + 1);
  return make_float2(first[0], second[0]);
}
// Results c and c + 1 of a row of y.
template <class E>
DEV_INLINE void store_pair(const QuantizedLinearParams& p, i64 m, i64 c, i64 columns, float first, float second) {
  if (m >= p.M || c >= columns) return;
  E* to = static_cast<E*>(p.y.data) + m * p.y.stride + c;
  if (columns % 2 == 0) {
    *reinterpret_cast<uint32_t*>(to) = pair<E>(first, second);
  } else {
    from_float(to[0], first);
    if (c + 1 < columns) from_float(to[1], second);
  }
}

}  // namespace gptfast::cuda
