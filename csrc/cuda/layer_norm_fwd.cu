// LayerNorm (Ba et al., arXiv 1607.06450) over rows, alone or after dropout and a residual sum.
//
//   total = dropout(x) + residual                                      (add_layer_norm only)
//   y = (total - mean) rstd weight + bias,   rstd = 1 / sqrt(var + eps), var the biased variance, in two passes,
// the second of which corrects the mean: the first sum's roundings may exceed the spread of a row far from 0
//
// A warp has a row of up to 32 * V * 8 columns, a block a longer one. Their first N vectors stay in registers over the
// passes; what does not fit is read again, from cache. All of them are asked for before the first is used: one load at a
// time leaves memory idle for most of its latency. Floor: one read and one write (with a residual two and two).
#include <type_traits>

#include "common.cuh"
#include "philox.cuh"

namespace gptfast::cuda {
namespace {

struct None {};                   // no residual
constexpr int kRowsPerBlock = 4;  // where a warp has a row
constexpr int kWarpVectors = 8, kBlockVectors = 4, kBlockThreads = 256;

// Values c .. c + V - 1 of a row as memory has them: of x, of type X, and of the residual, of type R.
template <class X, class R, int V> struct Input {
  Raw<X, V> x;
  Raw<R, V> residual;
  DEV_INLINE void load(const LayerNormParams& p, i64 r, int c) {
    if (c < p.C) x.load(p.x.data, p.x.dtype, r * p.x.stride + c);
    else x.zero();
    if (c < p.C) residual.load(p.residual.data, p.residual.dtype, r * p.residual.stride + c);
    else residual.zero();
  }
};
template <class X, int V> struct Input<X, None, V> {
  Raw<X, V> x;
  DEV_INLINE void load(const LayerNormParams& p, i64 r, int c) {
    if (c < p.C) x.load(p.x.data, p.x.dtype, r * p.x.stride + c);
    else x.zero();
  }
};
// What is normalised, rounded as it is stored, which is what the next layer sees too; 0 past the end. All lanes of a warp
// call.
template <class T, class X, class R, int V>
DEV_INLINE void total_of(float (&v)[V], const Input<X, R, V>& input, const LayerNormParams& p, i64 r, int c) {
  input.x.values(v);
  if constexpr (!std::is_same_v<R, None>) {
    float residual[V];
    input.residual.values(residual);
    if (p.dropout.threshold) {
      bool keep[V];
      dropout_keep<V>(keep, p.dropout, 0, uint32_t(r), c);
      const float scale = dropout_scale(p.dropout);
#pragma unroll
      for (int k = 0; k < V; k++) v[k] = keep[k] ? v[k] * scale : 0.f;
    }
#pragma unroll
    for (int k = 0; k < V; k++) v[k] = rounded<T>(v[k] + residual[k]);
    if (c < p.C) store(static_cast<T*>(p.total.data) + r * p.total.stride + c, v);
  }
}

// T: of what is normalised. N: vectors of a row that a thread keeps.
template <class T, class X, class R, int V, int N, bool WARP>
__global__ void __launch_bounds__(WARP ? 32 * kRowsPerBlock : kBlockThreads, 2)
    layer_norm_fwd_kernel(const LayerNormParams p) {
  DYN_SMEM(scratch);
  constexpr bool kSum = !std::is_same_v<R, None>;
  const int t = WARP ? threadIdx.x & 31 : threadIdx.x, step = (WARP ? 32 : blockDim.x) * V;
  const i64 r = WARP ? i64(blockIdx.x) * kRowsPerBlock + (threadIdx.x >> 5) : blockIdx.x;
  if (r >= p.R) return;
  const int C = int(p.C);
  const auto reduce = [&](auto x) {
    if constexpr (WARP) return warp_reduce(x, Sum{});
    else return block_reduce(x, Sum{}, decltype(x){}, scratch);
  };

  Input<X, R, V> input[N];
  float x[N][V], sum = 0.f;
#pragma unroll
  for (int i = 0; i < N; i++) input[i].load(p, r, i * step + t * V);
  const auto add = [&](const float (&v)[V]) {
#pragma unroll
    for (int k = 0; k < V; k++) sum += v[k];
  };
#pragma unroll
  for (int i = 0; i < N; i++) total_of<T>(x[i], input[i], p, r, i * step + t * V), add(x[i]);
  for (int c0 = N * step; !WARP && c0 < C; c0 += step) {
    float v[V];
    Input<X, R, V> more;
    more.load(p, r, c0 + t * V);
    total_of<T>(v, more, p, r, c0 + t * V), add(v);
  }
  const float near = reduce(sum) / float(C);

  const T* again = static_cast<const T*>(kSum ? p.total.data : p.x.data) + r * (kSum ? p.total.stride : p.x.stride);
  float2 rest = make_float2(0.f, 0.f);  // of the differences from it, and of their squares
  const auto add_difference = [&](const float (&v)[V]) {
#pragma unroll
    for (int k = 0; k < V; k++) rest.x += v[k] - near, rest.y += (v[k] - near) * (v[k] - near);
  };
#pragma unroll
  for (int i = 0; i < N; i++)
    if (i * step + t * V < C) add_difference(x[i]);
  for (int c = N * step + t * V; !WARP && c < C; c += step) {
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
  for (int c = N * step + t * V; !WARP && c < C; c += step) {
    float v[V];
    load(v, again + c), finish(v, c);
  }
}

template <class T, class X, class R, int V, int N, bool WARP>
cudaError_t launch_rows(const LayerNormParams& p, cudaStream_t stream) {
  auto kernel = layer_norm_fwd_kernel<T, X, R, V, N, WARP>;
  const i64 blocks = WARP ? ceil_div(p.R, kRowsPerBlock) : p.R;
  const size_t scratch = WARP ? 0 : 32 * sizeof(float2);
  LAUNCH(kernel, dim3(unsigned(blocks)), dim3(WARP ? 32 * kRowsPerBlock : kBlockThreads), scratch, stream, p);
  return cudaGetLastError();
}

// The fewest registers that hold the row: at C = 768 three vectors of 16 bits or six of fp32.
template <class T, class X, class R> cudaError_t launch(const LayerNormParams& p, cudaStream_t stream) {
  return with_width<T>(
      p.C,
      [&](auto width) {
        constexpr int V = decltype(width)::value;
        const i64 vectors = ceil_div(p.C, 32 * V);
        if (vectors > kWarpVectors) return launch_rows<T, X, R, V, kBlockVectors, false>(p, stream);
        if constexpr (V > 1) {
          if (vectors <= 3) return launch_rows<T, X, R, V, 3, true>(p, stream);
          if (vectors == 4) return launch_rows<T, X, R, V, 4, true>(p, stream);
          if (vectors <= 6) return launch_rows<T, X, R, V, 6, true>(p, stream);
        }
        return launch_rows<T, X, R, V, kWarpVectors, true>(p, stream);
      },
      p.x, p.residual, p.weight, p.bias, p.total, p.y);
}

}  // namespace

cudaError_t layer_norm_fwd(const LayerNormParams& p, cudaStream_t stream) {
  if (!p.R) return cudaSuccess;
  if (!p.residual.data)
    return with_dtype(p.x.dtype, [&](auto t) { return launch<decltype(t), decltype(t), None>(p, stream); });
  if (p.x.dtype == p.total.dtype && p.residual.dtype == p.total.dtype)
    return with_dtype(p.total.dtype, [&](auto t) { return launch<decltype(t), decltype(t), decltype(t)>(p, stream); });
  // of two dtypes, with the sum in fp32; under autocast a branch of 16 bits and a stream of 32
  if (p.residual.dtype != DType::f32) return launch<float, Any, Any>(p, stream);
  if (p.x.dtype == DType::bf16) return launch<float, bf16, float>(p, stream);
  return launch<float, __half, float>(p, stream);
}

}  // namespace gptfast::cuda
