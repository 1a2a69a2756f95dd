// Token plus position embedding, and the gradient of a table: deterministic, without atomics.
//
// Backward gets the ids sorted, with the permutation that sorted them (a stable one, so equal ids stay in row order). The
// block that finds itself at the first of a run of equal ids adds up the rows of the run, in that order, in fp32.
// Floor: forward two reads and one write of (N, C); backward one read, and one write of the rows that occur.
#include "common.cuh"

namespace gptfast::cuda {
namespace {

constexpr int kThreads = 256;

template <class T, int V> __global__ void __launch_bounds__(kThreads) embedding_fwd_kernel(const EmbeddingParams p) {
  const i64 n = i64(blockIdx.x) * blockDim.y + threadIdx.y;
  if (n >= p.N) return;
  const i64 id = p.ids[n], position = p.positions ? p.positions[n] : n % p.T;
  const bool known = id >= 0 && id < p.V && (!p.wpe.data || (position >= 0 && position < p.P));
  for (i64 c = i64(threadIdx.x) * V; c < p.C; c += blockDim.x * V) {
    float x[V];
#pragma unroll
    for (int k = 0; k < V; k++) x[k] = NAN;
    if (known) load(x, static_cast<const T*>(p.wte.data) + id * p.wte.stride + c);
    if (known && p.wpe.data) {
      float place[V];
      load_any(place, p.wpe.data, p.wpe.dtype, position * p.wpe.stride + c);
#pragma unroll
      for (int k = 0; k < V; k++) x[k] += place[k];
    }
    store(static_cast<T*>(p.out.data) + n * p.out.stride + c, x);
  }
}

template <class T, int V> __global__ void __launch_bounds__(kThreads) embedding_bwd_kernel(const EmbeddingBwdParams p) {
  const i64 first = i64(blockIdx.x) * blockDim.y + threadIdx.y;
  if (first >= p.N) return;
  const i64 id = p.keys[first];
  if (id < 0 || id >= p.V || (first > 0 && p.keys[first - 1] == id)) return;
  for (i64 c = i64(threadIdx.x) * V; c < p.C; c += blockDim.x * V) {
    float sum[V] = {};
    for (i64 n = first; n < p.N && p.keys[n] == id; n++) {
      float x[V];
      const i64 row = p.order[n];
      if (row < 0 || row >= p.N) continue;  // no permutation: what is not there is not read
      load(x, static_cast<const T*>(p.dout.data) + row * p.dout.stride + c);
#pragma unroll
      for (int k = 0; k < V; k++) sum[k] += x[k];
    }
    store_any(p.dtable.data, p.dtable.dtype, id * p.dtable.stride + c, sum);
  }
}

template <int V> dim3 block_of(i64 C) {
  const int x = round_to_warps(ceil_div(C, V), kThreads);
  return dim3(x, kThreads / x);
}

}  // namespace

cudaError_t embedding_fwd(const EmbeddingParams& p, cudaStream_t stream) {
  if (!p.N || !p.C) return cudaSuccess;
  return with_dtype(p.out.dtype, [&](auto t) {
    using T = decltype(t);
    return with_width<T>(
        p.C,
        [&](auto width) {
          constexpr int V = decltype(width)::value;
          const dim3 block = block_of<V>(p.C);
          auto kernel = embedding_fwd_kernel<T, V>;
          LAUNCH(kernel, dim3(unsigned(ceil_div(p.N, block.y))), block, 0, stream, p);
          return cudaGetLastError();
        },
        p.wte, p.wpe, p.out);
  });
}

cudaError_t embedding_bwd(const EmbeddingBwdParams& p, cudaStream_t stream) {
  if (!p.N || !p.C) return cudaSuccess;
  return with_dtype(p.dout.dtype, [&](auto t) {
    using T = decltype(t);
    return with_width<T>(
        p.C,
        [&](auto width) {
          constexpr int V = decltype(width)::value;
          const dim3 block = block_of<V>(p.C);
          auto kernel = embedding_bwd_kernel<T, V>;
          LAUNCH(kernel, dim3(unsigned(ceil_div(p.N, block.y))), block, 0, stream, p);
          return cudaGetLastError();
        },
        p.dout, p.dtable);
  });
}

}  // namespace gptfast::cuda
