// Backward of layer_norm and add_layer_norm.
//
//   dtotal += rstd (g - mean(g) - xhat mean(g xhat)),  g = dy weight,  xhat = (total - mean) rstd
//   dx = dropout(dtotal),  dresidual = dtotal
//   dweight = sum_rows dy xhat,  dbias = sum_rows dy
//
// Block number n takes rows n, n + parts, …; a thread keeps its columns' dweight and dbias in registers (columns past its
// first N vectors: in the block's own row of the partial sums) and leaves them for sum_parts.
// Floor: two reads and one write (with a residual three and one or two).
#include "common.cuh"
#include "philox.cuh"

namespace gptfast::cuda {
namespace {

// With two vectors a thread, 512 threads would leave each too few registers.
constexpr int most_threads(int vectors) { return vectors == 1 ? 512 : 384; }

// One row at columns c .. c + V - 1: xhat, dy and g.
template <int V> struct Values {
  float xhat[V], dy[V], g[V];
};
template <class T, int V> DEV_INLINE void read(Values<V>& v, const LayerNormParams& p, i64 r, int c) {
  load(v.xhat, static_cast<const T*>(p.x.data) + r * p.x.stride + c);
#pragma unroll
  for (int k = 0; k < V; k++) v.dy[k] = 0.f;
  if (p.dy.data) load_any(v.dy, p.dy.data, p.dy.dtype, r * p.dy.stride + c);
  float weight[V];  // in L1 from the second row on
  load_any(weight, p.weight.data, p.weight.dtype, c);
  const float mean = p.mean[r], rstd = p.rstd[r], shift = -p.mean[p.R + r] * rstd;
  // g is rounded once: fused with g - mean(g), its rounding would stay where both are equal
#pragma unroll
  for (int k = 0; k < V; k++) v.xhat[k] = fmaf(v.xhat[k] - mean, rstd, shift), v.g[k] = __fmul_rn(v.dy[k], weight[k]);
}
// dtotal of those columns; then dx and dresidual. All lanes of a warp call: dropout shares calls among them.
template <class T, int V>
DEV_INLINE void write(const Values<V>& v, const LayerNormParams& p, i64 r, int c, float mean_g, float mean_gx) {
  const bool inside = c < p.C;
  const float rstd = p.rstd[r];
  float d[V] = {};
  if (inside && p.dtotal.data) load(d, static_cast<const T*>(p.dtotal.data) + r * p.dtotal.stride + c);
  if (inside && p.dy.data) {
#pragma unroll
    for (int k = 0; k < V; k++) d[k] += rstd * fmaf(-v.xhat[k], mean_gx, v.g[k] - mean_g);
  }
  if (inside && p.dresidual.data) store_any(p.dresidual.data, p.dresidual.dtype, r * p.dresidual.stride + c, d);
  if (!p.dx.data) return;
  if (p.dropout.threshold) {
    bool keep[V];
    dropout_keep<V>(keep, p.dropout, 0, uint32_t(r), c);
    const float scale = dropout_scale(p.dropout);
#pragma unroll
    for (int k = 0; k < V; k++) d[k] = keep[k] ? d[k] * scale : 0.f;
  }
  if (inside) store_any(p.dx.data, p.dx.dtype, r * p.dx.stride + c, d);
}

template <class T, int V, int N>
__global__ void __launch_bounds__(most_threads(N), 1) layer_norm_bwd_kernel(const LayerNormParams p) {
  DYN_SMEM(scratch);
  const int C = int(p.C), first = threadIdx.x * V, step = blockDim.x * V;
  float* partial_w = p.dweight + i64(blockIdx.x) * C;
  float* partial_b = p.dbias ? p.dbias + i64(blockIdx.x) * C : nullptr;
  float dweight[N][V] = {}, dbias[N][V] = {};
  for (int c = first + N * step; c < C; c += step) {
    store(partial_w + c, dweight[0]);  // zeros
    if (partial_b) store(partial_b + c, dweight[0]);
  }

  const auto count = [](const Values<V>& v, float (&dw)[V], float (&db)[V], float2& sums) {
#pragma unroll
    for (int k = 0; k < V; k++) {
      dw[k] = fmaf(v.dy[k], v.xhat[k], dw[k]);
      db[k] += v.dy[k];
      sums.x += v.g[k], sums.y = fmaf(v.g[k], v.xhat[k], sums.y);
    }
  };
  for (i64 r = blockIdx.x; r < p.R; r += gridDim.x) {
    Values<V> near[N];
    float2 sums = make_float2(0.f, 0.f);
#pragma unroll
    for (int i = 0; i < N; i++) {
      const int c = first + i * step;
      if (c < C) read<T>(near[i], p, r, c), count(near[i], dweight[i], dbias[i], sums);
    }
    for (int c = first + N * step; c < C; c += step) {
      Values<V> v;
      float dw[V], db[V] = {};
      read<T>(v, p, r, c);
      load(dw, partial_w + c);
      if (partial_b) load(db, partial_b + c);
      count(v, dw, db, sums);
      store(partial_w + c, dw);
      if (partial_b) store(partial_b + c, db);
    }
    sums = block_reduce(sums, Sum{}, make_float2(0.f, 0.f), scratch);
    const float mean_g = sums.x / float(C), mean_gx = sums.y / float(C);
#pragma unroll
    for (int i = 0; i < N; i++)
      if (i * step < C) write<T>(near[i], p, r, first + i * step, mean_g, mean_gx);
    for (int c0 = N * step; c0 < C; c0 += step) {
      Values<V> v;
      if (c0 + first < C) read<T>(v, p, r, c0 + first);
      write<T>(v, p, r, c0 + first, mean_g, mean_gx);
    }
  }
#pragma unroll
  for (int i = 0; i < N; i++) {
    const int c = first + i * step;
    if (c >= C) continue;
    store(partial_w + c, dweight[i]);
    if (partial_b) store(partial_b + c, dbias[i]);
  }
}

}  // namespace

cudaError_t layer_norm_bwd(const LayerNormParams& p, cudaStream_t stream) {
  return with_dtype(p.x.dtype, [&](auto t) {
    using T = decltype(t);
    return with_width<T>(
        p.C,
        [&](auto width) {
          constexpr int V = decltype(width)::value;
          const bool narrow = p.C <= most_threads(1) * V;
          const int vectors = narrow ? 1 : 2,
                    threads = round_to_warps(ceil_div(p.C, vectors * V), most_threads(vectors));
          auto kernel = narrow ? layer_norm_bwd_kernel<T, V, 1> : layer_norm_bwd_kernel<T, V, 2>;
          LAUNCH(kernel, dim3(unsigned(parts_of(p.R))), dim3(threads), 32 * sizeof(float2), stream, p);
          return cudaGetLastError();
        },
        p.x, p.dy, p.dtotal, p.weight, p.dx, p.dresidual, Vector{p.dweight, DType::f32}, Vector{p.dbias, DType::f32});
  });
}

}  // namespace gptfast::cuda
