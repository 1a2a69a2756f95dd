// LayerNorm (Ba et al., arXiv 1607.06450) over rows, alone or after dropout and a residual sum.
//
//   total = dropout(x) + residual                                      (add_layer_norm only)
//   y = (total - mean) rstd weight + bias,   rstd = 1 / sqrt(var + eps), var the biased variance, in two passes,
// the second of which corrects the mean: the first sum's roundings may exceed the spread of a row far from 0
//
// A warp has a row of up to 32 * V * kWarpVectors columns, a block a longer one. Their first values stay in registers over
// the passes; what does not fit is read again, from cache. Floor: one read and one write (with a residual two and two).
#include "common.cuh"
#include "philox.cuh"

namespace gptfast::cuda {
namespace {

enum class Input { x, sum, mixed_sum };  // x; x + residual of one dtype; of two, with the sum in fp32
constexpr int kRowsPerBlock = 4;         // where a warp has a row
constexpr int kWarpVectors = 8, kBlockVectors = 4, kBlockThreads = 256;

// Values c .. c + V - 1 of what is normalised, rounded as they are stored, which is what the next layer sees too; 0 past
// the end. All lanes of a warp call.
template <class T, Input IN, int V> DEV_INLINE void read_input(float (&v)[V], const LayerNormParams& p, i64 r, int c) {
  const bool inside = c < p.C;
#pragma unroll
  for (int k = 0; k < V; k++) v[k] = 0.f;
  const i64 at = r * p.x.stride + c;
  if (inside && IN != Input::mixed_sum) load(v, static_cast<const T*>(p.x.data) + at);
  if (inside && IN == Input::mixed_sum) load_any(v, p.x.data, p.x.dtype, at);
  if constexpr (IN != Input::x) {
    float residual[V] = {};
    const i64 residual_at = r * p.residual.stride + c;
    if (inside && IN == Input::sum) load(residual, static_cast<const T*>(p.residual.data) + residual_at);
    if (inside && IN == Input::mixed_sum) load_any(residual, p.residual.data, p.residual.dtype, residual_at);
    if (p.dropout.threshold) {
      bool keep[V];
      dropout_keep<V>(keep, p.dropout, 0, uint32_t(r), c);
      const float scale = dropout_scale(p.dropout);
#pragma unroll
      for (int k = 0; k < V; k++) v[k] = keep[k] ? v[k] * scale : 0.f;
    }
#pragma unroll
    for (int k = 0; k < V; k++) v[k] = rounded<T>(v[k] + residual[k]);
    if (inside) store(static_cast<T*>(p.total.data) + r * p.total.stride + c, v);
  }
}

template <class T, Input IN, int V, bool WARP>
__global__ void __launch_bounds__(WARP ? 32 * kRowsPerBlock : kBlockThreads, 2)
    layer_norm_fwd_kernel(const LayerNormParams p) {
  DYN_SMEM(scratch);
  constexpr int N = WARP ? kWarpVectors : kBlockVectors;
  const int t = WARP ? threadIdx.x & 31 : threadIdx.x, step = (WARP ? 32 : blockDim.x) * V;
  const i64 r = WARP ? i64(blockIdx.x) * kRowsPerBlock + (threadIdx.x >> 5) : blockIdx.x;
  if (r >= p.R) return;
  const int C = int(p.C);
  const auto reduce = [&](auto x) {
    if constexpr (WARP) return warp_reduce(x, Sum{});
    else return block_reduce(x, Sum{}, decltype(x){}, scratch);
  };

  float x[N][V], sum = 0.f;
  const auto add = [&](const float (&v)[V]) {
#pragma unroll
    for (int k = 0; k < V; k++) sum += v[k];
  };
#pragma unroll
  for (int i = 0; i < N; i++)
    if (i * step < C) read_input<T, IN, V>(x[i], p, r, i * step + t * V), add(x[i]);
  for (int c0 = N * step; c0 < C; c0 += step) {
    float v[V];
    read_input<T, IN, V>(v, p, r, c0 + t * V), add(v);
  }
  const float near = reduce(sum) / float(C);

  const T* again = static_cast<const T*>(IN == Input::x ? p.x.data : p.total.data) +
                   r * (IN == Input::x ? p.x.stride : p.total.stride);
  float2 rest = make_float2(0.f, 0.f);  // of the differences from it, and of their squares
  const auto add_difference = [&](const float (&v)[V]) {
#pragma unroll
    for (int k = 0; k < V; k++) rest.x += v[k] - near, rest.y += (v[k] - near) * (v[k] - near);
  };
#pragma unroll
  for (int i = 0; i < N; i++)
    if (i * step + t * V < C) add_difference(x[i]);
  for (int c = N * step + t * V; c < C; c += step) {
    float v[V];
    load(v, again + c), add_difference(v);
  }
  rest = reduce(rest);
  const float left = rest.x / float(C), variance = rest.y / float(C) - left * left;
  const float mean = near + left, remainder = left - (mean - near);
  const float rstd = 1.f / sqrtf((variance < 0.f ? 0.f : variance) + p.eps), shift = -remainder * rstd;
  if (t == 0) p.mean[r] = mean, p.mean[p.R + r] = remainder, p.rstd[r] = rstd;

  const auto finish = [&](float (&v)[V], int c) {
    float weight[V], bias[V] = {};
    load_any(weight, p.weight.data, p.weight.dtype, c);
    if (p.bias.data) load_any(bias, p.bias.data, p.bias.dtype, c);
#pragma unroll
    for (int k = 0; k < V; k++) v[k] = fmaf(fmaf(v[k] - mean, rstd, shift), weight[k], bias[k]);
    store_any(p.y.data, p.y.dtype, r * p.y.stride + c, v);
  };
#pragma unroll
  for (int i = 0; i < N; i++)
    if (i * step + t * V < C) finish(x[i], i * step + t * V);
  for (int c = N * step + t * V; c < C; c += step) {
    float v[V];
    load(v, again + c), finish(v, c);
  }
}

template <class T, Input IN> cudaError_t launch(const LayerNormParams& p, cudaStream_t stream) {
  return with_width<T>(
      p.C,
      [&](auto width) {
        constexpr int V = decltype(width)::value;
        if (p.C <= 32 * V * kWarpVectors) {
          auto kernel = layer_norm_fwd_kernel<T, IN, V, true>;
          LAUNCH(kernel, dim3(unsigned(ceil_div(p.R, kRowsPerBlock))), dim3(32 * kRowsPerBlock), 0, stream, p);
        } else {
          auto kernel = layer_norm_fwd_kernel<T, IN, V, false>;
          LAUNCH(kernel, dim3(unsigned(p.R)), dim3(kBlockThreads), 32 * sizeof(float2), stream, p);
        }
        return cudaGetLastError();
      },
      p.x, p.residual, p.weight, p.bias, p.total, p.y);
}

}  // namespace

cudaError_t layer_norm_fwd(const LayerNormParams& p, cudaStream_t stream) {
  if (!p.R) return cudaSuccess;
  const bool mixed = p.residual.data && (p.x.dtype != p.total.dtype || p.residual.dtype != p.total.dtype);
  if (mixed) return launch<float, Input::mixed_sum>(p, stream);
  return with_dtype(p.x.dtype, [&](auto t) {
    using T = decltype(t);
    return p.residual.data ? launch<T, Input::sum>(p, stream) : launch<T, Input::x>(p, stream);
  });
}

}  // namespace gptfast::cuda
