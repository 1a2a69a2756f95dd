// Dropout along rows by the Philox contract (philox.cuh). A dropped nan is dropped.
// Floor: one read and one write; one Philox call serves 8 values (16-bit dtypes) or 4 (fp32).
#include "common.cuh"
#include "philox.cuh"

namespace gptfast::cuda {
namespace {

constexpr int kThreads = 256;

template <class T, int V> __global__ void __launch_bounds__(kThreads) dropout_kernel(const DropoutRowsParams p) {
  const i64 c = (i64(blockIdx.x) * blockDim.x + threadIdx.x) * V;
  const float scale = dropout_scale(p.dropout);
  for (i64 r = i64(blockIdx.y) * blockDim.y + threadIdx.y; r < p.R; r += i64(gridDim.y) * blockDim.y) {
    float x[V] = {};
    if (c < p.C) load(x, static_cast<const T*>(p.x.data) + r * p.x.stride + c);
    bool keep[V];
    dropout_keep<V>(keep, p.dropout, 0, uint32_t(r), int(c));  // all lanes: they share calls
    if (c >= p.C) continue;
#pragma unroll
    for (int k = 0; k < V; k++) x[k] = keep[k] ? x[k] * scale : 0.f;
    store(static_cast<T*>(p.y.data) + r * p.y.stride + c, x);
  }
}

}  // namespace

cudaError_t dropout(const DropoutRowsParams& p, cudaStream_t stream) {
  if (!p.R || !p.C) return cudaSuccess;
  return with_dtype(p.x.dtype, [&](auto t) {
    using T = decltype(t);
    return with_width<T>(
        p.C,
        [&](auto width) {
          constexpr int V = decltype(width)::value;
          const int x = round_to_warps(ceil_div(p.C, V), kThreads), y = kThreads / x;
          const i64 down = ceil_div(p.R, y);
          const dim3 grid(unsigned(ceil_div(p.C, i64(x) * V)), unsigned(down < 65535 ? down : 65535));
          auto kernel = dropout_kernel<T, V>;
          LAUNCH(kernel, grid, dim3(x, y), 0, stream, p);
          return cudaGetLastError();
        },
        p.x, p.y);
  });
}

}  // namespace gptfast::cuda
