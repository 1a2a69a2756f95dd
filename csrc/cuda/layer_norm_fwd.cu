// LayerNorm (Ba et al., arXiv 1607.06450) over rows, alone or after dropout and a residual sum.
//
//   total = dropout(x) + residual                                      (add_layer_norm only)
//   y = (total - mean) rstd weight + bias,   rstd = 1 / sqrt(var + eps), var the biased variance, in two passes,
// the second of which corrects the mean: the first sum's roundings may exceed the spread of a row far from 0
//
// A warp has a row of up to 32 * V * 8 columns, a block a longer one. Their first N vectors stay in registers over the
// passes; what does not fit is read again, from cache. All of them are asked for before the first is used: one load at a
// time leaves memory idle for most of its latency. Floor: one read and one write (with a residual two and two).
// Few rows, as in decoding, leave nothing to hide a latency behind: there a row has a warp for each of its vectors, weight and
// bias are on their way with it, and a sum costs one barrier. Its bits are those of the warp that has a row to itself.
#include <type_traits>

#include "common.cuh"
#include "philox.cuh"

namespace gptfast::cuda {
namespace {

struct None {};                   // no residual
constexpr int kRowsPerBlock = 4;  // where a warp has a row
constexpr int kWarpVectors = 8, kBlockVectors = 4, kBlockThreads = 256;
constexpr i64 kFewRows = 528;  // four blocks on each of 132 processors

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

// Sums of one vector, in one order wherever it is formed.
template <int V> DEV_INLINE float sum_of(const float (&v)[V]) {
  float sum = 0.f;
#pragma unroll
  for (int k = 0; k < V; k++) sum += v[k];
  return sum;
}
// Of the differences from a number, and of their squares.
template <int V> DEV_INLINE float2 differences_of(const float (&v)[V], float near) {
  float2 rest = make_float2(0.f, 0.f);
#pragma unroll
  for (int k = 0; k < V; k++) rest.x += v[k] - near, rest.y += (v[k] - near) * (v[k] - near);
  return rest;
}
// What a row becomes, from its mean as first summed and the sums of the differences from that.
struct Affine {
  float mean, rstd, shift;
  DEV_INLINE Affine(const LayerNormParams& p, i64 r, float near, float2 rest, bool first) {
    const float C = float(int(p.C)), left = rest.x / C, variance = rest.y / C - left * left;
    mean = near + left;
    const float remainder = left - (mean - near);
    rstd = 1.f / sqrtf((variance < 0.f ? 0.f : variance) + p.eps), shift = -remainder * rstd;
    if (first) p.mean[r] = mean, p.mean[p.R + r] = remainder, p.rstd[r] = rstd;
  }
  template <int V>
  DEV_INLINE void store(float (&v)[V], const float (&weight)[V], const float (&bias)[V], const LayerNormParams& p,
                        i64 r, int c) const {
#pragma unroll
    for (int k = 0; k < V; k++) v[k] = fmaf(fmaf(v[k] - mean, rstd, shift), weight[k], bias[k]);
    store_any(p.y.data, p.y.dtype, r * p.y.stride + c, v);
  }
};

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
#pragma unroll
  for (int i = 0; i < N; i++) total_of<T>(x[i], input[i], p, r, i * step + t * V), sum += sum_of(x[i]);
  for (int c0 = N * step; !WARP && c0 < C; c0 += step) {
    float v[V];
    Input<X, R, V> more;
    more.load(p, r, c0 + t * V);
    total_of<T>(v, more, p, r, c0 + t * V), sum += sum_of(v);
  }
  const float near = reduce(sum) / float(C);

  const T* again = static_cast<const T*>(kSum ? p.total.data : p.x.data) + r * (kSum ? p.total.stride : p.x.stride);
  float2 rest = make_float2(0.f, 0.f);
#pragma unroll
  for (int i = 0; i < N; i++)
    if (i * step + t * V < C) rest = Sum{}(rest, differences_of(x[i], near));
  for (int c = N * step + t * V; !WARP && c < C; c += step) {
    float v[V];
    load(v, again + c), rest = Sum{}(rest, differences_of(v, near));
  }
  const Affine affine(p, r, near, reduce(rest), t == 0);

  const auto finish = [&](float (&v)[V], int c) {
    float weight[V], bias[V] = {};
    load_any(weight, p.weight.data, p.weight.dtype, c);
    if (p.bias.data) load_any(bias, p.bias.data, p.bias.dtype, c);
    affine.store(v, weight, bias, p, r, c);
  };
#pragma unroll
  for (int i = 0; i < N; i++)
    if (i * step + t * V < C) finish(x[i], i * step + t * V);
  for (int c = N * step + t * V; !WARP && c < C; c += step) {
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
  DEV_INLINE void values(float (&to)[V], const Vector& x) const {
#pragma unroll
    for (int k = 0; k < V; k++) {
      const uint32_t pair = words[k / 2], upper = k % 2 ? pair & 0xffff0000u : pair << 16;
      const __half half = __ushort_as_half(uint16_t(upper >> 16));
      to[k] = x.dtype == DType::f16 ? to_float(half) : __uint_as_float(x.dtype == DType::f32 ? words[k] : upper);
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
template <class T, class X, class R, int V>
__global__ void __launch_bounds__(32 * kWarpVectors) layer_norm_few_kernel(const LayerNormParams p) {
  DYN_SMEM(smem);
  float* parts = reinterpret_cast<float*>(smem);
  const i64 r = blockIdx.x;
  const int c = int(threadIdx.x) * V;
  const bool inside = c < int(p.C);
  Input<X, R, V> input;
  Late<V> weight, bias;
  input.load(p, r, c);
  if (inside) weight.load(p.weight, c), bias.load(p.bias, c);
  float x[V];
  total_of<T>(x, input, p, r, c);
  const float near = row_sum(sum_of(x), parts) / float(int(p.C));
  float2 rest = make_float2(0.f, 0.f);
  if (inside) rest = differences_of(x, near);
  const Affine affine(p, r, near, row_sum(rest, reinterpret_cast<float2*>(parts + blockDim.x)), threadIdx.x == 0);
  if (!inside) return;
  float w[V], b[V];
  weight.values(w, p.weight), bias.values(b, p.bias);
  affine.store(x, w, b, p, r, c);
}

template <class T, class X, class R, int V> cudaError_t launch_few(const LayerNormParams& p, cudaStream_t stream) {
  const int threads = 32 * int(ceil_div(p.C, 32 * V));
  auto kernel = layer_norm_few_kernel<T, X, R, V>;
  LAUNCH(kernel, dim3(unsigned(p.R)), dim3(threads), threads * (sizeof(float) + sizeof(float2)), stream, p);
  return cudaGetLastError();
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
          if (p.R <= kFewRows) return launch_few<T, X, R, V>(p, stream);
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
