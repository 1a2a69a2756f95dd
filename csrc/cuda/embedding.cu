// Token plus position embedding, and the gradient of a table: deterministic, without atomics.
//
// Backward gets the ids sorted, with the permutation that sorted them (a stable one, so equal ids stay in row order). The
// block that finds itself at the first of a run of equal ids adds up the rows of the run, in that order, in fp32.
// Floor: forward two reads and one write of (N, C); backward one read, and one write of the rows that occur.
#include "common.cuh"

namespace gptfast::cuda {
namespace {

constexpr int kThreads = 256, kAhead = 8;

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

// Where the run of `id` that holds `first` ends: in doubling steps, as most runs are short, then by halving.
DEV_INLINE i64 end_of_run(const i64* keys, i64 first, i64 N, i64 id) {
  i64 inside = first, step = 1;
  while (inside + step < N && keys[inside + step] == id) inside += step, step *= 2;
  i64 outside = inside + step < N ? inside + step : N;
  while (outside - inside > 1) {
    const i64 middle = inside + (outside - inside) / 2;
    if (keys[middle] == id) inside = middle;
    else outside = middle;
  }
  return outside;
}

template <class T, int V> __global__ void __launch_bounds__(kThreads) embedding_bwd_kernel(const EmbeddingBwdParams p) {
  const i64 first = i64(blockIdx.x) * blockDim.y + threadIdx.y;
  if (first >= p.N) return;
  const i64 id = p.keys[first];
  if (id < 0 || id >= p.V || (first > 0 && p.keys[first - 1] == id)) return;
  const i64 end = end_of_run(p.keys, first, p.N, id);
  // Row numbers are a group ahead of the rows, and the rows of a group are under way together: a frequent token has thousands.
  i64 rows[kAhead];
  auto look_ahead = [&](i64 n) {
#pragma unroll
    for (int u = 0; u < kAhead; u++) rows[u] = n + u < end ? p.order[n + u] : -1;
  };
  for (i64 c = i64(threadIdx.x) * V; c < p.C; c += blockDim.x * V) {
    const T* dout = static_cast<const T*>(p.dout.data) + c;
    float sum[V] = {};
    look_ahead(first);
    for (i64 n = first; n < end; n += kAhead) {
      Values<T, V> x[kAhead];
      bool known[kAhead];  // else past the end, or no permutation: row 0 is read in its place, and not added
#pragma unroll
      for (int u = 0; u < kAhead; u++) {
        known[u] = rows[u] >= 0 && rows[u] < p.N;
        x[u].load(dout + (known[u] ? rows[u] : 0) * p.dout.stride);
      }
      look_ahead(n + kAhead);
#pragma unroll
      for (int u = 0; u < kAhead; u++)
#pragma unroll
        for (int k = 0; k < V; k++) sum[k] += known[u] ? x[u][k] : 0.f;
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
