// quantized_linear for many rows of fp32, both ways: tiles of the weight become fp32 in shared memory, and fp32's own
// multiply-adds sum them, as tensor cores would round their operands to tf32. 128 x 128 results a block, 8 x 8 a thread.
//
// Floor: 2 M N K flops. A step of 32 along the contraction takes 2048 multiply-adds a thread and 16 codes.
#include "quantized_codes.cuh"

namespace gptfast::cuda {
namespace {

constexpr int kThreads = 256, kTile = 128, kDepth = 32, kPitch = kTile + 4,
              kEach = 16;  // of a thread, of x and of codes

// What a thread brings into shared memory for one step.
template <Codes F, bool TRANSPOSED> struct Step {
  static constexpr int WORDS = kEach / kCodesOfWord<F>;
  float4 x[kEach / 4];
  uint32_t words[WORDS], scale[1];

  DEV_INLINE void load(const QuantizedLinearParams& p, i64 m0, i64 column0, int depth0) {
    const PackedWeight& w = p.w;
    const int tid = threadIdx.x, at = depth0 + tid / kTile * kEach;
    const i64 m = m0 + tid % kTile, end = TRANSPOSED ? (w.N + 7) / 8 * 8 : i64(w.groups) << w.group_shift;
    const float* row = static_cast<const float*>(p.x.data) + m * p.x.stride + at;
#pragma unroll
    for (int i = 0; i < kEach / 4; i++) {
      x[i] = make_float4(0.f, 0.f, 0.f, 0.f);
      if (m < p.M && at + 4 * i < end) x[i] = *reinterpret_cast<const float4*>(row + 4 * i);
    }
    const i64 n = TRANSPOSED ? depth0 + tid / 8 : column0 + tid % kTile;
    const i64 k = TRANSPOSED ? column0 + tid % 8 * kEach : at;
    scale[0] = 0;
#pragma unroll
    for (int i = 0; i < WORDS; i++) words[i] = 0;
    if (n >= w.N || k >> w.group_shift >= w.groups) return;
    using Word = std::conditional_t<WORDS == 4, uint4, uint2>;
    const Word codes = *reinterpret_cast<const Word*>(w.codes + n * w.row_bytes + k * 4 / kCodesOfWord<F>);
    memcpy(words, &codes, sizeof codes);
    scale[0] = scale_bits<F>(w, w.scales, n * w.groups + (k >> w.group_shift));
  }
  DEV_INLINE void store(float* xs, float* ws, const PackedWeight& w, const Decoder<float>& decoder) const {
    const int tid = threadIdx.x, column = tid % kTile, row = tid / kTile * kEach;
#pragma unroll
    for (int i = 0; i < kEach / 4; i++) {
      float* to = xs + (row + 4 * i) * kPitch + column;
      to[0] = x[i].x, to[kPitch] = x[i].y, to[2 * kPitch] = x[i].z, to[3 * kPitch] = x[i].w;
    }
    float by[1];
    scale_values<F>(by, w, scale);
#pragma unroll
    for (int i = 0; i < WORDS; i++) {
      constexpr int COUNT = kCodesOfWord<F>;
      float values[COUNT];
      word_values<F>(words[i], decoder, values);
#pragma unroll
      for (float& value : values) value *= by[0];
#pragma unroll
      for (int c = 0; c < COUNT; c += 4) {
        if constexpr (TRANSPOSED) {
          *reinterpret_cast<float4*>(ws + tid / 8 * kPitch + tid % 8 * kEach + i * COUNT + c) =
              make_float4(values[c], values[c + 1], values[c + 2], values[c + 3]);
        } else {
#pragma unroll
          for (int e = 0; e < 4; e++) ws[(row + i * COUNT + c + e) * kPitch + column] = values[c + e];
        }
      }
    }
  }
};

// Eight neighbouring values of a row of a tile, as two fours that lie half a tile apart.
DEV_INLINE void load_eight(float (&x)[8], const float* row, int four) {
  const float4 low = reinterpret_cast<const float4*>(row)[four],
               high = reinterpret_cast<const float4*>(row + kTile / 2)[four];
  x[0] = low.x, x[1] = low.y, x[2] = low.z, x[3] = low.w;
  x[4] = high.x, x[5] = high.y, x[6] = high.z, x[7] = high.w;
}
DEV_INLINE int place_of_eight(int four, int i) { return i / 4 * (kTile / 2) + four * 4 + i % 4; }

template <Codes F, bool TRANSPOSED>
__global__ void __launch_bounds__(kThreads, 2)
    quantized_products_fp32(const __grid_constant__ QuantizedLinearParams p, int row_tiles) {
  DYN_SMEM(smem);
  float *xs = reinterpret_cast<float*>(smem), *ws = xs + kDepth * kPitch;
  char* table = smem + 2 * kDepth * kPitch * sizeof(float);
  const Decoder<float> decoder{table};
  if constexpr (kLooksUp<float, F>) decoder.template fill<F>(table);
  const i64 m0 = i64(blockIdx.x % row_tiles) * kTile, column0 = i64(blockIdx.x / row_tiles) * kTile;
  const int depth = TRANSPOSED ? p.w.N : p.w.groups << p.w.group_shift;
  const int down = int(threadIdx.x) / 16, across = int(threadIdx.x) % 16;
  float sums[8][8] = {};
  for (int at = 0; at < depth; at += kDepth) {
    Step<F, TRANSPOSED>
        step;  // no registers are left to ask ahead: the other block of the multiprocessor computes meanwhile
    step.load(p, m0, column0, at);
    __syncthreads();  // the tiles have been used; at first, the table is there
    step.store(xs, ws, p.w, decoder);
    __syncthreads();
#pragma unroll 8
    for (int d = 0; d < kDepth; d++) {
      float x[8], w[8];
      load_eight(x, xs + d * kPitch, down), load_eight(w, ws + d * kPitch, across);
#pragma unroll
      for (int i = 0; i < 8; i++)
#pragma unroll
        for (int j = 0; j < 8; j++) sums[i][j] = fmaf(x[i], w[j], sums[i][j]);
    }
  }
  const i64 columns = TRANSPOSED ? p.w.K : p.w.N;
#pragma unroll
  for (int j = 0; j < 8; j++) {
    const i64 c = column0 + place_of_eight(across, j);
    if (c >= columns) continue;
    float bias[1] = {0.f};
    if (p.bias.data) load_any<1>(bias, p.bias.data, p.bias.dtype, c);
#pragma unroll
    for (int i = 0; i < 8; i++) {
      const i64 m = m0 + place_of_eight(down, i);
      if (m < p.M) static_cast<float*>(p.y.data)[m * p.y.stride + c] = sums[i][j] + bias[0];
    }
  }
}

template <Codes F, bool TRANSPOSED> cudaError_t launch(const QuantizedLinearParams& p, cudaStream_t stream) {
  const i64 row_tiles = ceil_div(p.M, kTile), tiles = row_tiles * ceil_div(TRANSPOSED ? p.w.K : p.w.N, kTile);
  if (tiles > INT32_MAX) return cudaErrorInvalidConfiguration;
  const size_t smem = 2 * kDepth * kPitch * sizeof(float) + (kLooksUp<float, F> ? Decoder<float>::BYTES : 0);
  auto kernel = quantized_products_fp32<F, TRANSPOSED>;
  LAUNCH(kernel, dim3(unsigned(tiles)), dim3(kThreads), smem, stream, p, int(row_tiles));
  return cudaGetLastError();
}

}  // namespace

cudaError_t quantized_linear_fp32(const QuantizedLinearParams& p, cudaStream_t stream) {
  return with_codes(p.w.format, [&](auto f) {
    constexpr Codes F = decltype(f)::value;
    return p.transposed ? launch<F, true>(p, stream) : launch<F, false>(p, stream);
  });
}

}  // namespace gptfast::cuda
