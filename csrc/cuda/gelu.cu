// GELU of x + bias (Hendrycks and Gimpel, arXiv 1606.08415), forward and backward.
//
//   exact   y = z Phi(z),            dy/dz = Phi(z) + z phi(z)
//   tanh    y = z s,  s = sigmoid(2u), u = sqrt(2/pi) (z + 0.044715 z^3)   [0.5 (1 + tanh u) = sigmoid(2u)]
//           dy/dz = s + z s (1 - s) 2u',  with 1 - s = e^-2u s, which does not cancel where s is near 1
//
// A thread has V neighbouring columns and walks down the rows, two at a time, so its bias and its share of dbias stay in
// registers and two rows are on their way from memory at once.
// Floor: one read and one write of x (backward: two reads and one write).
#include "common.cuh"

namespace gptfast::cuda {
namespace {

constexpr int kThreads = 256;
constexpr float kRoot = 0.7978845608f;  // sqrt(2 / pi)

// e^-2u
DEV_INLINE float gelu_decay(float z, float z2) { return exp2f(z * (-2.f * kRoot * kLog2e) * fmaf(z2, 0.044715f, 1.f)); }
template <bool TANH> DEV_INLINE float gelu_value(float z) {
  if constexpr (TANH) return __fdividef(z, 1.f + gelu_decay(z, z * z));
  const float half = 0.5f * z;
  return fmaf(half, erff(z * 0.70710678f), half);
}
template <bool TANH> DEV_INLINE float gelu_slope(float z) {
  if constexpr (TANH) {
    z = z > 10.f ? 10.f : z < -10.f ? -10.f : z;  // beyond, the slope is 1 or below 1e-34; keeps inf * 0 away
    const float z2 = z * z, decay = gelu_decay(z, z2), s = __fdividef(1.f, 1.f + decay);
    const float two_du = fmaf(z2, 6.f * kRoot * 0.044715f, 2.f * kRoot);
    return fmaf(z * two_du, decay * s * s, s);
  }
  const float cdf = fmaf(0.5f, erff(z * 0.70710678f), 0.5f);
  const float pdf = 0.3989422804f * exp2f(z * z * (-0.5f * kLog2e));
  return fmaf(z, pdf, cdf);
}

// One row at columns c .. c + V - 1 that exist: f(width, column) with the full width, or value by value at a ragged end.
template <int V, class F> DEV_INLINE void for_columns(i64 c, i64 columns, F f) {
  if (c + V <= columns) f(Width<V>{}, c);
  else
    for (i64 k = c; k < columns; k++) f(Width<1>{}, k);
}

template <class T, int V, bool TANH>
__global__ void __launch_bounds__(kThreads, 5) gelu_fwd_kernel(const GeluParams p) {
  const i64 c0 = (i64(blockIdx.x) * blockDim.x + threadIdx.x) * V, step = i64(gridDim.y) * blockDim.y;
  const T* x = static_cast<const T*>(p.x.data);
  T* y = static_cast<T*>(p.out.data);
  float bias[V] = {};
  if (p.bias.data && c0 < p.C) load_any<V>(bias, p.bias.data, p.bias.dtype, c0);
  i64 r = i64(blockIdx.y) * blockDim.y + threadIdx.y;
  for (; r + step < p.R - 1 && c0 < p.C; r += 2 * step) {  // the last row may end before column C
    Raw<T, V> rows[2];
#pragma unroll
    for (int u = 0; u < 2; u++) rows[u].load(x + (r + u * step) * p.x.stride + c0);
#pragma unroll
    for (int u = 0; u < 2; u++) {
      float v[V];
      rows[u].values(v);
#pragma unroll
      for (int k = 0; k < V; k++) v[k] = gelu_value<TANH>(v[k] + bias[k]);
      store(y + (r + u * step) * p.out.stride + c0, v);
    }
  }
  for (; r < p.R; r += step) {
    for_columns<V>(c0, r == p.R - 1 ? p.tail : p.C, [&](auto width, i64 c) {
      float v[width.value];
      load(v, x + r * p.x.stride + c);
#pragma unroll
      for (int k = 0; k < width.value; k++) v[k] = gelu_value<TANH>(v[k] + bias[k]);  // a ragged end has no bias
      store(y + r * p.out.stride + c, v);
    });
  }
}

// Part number n takes rows n, n + parts, … and leaves their sum of dx in row n of dbias.
template <class T, int V, bool TANH>
__global__ void __launch_bounds__(kThreads) gelu_bwd_kernel(const GeluParams p, i64 parts) {
  const i64 c0 = (i64(blockIdx.x) * blockDim.x + threadIdx.x) * V;
  const i64 part = i64(blockIdx.y) * blockDim.y + threadIdx.y;
  if (c0 >= p.C || part >= parts) return;
  const T *x = static_cast<const T*>(p.x.data), *dout = static_cast<const T*>(p.dout.data);
  T* dx = static_cast<T*>(p.out.data);
  float bias[V] = {}, dbias[V] = {};
  if (p.bias.data) load_any<V>(bias, p.bias.data, p.bias.dtype, c0);
  i64 r = part;
  for (; r + parts < p.R - 1; r += 2 * parts) {
    Raw<T, V> rows[2], slopes[2];
#pragma unroll
    for (int u = 0; u < 2; u++) {
      rows[u].load(x + (r + u * parts) * p.x.stride + c0);
      slopes[u].load(dout + (r + u * parts) * p.dout.stride + c0);
    }
#pragma unroll
    for (int u = 0; u < 2; u++) {
      float v[V], d[V];
      rows[u].values(v), slopes[u].values(d);
#pragma unroll
      for (int k = 0; k < V; k++) dbias[k] += d[k] *= gelu_slope<TANH>(v[k] + bias[k]);
      store(dx + (r + u * parts) * p.out.stride + c0, d);
    }
  }
  for (; r < p.R; r += parts) {
    for_columns<V>(c0, r == p.R - 1 ? p.tail : p.C, [&](auto width, i64 c) {
      float v[width.value], d[width.value];
      load(v, x + r * p.x.stride + c);
      load(d, dout + r * p.dout.stride + c);
#pragma unroll
      for (int k = 0; k < width.value; k++) dbias[k] += d[k] *= gelu_slope<TANH>(v[k] + bias[k]);
      store(dx + r * p.out.stride + c, d);
    });
  }
  if (p.dbias) store(p.dbias + part * p.C + c0, dbias);
}

// Threads along the columns first, so many that blocks of them end near the last column (192 and 192 for 384, not 256 and
// 128); what is left of a block takes further rows. A thread has two rows, or more where the grid ends.
struct Shape {
  dim3 grid, block;
};
template <int V> Shape shape_of(const GeluParams& p, i64 rows, int each) {
  const i64 vectors = ceil_div(p.C, V), blocks = ceil_div(vectors, kThreads);
  const int x = round_to_warps(ceil_div(vectors, blocks), kThreads), y = kThreads / x;
  const i64 down = ceil_div(rows, y * each);
  return {dim3(unsigned(blocks), unsigned(down < 65535 ? down : 65535)), dim3(x, y)};
}

}  // namespace

cudaError_t gelu_fwd(const GeluParams& p, cudaStream_t stream) {
  if (!p.R || !p.C) return cudaSuccess;
  return with_dtype(p.x.dtype, [&](auto t) {
    using T = decltype(t);
    return with_width<T>(
        p.C,
        [&](auto width) {
          constexpr int V = decltype(width)::value;
          const Shape s = shape_of<V>(p, p.R, 2);
          auto kernel = p.tanh ? gelu_fwd_kernel<T, V, true> : gelu_fwd_kernel<T, V, false>;
          LAUNCH(kernel, s.grid, s.block, 0, stream, p);
          return cudaGetLastError();
        },
        p.x, p.bias, p.out);
  });
}

cudaError_t gelu_bwd(const GeluParams& p, cudaStream_t stream) {
  if (!p.C || (!p.R && !p.dbias)) return cudaSuccess;
  return with_dtype(p.x.dtype, [&](auto t) {
    using T = decltype(t);
    return with_width<T>(
        p.C,
        [&](auto width) {
          constexpr int V = decltype(width)::value;
          const Shape s = shape_of<V>(p, parts_of(p.R), 1);
          auto kernel = p.tanh ? gelu_bwd_kernel<T, V, true> : gelu_bwd_kernel<T, V, false>;
          LAUNCH(kernel, s.grid, s.block, 0, stream, p, parts_of(p.R));
          return cudaGetLastError();
        },
        p.x, p.bias, p.dout, p.out, Vector{p.dbias, DType::f32});
  });
}

}  // namespace gptfast::cuda
