// Cross-entropy of rows of logits, forward, backward, and both at once in place. A block has a row.
//
//   lse = m + s,  m = max_v x_v,  s = log sum_v exp(x_v - m)
//   loss = (1 - e) (m - x_target + s) + e (m - mean_v x_v + s)      e: label smoothing
//   dx_v = g (exp(x_v - m - s) - (1 - e) [v = target] - e / V)      g: gradient of this row's loss
//
// m and s are kept apart: their sum would round away what a confident row, or one with a large common offset, is about.
// Floor: one read of the logits forward, one read and one write backward. The maximum runs along with the sum (Milakov
// and Gimelshein, arXiv 1805.02867), so that a row comes from memory once. In place the row stays in shared memory until its
// gradient is formed, where it fits: so many rows are on their way that L2 would not hold them.
#include "common.cuh"
#include "mma.cuh"

namespace gptfast::cuda {
namespace {

constexpr int kThreads = 512, kKeepingThreads = 1024;  // two blocks of rows that are kept fill a processor

// Rows of an odd vocabulary start anywhere: the first `head` values one by one, then 16 bytes at a time, then the rest.
// f(width, v) takes the values v .. v + width - 1.
template <class T, class F> DEV_INLINE void for_row(i64 V, i64 head, F f) {
  constexpr int W = 16 / int(sizeof(T));
  for (i64 v = threadIdx.x; v < head; v += blockDim.x) f(Width<1>{}, v);
  const i64 rest = head + (V - head) / W * W;
  for (i64 v = head + threadIdx.x * W; v < rest; v += blockDim.x * W) f(Width<W>{}, v);
  for (i64 v = rest + threadIdx.x; v < V; v += blockDim.x) f(Width<1>{}, v);
}
// How many values lie before the first 16-byte boundary.
template <class T> DEV_INLINE i64 head_of(const T* x, i64 V) {
  const i64 head = i64(-reinterpret_cast<uintptr_t>(x) & 15) / i64(sizeof(T));
  return head < V ? head : V;
}

struct Exponentials {  // the largest value so far, and the sum of exp(x - top)
  float top, total;
};
DEV_INLINE float finite_or_zero(float top) { return top == -INFINITY ? 0.f : top; }
struct Merge {
  DEV_INLINE Exponentials operator()(Exponentials a, Exponentials b) const {
    const float top = fmaxf(a.top, b.top), level = finite_or_zero(top);
    return {top, a.total * fast_exp2((a.top - level) * kLog2e) + b.total * fast_exp2((b.top - level) * kLog2e)};
  }
};

// What forward leaves behind, and what backward starts from.
struct Row {
  float top, log_total, loss;
};
// kept: where the row is copied to, if KEEP.
template <bool KEEP, class T>
DEV_INLINE Row row_loss(const CrossEntropyParams& p, const T* x, T* kept, i64 target, char* scratch) {
  if (target < 0 || target >= p.V) return {NAN, NAN, NAN};
  const float e = p.label_smoothing, picked = to_float(x[target]);
  const float origin = fabsf(picked) < INFINITY ? picked : 0.f;  // near the others, so that little is lost in the sum
  const bool smooth = e != 0.f;
  Exponentials mine{-INFINITY, 0.f};
  float shifted = 0.f;
  for_row<T>(p.V, head_of(x, p.V), [&](auto width, i64 v) {
    Raw<T, width.value> raw;
    float values[width.value];
    raw.load(x + v);
    if constexpr (KEEP) raw.store(kept + v);
    raw.values(values);
    float top = mine.top;
#pragma unroll
    for (int k = 0; k < width.value; k++) top = fmaxf(top, values[k]);  // nan passes by and shows up in the sum
    const float level = finite_or_zero(top);
    mine.total *= fast_exp2((mine.top - level) * kLog2e);
    mine.top = top;
#pragma unroll
    for (int k = 0; k < width.value; k++) mine.total += fast_exp2((values[k] - level) * kLog2e);
    if (!smooth) return;
#pragma unroll
    for (int k = 0; k < width.value; k++) shifted += values[k] - origin;
  });
  const Exponentials all = block_reduce(mine, Merge{}, Exponentials{-INFINITY, 0.f}, scratch);
  const float log_total = logf(all.total);
  float loss = (1.f - e) * (all.top - picked + log_total);
  if (smooth) {
    shifted = block_reduce(shifted, Sum{}, 0.f, scratch);
    loss += e * (all.top - origin - shifted / float(p.V) + log_total);
  }
  return {all.top, log_total, loss};
}
template <class T> DEV_INLINE void row_gradient(const CrossEntropyParams& p, const T* x, T* d, i64 r, const Row& row) {
  const i64 target = p.targets[r];
  const float g = p.dloss ? p.dloss[r] : 1.f, e = p.label_smoothing, even = g * e / float(p.V);
  const bool together = ((reinterpret_cast<uintptr_t>(x) ^ reinterpret_cast<uintptr_t>(d)) & 15) == 0;
  for_row<T>(p.V, together ? head_of(x, p.V) : p.V, [&](auto width, i64 v) {
    float values[width.value];
    load(values, x + v);
#pragma unroll
    for (int k = 0; k < width.value; k++) {
      const float p_v = fast_exp2(fmaf(values[k] - row.top, kLog2e, -row.log_total * kLog2e));
      values[k] = fmaf(p_v, g, -even);
      if (v + k == target) values[k] -= g * (1.f - e);
    }
    store(d + v, values);
  });
}
constexpr size_t kScratch = 32 * sizeof(Exponentials);
// Where a kept row lies: as far from a 16-byte boundary as x. A thread reads what it has written itself.
template <class T> DEV_INLINE T* kept_row(char* scratch, const T* x) {
  return reinterpret_cast<T*>(scratch + kScratch + (reinterpret_cast<uintptr_t>(x) & 15));
}
template <class T> DEV_INLINE void row_of_zeros(T* d, i64 V) {
  for_row<T>(V, head_of(d, V), [&](auto width, i64 v) {
    const float zeros[width.value] = {};
    store(d + v, zeros);
  });
}

template <class T, bool FORWARD, bool BACKWARD, bool KEEP>
__global__ void __launch_bounds__(KEEP ? kKeepingThreads : kThreads, KEEP ? 2 : 4)
    cross_entropy_kernel(const CrossEntropyParams p) {
  DYN_SMEM(scratch);
  const i64 r = blockIdx.x, target = p.targets[r];
  const T* x = static_cast<const T*>(p.logits.data) + r * p.logits.stride;
  Row row{0.f, 0.f, 0.f};
  const bool counts = target != p.ignore_index;
  if constexpr (FORWARD) {
    T* kept = nullptr;
    if constexpr (KEEP) kept = kept_row(scratch, x);
    if (counts) row = row_loss<KEEP>(p, x, kept, target, scratch);
    if (threadIdx.x == 0) p.loss[r] = row.loss;
    if (threadIdx.x == 0 && p.lse) p.lse[2 * r] = row.top, p.lse[2 * r + 1] = row.log_total;
  } else {
    row.top = p.lse[2 * r], row.log_total = p.lse[2 * r + 1];
  }
  if constexpr (BACKWARD) {
    T* d = static_cast<T*>(p.dlogits.data) + r * p.dlogits.stride;
    if (counts) row_gradient(p, KEEP ? kept_row(scratch, x) : x, d, r, row);
    else row_of_zeros(d, p.V);
  }
}

template <bool FORWARD, bool BACKWARD> cudaError_t launch(const CrossEntropyParams& p, cudaStream_t stream) {
  if (!p.R) return cudaSuccess;
  return with_dtype(p.logits.dtype, [&](auto t) {
    using T = decltype(t);
    const i64 values = 32 / int(sizeof(T));  // of a thread, at least
    if constexpr (FORWARD && BACKWARD) {
      const size_t bytes = kScratch + size_t(p.V) * sizeof(T) + 16;
      auto kernel = cross_entropy_kernel<T, true, true, true>;
      int room = 0;
      if (const cudaError_t error = shared_memory(&room)) return error;
      if (bytes <= size_t(room)) {
        if (const cudaError_t error = allow_smem(kernel, bytes)) return error;
        const int threads = round_to_warps(ceil_div(p.V, values), kKeepingThreads);
        LAUNCH(kernel, dim3(unsigned(p.R)), dim3(threads), bytes, stream, p);
        return cudaGetLastError();
      }
    }
    const int threads = round_to_warps(ceil_div(p.V, values), kThreads);
    auto kernel = cross_entropy_kernel<T, FORWARD, BACKWARD, false>;
    LAUNCH(kernel, dim3(unsigned(p.R)), dim3(threads), kScratch, stream, p);
    return cudaGetLastError();
  });
}

}  // namespace

cudaError_t cross_entropy_fwd(const CrossEntropyParams& p, cudaStream_t stream) {
  return launch<true, false>(p, stream);
}
cudaError_t cross_entropy_bwd(const CrossEntropyParams& p, cudaStream_t stream) {
  return launch<false, true>(p, stream);
}
cudaError_t cross_entropy_in_place(const CrossEntropyParams& p, cudaStream_t stream) {
  return launch<true, true>(p, stream);
}

}  // namespace gptfast::cuda
