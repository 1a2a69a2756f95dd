// LayerNorm (Ba et al., arXiv 1607.06450) and RMSNorm (Zhang and Sennrich, arXiv 1910.07467) over rows, alone or after
// dropout and a residual sum. layer_norm_fwd.cu and rms_norm_fwd.cu are this with CENTERED true and false.
//
//   total = dropout(x) + residual                                      (add_layer_norm, add_rms_norm only)
//   y = (total - mean) rstd weight + bias,   rstd = 1 / sqrt(var + eps), var the biased variance, in two passes,
// the second of which corrects the mean: the first sum's roundings may exceed the spread of a row far from 0
//   y = total rstd weight,   rstd = 1 / sqrt(mean of total^2 + eps)                       (RMSNorm)
//
// A warp has a row of up to 32 * V * 8 columns, a block a longer one; RMSNorm of heads has several rows a warp. Their first N
// vectors stay in registers over the passes; what does not fit is read again, from cache. All of them are asked for before
// the first is used: one load at a time leaves memory idle for most of its latency. Floor: one read and one write (with a
// residual two and two).
// Few rows, as in decoding, leave nothing to hide a latency behind: there a row has a warp for each of its vectors, weight and
// bias are on their way with it, and a sum costs one barrier. Its bits are those of the warp that has a row to itself.
#pragma once
#include "norm_row.cuh"

namespace gptfast::cuda {
namespace {

struct None {};                    // no residual
constexpr int kWarpThreads = 128;  // of a block whose warps have rows of their own
constexpr int kWarpVectors = 8, kBlockVectors = 4, kBlockThreads = 256;
constexpr i64 kFewRows = 528;  // four blocks on each of 132 processors

// Values c .. c + V - 1 of a row as memory has them: of x, of type X, and of the residual, of type R.
template <class X, class R, int V> struct Input {
  Raw<X, V> x;
  Raw<R, V> residual;
  DEV_INLINE void load(const LayerNormParams& p, i64 r, int c, int C) {
    if (c < C) x.load(p.x.data, p.x.dtype, r * p.x.stride + c);
    else x.zero();
    if (c < C) residual.load(p.residual.data, p.residual.dtype, r * p.residual.stride + c);
    else residual.zero();
  }
};
template <class X, int V> struct Input<X, None, V> {
  Raw<X, V> x;
  DEV_INLINE void load(const LayerNormParams& p, i64 r, int c, int C) {
    if (c < C) x.load(p.x.data, p.x.dtype, r * p.x.stride + c);
    else x.zero();
  }
};
// What is normalised, rounded as it is stored, which is what the next layer sees too; 0 past the end. All lanes of a warp
// call.
template <class T, class X, class R, int V>
DEV_INLINE void total_of(float (&v)[V], const Input<X, R, V>& input, const LayerNormParams& p, i64 r, int c, int C) {
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
    if (c < C) store(static_cast<T*>(p.total.data) + r * p.total.stride + c, v);
  }
}

// T: of what is normalised. N: vectors of a row that a thread keeps. LANES: of a warp that have a row; 0: a block has one.
template <bool CENTERED, class T, class X, class R, int V, int N, int LANES>
__global__ void __launch_bounds__(LANES ? kWarpThreads : kBlockThreads, N == 1 ? 12 : 2)
    norm_fwd_kernel(const LayerNormParams p) {
  DYN_SMEM(scratch);
  constexpr bool kSum = !std::is_same_v<R, None>, kWhole = LANES != 0;  // kWhole: registers hold the row
  constexpr int kLanes = kWhole ? LANES : 32;
  const int t = kWhole ? threadIdx.x % kLanes : threadIdx.x, step = (kWhole ? kLanes : blockDim.x) * V;
  const i64 r = kWhole ? i64(blockIdx.x) * (kWarpThreads / kLanes) + threadIdx.x / kLanes : blockIdx.x;
  const int C = r < p.R ? int(p.C) : 0;  // lanes past the last row go along, as collectives want it
  const auto reduce = [&](auto x) {
    if constexpr (kWhole) return warp_reduce<kLanes>(x, Sum{});
    else return block_reduce(x, Sum{}, decltype(x){}, scratch);
  };

  Input<X, R, V> input[N];
  float x[N][V], sum = 0.f;
#pragma unroll
  for (int i = 0; i < N; i++) input[i].load(p, r, i * step + t * V, C);
#pragma unroll
  for (int i = 0; i < N; i++) total_of<T>(x[i], input[i], p, r, i * step + t * V, C), sum += sum_of<CENTERED>(x[i]);
  for (int c0 = N * step; !kWhole && c0 < C; c0 += step) {
    float v[V];
    Input<X, R, V> more;
    more.load(p, r, c0 + t * V, C);
    total_of<T>(v, more, p, r, c0 + t * V, C), sum += sum_of<CENTERED>(v);
  }
  const float near = reduce(sum) / float(p.C);  // the mean, or that of the squares

  const T* again = static_cast<const T*>(kSum ? p.total.data : p.x.data) + r * (kSum ? p.total.stride : p.x.stride);
  float2 rest = make_float2(0.f, 0.f);
  if constexpr (CENTERED) {
#pragma unroll
    for (int i = 0; i < N; i++)
      if (i * step + t * V < C) rest = Sum{}(rest, differences_of(x[i], near));
    for (int c = N * step + t * V; !kWhole && c < C; c += step) {
      float v[V];
      load(v, again + c), rest = Sum{}(rest, differences_of(v, near));
    }
    rest = reduce(rest);
  }
  const Affine<CENTERED> affine(p, r, near, rest, t == 0 && C);

  const auto finish = [&](float (&v)[V], int c) {
    float weight[V], bias[V] = {};
    load_weight<CENTERED>(weight, p, c);
    if (CENTERED && p.bias.data) load_any(bias, p.bias.data, p.bias.dtype, c);
    affine.apply(v, weight, bias);
    store_any(p.y.data, p.y.dtype, r * p.y.stride + c, v);
  };
#pragma unroll
  for (int i = 0; i < N; i++)
    if (i * step + t * V < C) finish(x[i], i * step + t * V);
  for (int c = N * step + t * V; !kWhole && c < C; c += step) {
    float v[V];
    load(v, again + c), finish(v, c);
  }
}

// V values of a vector whose dtype is known at run time only, on their way before they are asked for. As words: the compiler
// takes values of 16 bits apart where they are loaded, which is to wait for them there.
template <int V> struct Late {
  uint32_t words[V];
  DEV_INLINE void load(const Vector& x, int c) {
    Raw<float, V> wide;
    Raw<bf16, V> narrow;  // or the bits of fp16
    if (!x.data) {
      memset(words, 0, sizeof words);
    } else if (x.dtype == DType::f32) {
      wide.load(static_cast<const float*>(x.data) + c);
      memcpy(words, wide.words, sizeof words);
    } else {
      narrow.load(static_cast<const bf16*>(x.data) + c);
      memcpy(words, narrow.words, sizeof words / 2);
    }
  }
  DEV_INLINE void values(float (&to)[V], const Vector& x, float absent) const {
#pragma unroll
    for (int k = 0; k < V; k++) {
      const uint32_t pair = words[k / 2], upper = k % 2 ? pair & 0xffff0000u : pair << 16;
      const __half half = __ushort_as_half(uint16_t(upper >> 16));
      to[k] = x.dtype == DType::f16 ? to_float(half) : __uint_as_float(x.dtype == DType::f32 ? words[k] : upper);
      if (!x.data) to[k] = absent;
    }
  }
};

// The sum over a row of what its warps have, which is one vector each: `parts` has a T for each of the block's threads. Every
// warp adds the vectors' parts in order, as the warp that has a row to itself does, and then its lanes'.
template <class T> DEV_INLINE T row_sum(T x, T* parts) {
  parts[threadIdx.x] = x;
  __syncthreads();
  T sum{};
#pragma unroll
  for (int w = 0; w < 32 * kWarpVectors; w += 32)
    if (w < int(blockDim.x)) sum = Sum{}(sum, parts[w + (threadIdx.x & 31)]);
  return warp_reduce(sum, Sum{});
}

// A row a block, a vector a thread.
template <bool CENTERED, class T, class X, class R, int V>
__global__ void __launch_bounds__(32 * kWarpVectors) norm_few_kernel(const LayerNormParams p) {
  DYN_SMEM(smem);
  float* parts = reinterpret_cast<float*>(smem);
  const i64 r = blockIdx.x;
  const int c = int(threadIdx.x) * V, C = int(p.C);
  const bool inside = c < C;
  Input<X, R, V> input;
  Late<V> weight, bias;
  input.load(p, r, c, C);
  if (inside) weight.load(p.weight, c);
  if (CENTERED && inside) bias.load(p.bias, c);
  float x[V], w[V], b[V] = {};
  total_of<T>(x, input, p, r, c, C);
  const float near = row_sum(sum_of<CENTERED>(x), parts) / float(C);
  float2 rest = make_float2(0.f, 0.f);
  if constexpr (CENTERED) {
    if (inside) rest = differences_of(x, near);
    rest = row_sum(rest, reinterpret_cast<float2*>(parts + blockDim.x));
  }
  const Affine<CENTERED> affine(p, r, near, rest, threadIdx.x == 0);
  if (!inside) return;
  weight.values(w, p.weight, 1.f);
  if constexpr (CENTERED) bias.values(b, p.bias, 0.f);
  affine.apply(x, w, b);
  store_any(p.y.data, p.y.dtype, r * p.y.stride + c, x);
}

template <bool CENTERED, class T, class X, class R, int V>
cudaError_t launch_few(const LayerNormParams& p, cudaStream_t stream) {
  const int threads = 32 * int(ceil_div(p.C, 32 * V));
  auto kernel = norm_few_kernel<CENTERED, T, X, R, V>;
  LAUNCH(kernel, dim3(unsigned(p.R)), dim3(threads), threads * (sizeof(float) + sizeof(float2)), stream, p);
  return cudaGetLastError();
}

template <bool CENTERED, class T, class X, class R, int V, int N, int LANES>
cudaError_t launch_rows(const LayerNormParams& p, cudaStream_t stream) {
  auto kernel = norm_fwd_kernel<CENTERED, T, X, R, V, N, LANES>;
  constexpr int kRows = LANES ? kWarpThreads / (LANES ? LANES : 1) : 1;  // of a block
  const i64 blocks = ceil_div(p.R, kRows);
  const size_t scratch = LANES ? 0 : 32 * sizeof(float2);
  LAUNCH(kernel, dim3(unsigned(blocks)), dim3(LANES ? kWarpThreads : kBlockThreads), scratch, stream, p);
  return cudaGetLastError();
}

// The fewest registers that hold the row: at C = 768 three vectors of 16 bits or six of fp32. The rows of heads (64 or 128
// columns, queries and keys of RMSNorm) would leave most lanes of a warp idle.
template <bool CENTERED, class T, class X, class R> cudaError_t launch(const LayerNormParams& p, cudaStream_t stream) {
  return with_width<T>(
      p.C,
      [&](auto width) {
        constexpr int V = decltype(width)::value;
        const i64 vectors = ceil_div(p.C, 32 * V);
        if (vectors > kWarpVectors) return launch_rows<CENTERED, T, X, R, V, kBlockVectors, 0>(p, stream);
        if constexpr (V > 1 && !CENTERED && std::is_same_v<R, None>) {
          if (p.C <= 8 * V) return launch_rows<CENTERED, T, X, R, V, 1, 8>(p, stream);
          if (p.C <= 16 * V) return launch_rows<CENTERED, T, X, R, V, 1, 16>(p, stream);
          if (p.C <= 32 * V) return launch_rows<CENTERED, T, X, R, V, 1, 32>(p, stream);
        }
        if constexpr (V > 1) {
          if (p.R <= kFewRows) return launch_few<CENTERED, T, X, R, V>(p, stream);
          if (vectors <= 3) return launch_rows<CENTERED, T, X, R, V, 3, 32>(p, stream);
          if (vectors == 4) return launch_rows<CENTERED, T, X, R, V, 4, 32>(p, stream);
          if (vectors <= 6) return launch_rows<CENTERED, T, X, R, V, 6, 32>(p, stream);
        }
        return launch_rows<CENTERED, T, X, R, V, kWarpVectors, 32>(p, stream);
      },
      p.x, p.residual, p.weight, p.bias, p.total, p.y);
}

template <bool CENTERED> cudaError_t norm_fwd(const LayerNormParams& p, cudaStream_t stream) {
  if (!p.R) return cudaSuccess;
  if (!p.residual.data)
    return with_dtype(p.x.dtype, [&](auto t) { return launch<CENTERED, decltype(t), decltype(t), None>(p, stream); });
  if (p.x.dtype == p.total.dtype && p.residual.dtype == p.total.dtype)
    return with_dtype(p.total.dtype,
                      [&](auto t) { return launch<CENTERED, decltype(t), decltype(t), decltype(t)>(p, stream); });
  // of two dtypes, with the sum in fp32; under autocast a branch of 16 bits and a stream of 32
  if (p.residual.dtype != DType::f32) return launch<CENTERED, float, Any, Any>(p, stream);
  if (p.x.dtype == DType::bf16) return launch<CENTERED, float, bf16, float>(p, stream);
  return launch<CENTERED, float, __half, float>(p, stream);
}

}  // namespace
}  // namespace gptfast::cuda
