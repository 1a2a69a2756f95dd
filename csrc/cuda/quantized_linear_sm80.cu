// quantized_linear for many rows in 16 bits, both ways, on every GPU: tiles of the weight become 16-bit values in shared memory,
// each rounded once, and mma.sync multiplies them by tiles of x. 128 x 128 results a block, 64 x 32 a warp. While the tensor cores
// have one step of 64, the next is decoded beside it and the codes of the one after are on their way.
//
// Floor: 2 M N K flops. Of a step each thread decodes 32 codes, and each warp has 64 products of 16 x 8 x 16.
#include "quantized_tile.cuh"

namespace gptfast::cuda {
namespace {

constexpr int kThreads = 256, kTile = 128, kDepth = 64, kTileBytes = kTile * kDepth * 2;

template <class E, Codes F, bool TRANSPOSED>
__global__ void __launch_bounds__(kThreads, 2)
    quantized_products_sm80(const __grid_constant__ QuantizedLinearParams p, int row_tiles) {
  using Run = CodeRun<F>;
  // All of a step unrolled would keep too many addresses in registers; ptxas for 9.0 has fewer left than that for 8.0.
  constexpr int UNROLL = F == Codes::int8 ? (TRANSPOSED ? 4 : 1) : TRANSPOSED ? 1 : 2;
  constexpr int WIDTH = TRANSPOSED ? kTile : kDepth, RUNS = WIDTH / Run::LENGTH;  // of a row of the weight's tile
  DYN_SMEM(smem);
  char* table = smem + 4 * kTileBytes;
  const Decoder<float> decoder{table};
  auto x_tile = [&](int step) { return Tile<E, kDepth>{smem + step % 2 * kTileBytes}; };
  auto w_tile = [&](int step) { return Tile<E, WIDTH>{smem + (2 + step % 2) * kTileBytes}; };
  const i64 m0 = i64(blockIdx.x % row_tiles) * kTile, column0 = i64(blockIdx.x / row_tiles) * kTile;
  const int depth = TRANSPOSED ? p.w.N : p.w.groups << p.w.group_shift, steps = (depth + kDepth - 1) / kDepth;
  const int warp = int(threadIdx.x) / 32, lane = threadIdx.x % 32, down = warp / 4 * 64, across = warp % 4 * 32;

  auto load_x = [&](int step) {
    constexpr int CHUNKS = kDepth / 8;
    const int n = int(threadIdx.x) % CHUNKS, at = step * kDepth + n * 8;
#pragma unroll
    for (int r = int(threadIdx.x) / CHUNKS; r < kTile; r += kThreads / CHUNKS) {
      const bool inside = m0 + r < p.M && at < depth;
      const E* from = static_cast<const E*>(p.x.data) + (m0 + r) * p.x.stride + at;
      cp_async(smem_u32(x_tile(step).chunk(r, n)), inside ? from : p.x.data, inside);
    }
    cp_async_commit();
  };
  Run run;
  const int run_row = int(threadIdx.x) / RUNS, run_column = int(threadIdx.x) % RUNS * Run::LENGTH;
  auto load_run = [&](int step) {
    if constexpr (TRANSPOSED) run.load(p.w, i64(step) * kDepth + run_row, int(column0) + run_column);
    else run.load(p.w, column0 + run_row, step * kDepth + run_column);
  };
  auto store_run = [&](int step) { run.store(w_tile(step), run_row, run_column, p.w, decoder); };

  load_x(0);
  load_run(0);
  if constexpr (kLooksUp<float, F>) decoder.template fill<F>(table), __syncthreads();
  store_run(0);
  load_run(1);
  float sums[4][4][4] = {};
  for (int step = 0; step < steps; step++) {
    cp_async_wait<0>();
    __syncthreads();  // this step is there, and the one before has been used
    if (step + 1 < steps) {
      load_x(step + 1);
      store_run(step + 1);
      load_run(step + 2);
    }
#pragma unroll(UNROLL)
    for (int d = 0; d < kDepth; d += 16) {
      uint32_t a[4][4];
#pragma unroll
      for (int i = 0; i < 4; i++) load_a(a[i], x_tile(step), down + 16 * i, d);
#pragma unroll
      for (int j = 0; j < 4; j += 2) {
        uint32_t b[4];
        if constexpr (TRANSPOSED) load_b_transposed(b, w_tile(step), d, across + 8 * j);
        else load_b(b, w_tile(step), across + 8 * j, d);
#pragma unroll
        for (int i = 0; i < 4; i++) mma<E>(sums[i][j], a[i], b), mma<E>(sums[i][j + 1], a[i], b + 2);
      }
    }
  }
  const i64 columns = TRANSPOSED ? p.w.K : p.w.N;
#pragma unroll
  for (int j = 0; j < 4; j++) {
    const i64 c = column0 + across + j * 8 + lane % 4 * 2;
    const float2 bias = bias_pair(p.bias, c, columns);
#pragma unroll
    for (int i = 0; i < 4; i++)
#pragma unroll
      for (int half = 0; half < 2; half++)
        store_pair<E>(p, m0 + down + i * 16 + half * 8 + lane / 4, c, columns, sums[i][j][2 * half] + bias.x,
                      sums[i][j][2 * half + 1] + bias.y);
  }
}

template <class E, Codes F, bool TRANSPOSED> cudaError_t launch(const QuantizedLinearParams& p, cudaStream_t stream) {
  const i64 row_tiles = ceil_div(p.M, kTile), tiles = row_tiles * ceil_div(TRANSPOSED ? p.w.K : p.w.N, kTile);
  if (tiles > INT32_MAX) return cudaErrorInvalidConfiguration;
  const size_t smem = 4 * kTileBytes + (kLooksUp<float, F> ? Decoder<float>::BYTES : 0);
  auto kernel = quantized_products_sm80<E, F, TRANSPOSED>;
  if (const cudaError_t error = allow_smem(kernel, smem)) return error;
  LAUNCH(kernel, dim3(unsigned(tiles)), dim3(kThreads), smem, stream, p, int(row_tiles));
  return cudaGetLastError();
}
template <class E> cudaError_t launch_format(const QuantizedLinearParams& p, cudaStream_t stream) {
  return with_codes(p.w.format, [&](auto f) {
    constexpr Codes F = decltype(f)::value;
    return p.transposed ? launch<E, F, true>(p, stream) : launch<E, F, false>(p, stream);
  });
}

}  // namespace

cudaError_t quantized_linear_sm80(const QuantizedLinearParams& p, cudaStream_t stream) {
  return p.x.dtype == DType::f16 ? launch_format<__half>(p, stream) : launch_format<bf16>(p, stream);
}

}  // namespace gptfast::cuda
