// Backward of causal_attention for every GPU: the launches of the kernels in causal_attention_bwd.cuh, delta, and the gradient of
// the sinks.
#include "causal_attention_bwd.cuh"
#include "causal_attention_delta.cuh"

namespace gptfast::cuda {
namespace {

// ---- delta: four lanes a query --------------------------------------------------------------------------------------

template <class E> __global__ void __launch_bounds__(128) row_products(const __grid_constant__ AttentionParams p) {
  const i64 n = i64(blockIdx.x) * 32 + threadIdx.x / 4;
  const bool inside = n < i64(p.B) * p.H * p.T;
  const int i = inside ? int(n % p.T) : 0, bh = inside ? int(n / p.T) : 0;
  const float delta = query_delta<E>(p, bh / p.H, bh % p.H, i, inside);
  if (inside && threadIdx.x % 4 == 0) p.delta[n] = delta;
}

// ---- launching ------------------------------------------------------------------------------------------------------

template <class Q, class K> cudaError_t launch(const AttentionParams& p, cudaStream_t stream) {
  const i64 heads = i64(p.B) * p.H;
  if (p.T) {
    auto queries = query_gradient<Q>;
    if (const cudaError_t error = allow_smem(queries, Q::SMEM)) return error;
    LAUNCH(queries, dim3(unsigned(ceil_div(p.T, Q::BM) * heads)), dim3(Q::THREADS), Q::SMEM, stream, p);
    if (const cudaError_t error = cudaGetLastError()) return error;
  }
  if (!p.S) return cudaSuccess;
  auto keys = key_gradients<K>;
  if (const cudaError_t error = allow_smem(keys, K::SMEM)) return error;
  const i64 key_blocks = ceil_div(p.S, K::BM) * (heads / p.group) * (K::D / K::OUT);
  LAUNCH(keys, dim3(unsigned(key_blocks)), dim3(K::THREADS), K::SMEM, stream, p);
  return cudaGetLastError();
}

// ---- dsinks: one block a head ---------------------------------------------------------------------------------------

constexpr int kSinkThreads = 256;
__global__ void __launch_bounds__(kSinkThreads) sink_gradients(const __grid_constant__ AttentionParams p) {
  DYN_SMEM(smem);
  const int h = blockIdx.x;
  const float sink = p.sinks[h] * kLog2e, scale_log2 = scale_log2_of(p);
  float sum = 0.f;
  for (i64 n = threadIdx.x; n < i64(p.B) * p.T; n += kSinkThreads) {
    const i64 query = (n / p.T * p.H + h) * p.T + n % p.T;
    const float level = p.level[query];
    if (level != -INFINITY) sum -= fast_exp2(sink - p.shift[query] * scale_log2 - level) * p.delta[query];
  }
  sum = block_reduce(sum, Sum{}, 0.f, smem);
  if (threadIdx.x == 0) p.dsinks[h] = sum;
}

}  // namespace

cudaError_t causal_attention_dsinks(const AttentionParams& p, cudaStream_t stream) {
  LAUNCH(sink_gradients, dim3(unsigned(p.H)), dim3(kSinkThreads), 4 * kSinkThreads / 32, stream, p);
  return cudaGetLastError();
}
cudaError_t causal_attention_delta(const AttentionParams& p, cudaStream_t stream) {
  const i64 rows = i64(p.B) * p.H * p.T;
  if (!rows) return cudaSuccess;
  return with_dtype(p.dtype, [&](auto element) {
    auto products = row_products<decltype(element)>;
    LAUNCH(products, dim3(unsigned(ceil_div(rows, 32))), dim3(128), 0, stream, p);
    return cudaGetLastError();
  });
}

cudaError_t causal_attention_bwd_sm80(const AttentionParams& p, cudaStream_t stream) {
  return with_dtype(p.dtype, [&](auto element) {
    using E = decltype(element);
    // D, MT, warps, BN, stages; for keys also the rows met and the columns summed at once
    if constexpr (sizeof(E) == 4) {
      using Keys128 = BackwardShape<E, 128, 1, 4, 32, 1, 16, 64>;
      using Keys256 = BackwardShape<E, 256, 1, 2, 16, 1, 16, 64>;
      if (p.D <= 32) return launch<BackwardShape<E, 32, 1, 4, 32, 2>, BackwardShape<E, 32, 1, 4, 32, 2>>(p, stream);
      if (p.D <= 64) return launch<BackwardShape<E, 64, 1, 4, 32, 2>, BackwardShape<E, 64, 1, 4, 32, 2, 16>>(p, stream);
      if (p.D <= 128) return launch<BackwardShape<E, 128, 1, 4, 32, 1>, Keys128>(p, stream);
      return launch<BackwardShape<E, 256, 1, 2, 16, 1>, Keys256>(p, stream);
    } else {
      using Keys64 = BackwardShape<E, 64, 2, 4, 64, 2, 16>;
      using Keys256 = BackwardShape<E, 256, 1, 4, 32, 1, 32, 128>;
      if (p.D <= 32) return launch<BackwardShape<E, 32, 2, 4, 32, 2>, BackwardShape<E, 32, 2, 4, 32, 2>>(p, stream);
      if (p.D <= 64) return launch<BackwardShape<E, 64, 2, 4, 32, 2>, Keys64>(p, stream);
      if (p.D <= 128) return launch<BackwardShape<E, 128, 1, 4, 32, 2>, BackwardShape<E, 128, 1, 4, 32, 2>>(p, stream);
      return launch<BackwardShape<E, 256, 1, 4, 32, 1>, Keys256>(p, stream);
    }
  });
}

}  // namespace gptfast::cuda
