// quantized_linear for many rows in 16 bits, both ways, on Hopper: tiles of the weight become 16-bit values in shared memory, each
// rounded once, and wgmma multiplies them by tiles of x, which TMA loads. Warpgroup 0 decodes into a ring of STAGES buffers;
// each of the others has 64 ROWS rows of 128 results. The order of a sum does not depend on ROWS.
//
// Barriers in shared memory, of each stage: x and the weights are there; both have been used.
//
// Floor: 2 M N K flops. A step of 64 takes the tensor cores 512 ROWS cycles, in which each decoding thread makes 64 weights:
// about five instructions each, one warp on each scheduler.
#include "causal_attention_sm90.cuh"
#include "quantized_tile.cuh"

namespace gptfast::cuda {
namespace {

template <class E_, Codes F_, bool TRANSPOSED_, int ROWS_> struct PackedShape {
  using E = E_;
  static constexpr Codes F = F_;
  static constexpr bool TRANSPOSED = TRANSPOSED_;
  static constexpr int ROWS = ROWS_, CONSUMERS = 2, BM = 64 * ROWS * CONSUMERS, BN = 128, DEPTH = 64, STAGES = 4;
  static constexpr int W_ROWS = TRANSPOSED ? DEPTH : BN, W_COLUMNS = TRANSPOSED ? BN : DEPTH;
  static constexpr int THREADS = 128 * (CONSUMERS + 1), X_BYTES = BM * DEPTH * 2, W_BYTES = W_ROWS * W_COLUMNS * 2;
  static constexpr int BARRIERS = STAGES * (X_BYTES + W_BYTES), TABLE = BARRIERS + 2 * STAGES * 8;
  static constexpr int SMEM = TABLE + (kLooksUp<float, F> ? Decoder<float>::BYTES : 0);
};

template <class C>
__global__ void HOPPER_BOUNDS(C::THREADS)
    quantized_products_sm90(const __grid_constant__ QuantizedLinearParams p, const __grid_constant__ CUtensorMap x_map,
                            int row_tiles) {
#if defined(GPTFAST_HOPPER)
  using E = typename C::E;
  using Run = CodeRun<C::F>;
  constexpr bool TRANSPOSED = C::TRANSPOSED;
  constexpr int STAGES = C::STAGES, ROWS = C::ROWS, DEPTH = C::DEPTH, W_ROWS = C::W_ROWS;
  DYN_SMEM(smem);
  const uint32_t x_at = smem_u32(smem), w_at = x_at + STAGES * C::X_BYTES, barriers = x_at + C::BARRIERS;
  auto full = [&](int stage) { return barriers + stage * 8; };
  auto free = [&](int stage) { return barriers + (STAGES + stage) * 8; };
  const int m0 = int(blockIdx.x) % row_tiles * C::BM;
  const i64 column0 = i64(int(blockIdx.x) / row_tiles) * C::BN;
  const int depth = TRANSPOSED ? p.w.N : p.w.groups << p.w.group_shift, steps = (depth + DEPTH - 1) / DEPTH;
  if (threadIdx.x == 0) {
    for (int s = 0; s < STAGES; s++) mbarrier_init(full(s), 1 + 128), mbarrier_init(free(s), C::CONSUMERS);
    mbarrier_init_fence();
  }
  if constexpr (kLooksUp<float, C::F>) Decoder<float>::template fill<C::F>(smem + C::TABLE);
  __syncthreads();

  if (threadIdx.x < 128) {  // ---- decodes 64 columns of a row, in runs of 32
    setmaxnreg_dec<88>();
    constexpr int RUNS = 2, AHEAD = 2;  // steps whose codes are on their way
    const Decoder<float> decoder{smem + C::TABLE};
    const int row = int(threadIdx.x) % W_ROWS, panel = int(threadIdx.x) / W_ROWS;
    Run runs[AHEAD][RUNS];
    auto load = [&](Run(&to)[RUNS], int step) {
#pragma unroll
      for (int r = 0; r < RUNS; r++) {
        if constexpr (TRANSPOSED) to[r].load(p.w, i64(step) * DEPTH + row, int(column0) + panel * 64 + r * Run::LENGTH);
        else to[r].load(p.w, column0 + row, step * DEPTH + r * Run::LENGTH);
      }
    };
#pragma unroll
    for (int a = 0; a < AHEAD; a++) load(runs[a], a);
    for (int first = 0; first < steps; first += AHEAD)
#pragma unroll
      for (int a = 0; a < AHEAD; a++) {
        const int step = first + a, stage = step % STAGES;
        if (step >= steps) break;
        if (step >= STAGES) mbarrier_wait(free(stage), (step / STAGES - 1) & 1);
        if (threadIdx.x == 0) {
          mbarrier_expect(full(stage), C::X_BYTES);
          tma_load(x_at + stage * C::X_BYTES, &x_map, full(stage), step * DEPTH, m0, 0, 0);
        }
        const Tile<E, 64> tile{smem + STAGES * C::X_BYTES + stage * C::W_BYTES + panel * W_ROWS * 128};
#pragma unroll
        for (int r = 0; r < RUNS; r++) runs[a][r].store(tile, row, r * Run::LENGTH, p.w, decoder);
        fence_proxy_async();  // wgmma reads what was written here
        mbarrier_arrive(full(stage));
        load(runs[a], step + AHEAD);
      }
    return;
  }

  // ---- 64 ROWS rows
  setmaxnreg_inc<208>();
  const int warp = warp_number() - 4, w = warp / 4, lane = threadIdx.x % 32;
  const bool leader = threadIdx.x % 128 == 0;
  float sums[ROWS][C::BN / 8][4];
  for (int step = 0; step < steps; step++) {
    const int stage = step % STAGES;
    mbarrier_wait(full(stage), (step / STAGES) & 1);
    const uint64_t x = smem_descriptor(x_at + stage * C::X_BYTES + w * ROWS * 64 * 128, 16, 1024);
    const uint64_t weights = smem_descriptor(w_at + stage * C::W_BYTES, TRANSPOSED ? W_ROWS * 128 : 16, 1024);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < DEPTH / 16; k++)
#pragma unroll
      for (int r = 0; r < ROWS; r++)
        wgmma<E, 0, TRANSPOSED>(sums[r], moved(x, r * 64 * 128 + k * 32),
                                moved(weights, k * (TRANSPOSED ? 16 * 128 : 32)), step + k != 0);
    wgmma_commit();
    wgmma_wait<1>();
    if (step && leader) mbarrier_arrive(free((step - 1) % STAGES));
  }
  wgmma_wait<0>();

  const i64 columns = TRANSPOSED ? p.w.K : p.w.N;
#pragma unroll
  for (int j = 0; j < C::BN / 8; j++) {
    const i64 c = column0 + j * 8 + lane % 4 * 2;
    const float2 bias = bias_pair(p.bias, c, columns);
#pragma unroll
    for (int r = 0; r < ROWS; r++)
#pragma unroll
      for (int half = 0; half < 2; half++)
        store_pair<E>(p, i64(m0) + (w * ROWS + r) * 64 + warp % 4 * 16 + half * 8 + lane / 4, c, columns,
                      sums[r][j][2 * half] + bias.x, sums[r][j][2 * half + 1] + bias.y);
  }
#else
  __trap();
#endif
}

template <class C> cudaError_t launch(const QuantizedLinearParams& p, i64 tiles, cudaStream_t stream) {
  auto kernel = quantized_products_sm90<C>;
  if (const cudaError_t error = allow_smem(kernel, C::SMEM)) return error;  // makes a context current, which maps need
  const uint64_t columns = uint64_t(row_columns(p.w, p.transposed)),
                 row = p.M > 1 ? uint64_t(p.x.stride) * 2 : columns * 2;
  CUtensorMap map;
  if (!tensor_map(&map, {p.x.data, {columns, uint64_t(p.M), 1, 1}, {row, row, row}, p.x.dtype}, C::BM))
    return kMapRefused;
  LAUNCH(kernel, dim3(unsigned(tiles)), dim3(C::THREADS), C::SMEM, stream, p, map, int(ceil_div(p.M, C::BM)));
  return cudaGetLastError();
}
// More rows a block, for which a weight is decoded once, where there are blocks enough for every multiprocessor.
template <class E, Codes F, bool TRANSPOSED>
cudaError_t launch_rows(const QuantizedLinearParams& p, cudaStream_t stream) {
  using Small = PackedShape<E, F, TRANSPOSED, 1>;
  using Large = PackedShape<E, F, TRANSPOSED, 2>;
  int processors = 0;
  if (const cudaError_t error = multiprocessors(&processors)) return error;
  const i64 across = ceil_div(TRANSPOSED ? p.w.K : p.w.N, Small::BN), large = across * ceil_div(p.M, Large::BM);
  if (large >= processors && large <= INT32_MAX) return launch<Large>(p, large, stream);
  return launch<Small>(p, across * ceil_div(p.M, Small::BM), stream);
}
template <class E> cudaError_t launch_format(const QuantizedLinearParams& p, cudaStream_t stream) {
  return with_codes(p.w.format, [&](auto f) {
    constexpr Codes F = decltype(f)::value;
    return p.transposed ? launch_rows<E, F, true>(p, stream) : launch_rows<E, F, false>(p, stream);
  });
}

}  // namespace

bool quantized_linear_sm90_takes(const QuantizedLinearParams& p) {
  using C = PackedShape<bf16, Codes::nf4, false, 2>;
  static HopperGpus gpus(quantized_products_sm90<C>, C::THREADS, C::SMEM);
  return p.x.dtype != DType::f32 && (p.M == 1 || p.x.stride < i64(1) << 38) && gpus.has_current();
}

cudaError_t quantized_linear_sm90(const QuantizedLinearParams& p, cudaStream_t stream) {
  return p.x.dtype == DType::f16 ? launch_format<__half>(p, stream) : launch_format<bf16>(p, stream);
}

}  // namespace gptfast::cuda
