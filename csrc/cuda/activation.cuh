// A function of x + bias, forward and backward; gelu.cu and relu_squared.cu say which. A has value(z), slope(z) and kBias:
// whether there may be a bias.
//
// A thread has V neighbouring columns and walks down the rows, two at a time, so its bias and its share of dbias stay in
// registers and two rows are on their way from memory at once.
// Floor: one read and one write of x (backward: two reads and one write).
#pragma once
#include "pointwise.cuh"

namespace gptfast::cuda {
namespace {

template <class A, class T, int V>
__global__ void __launch_bounds__(kThreads, 5) activation_fwd_kernel(const GeluParams p) {
  const i64 c0 = (i64(blockIdx.x) * blockDim.x + threadIdx.x) * V, step = i64(gridDim.y) * blockDim.y;
  const T* x = static_cast<const T*>(p.x.data);
  T* y = static_cast<T*>(p.out.data);
  float bias[V] = {};
  if (A::kBias && p.bias.data && c0 < p.C) load_any<V>(bias, p.bias.data, p.bias.dtype, c0);
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
      for (int k = 0; k < V; k++) v[k] = A::value(A::kBias ? v[k] + bias[k] : v[k]);
      store(y + (r + u * step) * p.out.stride + c0, v);
    }
  }
  for (; r < p.R; r += step) {
    for_columns<V>(c0, r == p.R - 1 ? p.tail : p.C, [&](auto width, i64 c) {
      float v[width.value];
      load(v, x + r * p.x.stride + c);
#pragma unroll
      for (int k = 0; k < width.value; k++)
        v[k] = A::value(A::kBias ? v[k] + bias[k] : v[k]);  // a ragged end has no bias
      store(y + r * p.out.stride + c, v);
    });
  }
}

// Part number n takes rows n, n + parts, … and leaves their sum of dx in row n of dbias.
template <class A, class T, int V>
__global__ void __launch_bounds__(kThreads) activation_bwd_kernel(const GeluParams p, i64 parts) {
  const i64 c0 = (i64(blockIdx.x) * blockDim.x + threadIdx.x) * V;
  const i64 part = i64(blockIdx.y) * blockDim.y + threadIdx.y;
  if (c0 >= p.C || part >= parts) return;
  const T *x = static_cast<const T*>(p.x.data), *dout = static_cast<const T*>(p.dout.data);
  T* dx = static_cast<T*>(p.out.data);
  float bias[V] = {}, dbias[V] = {};
  if (A::kBias && p.bias.data) load_any<V>(bias, p.bias.data, p.bias.dtype, c0);
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
      for (int k = 0; k < V; k++) dbias[k] += d[k] *= A::slope(A::kBias ? v[k] + bias[k] : v[k]);
      store(dx + (r + u * parts) * p.out.stride + c0, d);
    }
  }
  for (; r < p.R; r += parts) {
    for_columns<V>(c0, r == p.R - 1 ? p.tail : p.C, [&](auto width, i64 c) {
      float v[width.value], d[width.value];
      load(v, x + r * p.x.stride + c);
      load(d, dout + r * p.dout.stride + c);
#pragma unroll
      for (int k = 0; k < width.value; k++) dbias[k] += d[k] *= A::slope(A::kBias ? v[k] + bias[k] : v[k]);
      store(dx + r * p.out.stride + c, d);
    });
  }
  if (A::kBias && p.dbias) store(p.dbias + part * p.C + c0, dbias);
}

template <class A> cudaError_t activation_fwd(const GeluParams& p, cudaStream_t stream) {
  if (!p.R || !p.C) return cudaSuccess;
  return with_dtype(p.x.dtype, [&](auto t) {
    using T = decltype(t);
    return with_width<T>(
        p.C,
        [&](auto width) {
          constexpr int V = decltype(width)::value;
          const Shape s = shape_of<V>(p.C, p.R, 2);
          auto kernel = activation_fwd_kernel<A, T, V>;
          LAUNCH(kernel, s.grid, s.block, 0, stream, p);
          return cudaGetLastError();
        },
        p.x, p.bias, p.out);
  });
}

template <class A> cudaError_t activation_bwd(const GeluParams& p, cudaStream_t stream) {
  if (!p.C || (!p.R && !p.dbias)) return cudaSuccess;
  return with_dtype(p.x.dtype, [&](auto t) {
    using T = decltype(t);
    return with_width<T>(
        p.C,
        [&](auto width) {
          constexpr int V = decltype(width)::value;
          const Shape s = shape_of<V>(p.C, parts_of(p.R), 1);
          auto kernel = activation_bwd_kernel<A, T, V>;
          LAUNCH(kernel, s.grid, s.block, 0, stream, p, parts_of(p.R));
          return cudaGetLastError();
        },
        p.x, p.bias, p.dout, p.out, Vector{p.dbias, DType::f32});
  });
}

}  // namespace
}  // namespace gptfast::cuda
