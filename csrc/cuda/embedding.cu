// Token plus position embedding, and the gradient of a table: deterministic, without atomics.
//
// Backward gets the ids sorted, with the permutation that sorted them (a stable one, so equal ids stay in row order). Who
// finds himself at the first of a run of equal ids adds up the rows of the run, in that order, in fp32, eight of them on
// their way from memory at once. A run is cut where a segment of kEmbeddingSegment ids ends: the pieces of one run - the
// padding of a batch, the commonest words - are summed side by side, and a second kernel adds them in order.
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

constexpr int kRowsAtOnce = 8;

// Adds rows of a table of type T to sum, at columns c .. c + V - 1: those of lanes 0 .. count - 1, in that order; a negative
// one is left out. All lanes of a warp call; where `inside` is false nothing is read.
template <class T, int V>
DEV_INLINE void add_rows(float (&sum)[V], const T* table, i64 stride, i64 row, int count, i64 c, bool inside) {
  const bool whole = __all_sync(kAllLanes, row >= 0 || int(threadIdx.x & 31) >= count);
  for (int first = 0; first < count; first += kRowsAtOnce) {
    const T* at[kRowsAtOnce];
    bool there[kRowsAtOnce];
#pragma unroll
    for (int k = 0; k < kRowsAtOnce; k++) {
      const i64 n = __shfl_sync(kAllLanes, row, (first + k) & 31);
      at[k] = table + n * stride + c;
      there[k] = inside && first + k < count && n >= 0;
    }
    Raw<T, V> rows[kRowsAtOnce];
    if (whole && inside && first + kRowsAtOnce <= count) {  // without conditions, or fewer would be on their way
#pragma unroll
      for (int k = 0; k < kRowsAtOnce; k++) rows[k].load(at[k]);
    } else {
#pragma unroll
      for (int k = 0; k < kRowsAtOnce; k++)
        if (there[k]) rows[k].load(at[k]);
        else rows[k].zero();
    }
#pragma unroll
    for (int k = 0; k < kRowsAtOnce; k++) {
      float x[V];
      rows[k].values(x);
#pragma unroll
      for (int n = 0; n < V; n++) sum[n] += x[n];
    }
  }
}
// How many of the lanes from 0 on say yes.
DEV_INLINE int leading(bool yes) {
  const unsigned said = __ballot_sync(kAllLanes, yes);
  return said == kAllLanes ? 32 : __ffs(int(~said)) - 1;
}

template <class T, int V>
__global__ void __launch_bounds__(kThreads) embedding_bwd_kernel(const EmbeddingBwdParams p, float* pieces) {
  const i64 first = i64(blockIdx.x) * blockDim.y + threadIdx.y;
  if (first >= p.N) return;
  const i64 id = p.keys[first], segment = first / kEmbeddingSegment;
  const bool begins = first == 0 || p.keys[first - 1] != id;
  if (id < 0 || id >= p.V || !(begins || first % kEmbeddingSegment == 0)) return;
  const i64 end = (segment + 1) * kEmbeddingSegment < p.N ? (segment + 1) * kEmbeddingSegment : p.N;
  const int lane = threadIdx.x & 31;
  for (i64 c0 = 0; c0 < p.C; c0 += blockDim.x * V) {
    const i64 c = c0 + threadIdx.x * V;
    float sum[V] = {};
    i64 n = first;
    for (int count = 32; count == 32;) {
      const bool mine = n + lane < end && p.keys[n + lane] == id;
      const i64 row = mine ? p.order[n + lane] : -1;
      count = leading(mine);
      // no permutation: what is not there is not read
      add_rows(sum, static_cast<const T*>(p.dout.data), p.dout.stride, row < p.N ? row : -1, count, c, c < p.C);
      n += count;
    }
    if (c >= p.C) continue;
    const bool goes_on = n == end && n < p.N && p.keys[n] == id;
    if (begins && !goes_on) store_any(p.dtable.data, p.dtable.dtype, id * p.dtable.stride + c, sum);
    else store(pieces + (2 * segment + begins) * p.C + c, sum);
  }
}

// The runs that go on over the end of segment n of their first id: the sum of their pieces.
template <int V>
__global__ void __launch_bounds__(kThreads)
    embedding_bwd_pieces_kernel(const EmbeddingBwdParams p, const float* pieces) {
  const i64 segment = i64(blockIdx.x) * blockDim.y + threadIdx.y, next = (segment + 1) * kEmbeddingSegment;
  if (next >= p.N) return;
  const i64 id = p.keys[next - 1], first = segment * kEmbeddingSegment;
  if (id < 0 || id >= p.V || p.keys[next] != id) return;
  if (first > 0 && p.keys[first] == id && p.keys[first - 1] == id) return;  // it begins in a segment before
  const int lane = threadIdx.x & 31;
  for (i64 c0 = 0; c0 < p.C; c0 += blockDim.x * V) {
    const i64 c = c0 + threadIdx.x * V;
    float sum[V] = {};
    if (c < p.C) load(sum, pieces + (2 * segment + 1) * p.C + c);
    i64 n = segment + 1;
    for (int count = 32; count == 32; n += count) {
      const i64 at = (n + lane) * kEmbeddingSegment;
      count = leading(at < p.N && p.keys[at < p.N ? at : 0] == id);
      add_rows(sum, pieces, p.C, 2 * (n + lane), count, c, c < p.C);
    }
    if (c < p.C) store_any(p.dtable.data, p.dtable.dtype, id * p.dtable.stride + c, sum);
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

cudaError_t embedding_bwd(const EmbeddingBwdParams& p, float* pieces, cudaStream_t stream) {
  if (!p.N || !p.C) return cudaSuccess;
  return with_dtype(p.dout.dtype, [&](auto t) {
    using T = decltype(t);
    return with_width<T>(
        p.C,
        [&](auto width) {
          constexpr int V = decltype(width)::value;
          const dim3 block = block_of<V>(p.C);
          auto kernel = embedding_bwd_kernel<T, V>;
          LAUNCH(kernel, dim3(unsigned(ceil_div(p.N, block.y))), block, 0, stream, p, pieces);
          const cudaError_t error = cudaGetLastError();
          const i64 ends = (p.N - 1) / kEmbeddingSegment;  // of segments, where a run may go on
          if (error != cudaSuccess || !ends) return error;
          auto add = embedding_bwd_pieces_kernel<V>;
          LAUNCH(add, dim3(unsigned(ceil_div(ends, block.y))), block, 0, stream, p, pieces);
          return cudaGetLastError();
        },
        p.dout, p.dtable, Vector{pieces, DType::f32});
  });
}

}  // namespace gptfast::cuda
