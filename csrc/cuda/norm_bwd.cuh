// Backward of layer_norm, add_layer_norm, rms_norm and add_rms_norm. layer_norm_bwd.cu and rms_norm_bwd.cu are this with
// CENTERED true and false.
//
//   dtotal += rstd (g - mean(g) - xhat mean(g xhat)),  g = dy weight,  xhat = (total - mean) rstd
//   dx = dropout(dtotal),  dresidual = dtotal
//   dweight = sum_rows dy xhat,  dbias = sum_rows dy
//
// RMSNorm is the same with a mean of 0 that has no gradient: without mean(g), and without dbias.
//
// Part number n takes rows n, n + parts, …; a block has a part. Where a warp's registers hold a row (warp_vectors), each warp of
// the block has a row, or several short ones of RMSNorm, and the sums of all are added in their order at the end; a longer row
// takes the whole block. A thread keeps its columns' dweight and dbias in registers (columns past its first N vectors: in the
// part's own row of the partial sums) and leaves them for sum_parts. The next row comes from memory while one is computed.
// Floor: two reads and one write (with a residual three and one or two).
#pragma once
#include "norm.cuh"

namespace gptfast::cuda {
namespace {

// Warps of a block that have rows of their own. Those with one vector a thread need few registers, and many of them to keep
// enough loads on their way.
template <int N> constexpr int kWarpsOf = N == 1 ? 12 : 4;
// The vectors of a row that a thread of a warp holds: up to 1024 columns of 16 bits, up to 768 of 32.
constexpr int warp_vectors(int width) { return width == 8 ? 4 : 6; }
// With two vectors a thread, 512 threads would leave each too few registers.
constexpr int most_threads(int vectors) { return vectors == 1 ? 512 : 384; }

// A row at columns c .. c + V - 1 as memory has it: x of type T, dy of type G.
template <class T, class G, int V> struct Input {
  Raw<T, V> x;
  Raw<G, V> dy;
  DEV_INLINE void load(const LayerNormParams& p, i64 r, int c) {
    const bool there = c < p.C && r < p.R;
    if (there) x.load(p.x.data, p.x.dtype, r * p.x.stride + c);
    else x.zero();
    if (there && p.dy.data) dy.load(p.dy.data, p.dy.dtype, r * p.dy.stride + c);
    else dy.zero();
  }
};
template <class T, int V> DEV_INLINE void load_total(Raw<T, V>& dtotal, const LayerNormParams& p, i64 r, int c) {
  if (c < p.C && r < p.R && p.dtotal.data) dtotal.load(p.dtotal.data, p.dtotal.dtype, r * p.dtotal.stride + c);
  else dtotal.zero();
}
struct Statistics {
  float mean, rest, rstd;
  template <bool CENTERED> DEV_INLINE void load(const LayerNormParams& p, i64 r) {
    const bool there = r < p.R;  // past the end zeros, which add nothing
    mean = CENTERED && there ? p.mean[r] : 0.f, rest = CENTERED && there ? p.mean[p.R + r] : 0.f;
    rstd = there ? p.rstd[r] : 0.f;
  }
};

// What a row's sums are: of g and g xhat, or of the second alone.
template <bool CENTERED> using Sums = std::conditional_t<CENTERED, float2, float>;

// The same as fp32: xhat, dy and g.
template <bool CENTERED, int V> struct Values {
  float xhat[V], dy[V], g[V];
  template <class T, class G>
  DEV_INLINE void set(const Input<T, G, V>& input, const Statistics& s, const LayerNormParams& p, int c) {
    input.x.values(xhat), input.dy.values(dy);
    float weight[V];  // in L1 from the second row on
    load_weight<CENTERED>(weight, p, c);
    const float shift = -s.rest * s.rstd;
    // g is rounded once: fused with g - mean(g), its rounding would stay where both are equal
#pragma unroll
    for (int k = 0; k < V; k++) {
      xhat[k] = CENTERED ? fmaf(xhat[k] - s.mean, s.rstd, shift) : xhat[k] * s.rstd;
      g[k] = __fmul_rn(dy[k], weight[k]);
    }
  }
  DEV_INLINE void count(float (&dw)[V], float (&db)[V], Sums<CENTERED>& sums) const {
#pragma unroll
    for (int k = 0; k < V; k++) {
      dw[k] = fmaf(dy[k], xhat[k], dw[k]);
      if constexpr (CENTERED) db[k] += dy[k], sums.x += g[k], sums.y = fmaf(g[k], xhat[k], sums.y);
      else sums = fmaf(g[k], xhat[k], sums);
    }
  }
};
// dtotal of those columns; then dx and dresidual. All lanes of a warp call: dropout shares calls among them.
template <class T, bool CENTERED, int V>
DEV_INLINE void write(const Values<CENTERED, V>& v, const Raw<T, V>& dtotal, const LayerNormParams& p, i64 r, int c,
                      float rstd, float mean_g, float mean_gx) {
  const bool inside = c < p.C && r < p.R;
  float d[V];
  dtotal.values(d);
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

// Adds the sums of the block's rows in their order, those of a warp first; the first row's lanes have the total. `shared`: room
// for (WARPS - 1) * C floats.
template <int LANES, int WARPS, int V, int N> DEV_INLINE void add_rows(float (&sums)[N][V], float* shared, int C) {
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
#pragma unroll
  for (int distance = LANES; distance < 32; distance <<= 1) {
#pragma unroll
    for (int i = 0; i < N; i++)
#pragma unroll
      for (int k = 0; k < V; k++) sums[i][k] += shuffle_xor(sums[i][k], distance);
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < N; i++)
    if (const int c = (i * LANES + lane) * V; warp && lane < LANES && c < C)
      store(shared + (warp - 1) * C + c, sums[i]);
  __syncthreads();
  for (int w = 0; w < WARPS - 1 && !warp; w++) {
#pragma unroll
    for (int i = 0; i < N; i++) {
      const int c = (i * LANES + lane) * V;
      if (lane >= LANES || c >= C) continue;
      float other[V];
      load(other, shared + w * C + c);
#pragma unroll
      for (int k = 0; k < V; k++) sums[i][k] += other[k];
    }
  }
}

// LANES: of a warp that have a row; 0: a block has one.
template <bool CENTERED, class T, class G, int V, int N, int LANES>
__global__ void __launch_bounds__(LANES ? 32 * kWarpsOf<N> : most_threads(N), LANES&& N == 1 ? 2 : 1)
    norm_bwd_kernel(const LayerNormParams p) {
  DYN_SMEM(scratch);
  constexpr bool kWhole = LANES != 0;  // registers hold the row
  constexpr int kLanes = kWhole ? LANES : 32, kRows = kWhole ? 32 / kLanes : 1, kWarps = kWhole ? kWarpsOf<N> : 1;
  const int C = int(p.C), t = kWhole ? threadIdx.x % kLanes : threadIdx.x, first = t * V;
  const int step = (kWhole ? kLanes : blockDim.x) * V;
  float* partial_w = p.dweight ? p.dweight + i64(blockIdx.x) * C : nullptr;  // RMSNorm alone may be without
  float* partial_b = CENTERED && p.dbias ? p.dbias + i64(blockIdx.x) * C : nullptr;
  float dweight[N][V] = {}, dbias[N][V] = {};
  for (int c = first + N * step; !kWhole && c < C; c += step) {
    if (CENTERED || partial_w) store(partial_w + c, dweight[0]);  // zeros
    if (partial_b) store(partial_b + c, dweight[0]);
  }

  // base: the first row of a warp, whose lanes stay together; r: that of this lane
  const i64 stride = i64(gridDim.x) * kWarps * kRows;
  i64 base = (blockIdx.x + (kWhole ? i64(gridDim.x) * (threadIdx.x >> 5) : 0)) * kRows;
  i64 r = base + (kWhole ? (threadIdx.x & 31) / kLanes : 0);
  Input<T, G, V> next[N];
  Statistics statistics{}, next_statistics{};
#pragma unroll
  for (int i = 0; i < N; i++) next[i].load(p, r, first + i * step);
  next_statistics.load<CENTERED>(p, r);
  for (int turn = 0; base < p.R; base += stride, r += stride, turn ^= 1) {
    Values<CENTERED, V> near[N];
    Raw<T, V> dtotal[N];
    Sums<CENTERED> sums{};
    statistics = next_statistics;
    next_statistics.load<CENTERED>(p, r + stride);
#pragma unroll
    for (int i = 0; i < N; i++) load_total(dtotal[i], p, r, first + i * step);
#pragma unroll
    for (int i = 0; i < N; i++) {
      const int c = first + i * step;
      if (c < C) near[i].set(next[i], statistics, p, c), near[i].count(dweight[i], dbias[i], sums);
      next[i].load(p, r + stride, c);
    }
    for (int c = first + N * step; !kWhole && c < C; c += step) {
      Input<T, G, V> input;
      Values<CENTERED, V> v;
      float dw[V] = {}, db[V] = {};
      input.load(p, r, c), v.set(input, statistics, p, c);
      if (CENTERED || partial_w) load(dw, partial_w + c);
      if (partial_b) load(db, partial_b + c);
      v.count(dw, db, sums);
      if (CENTERED || partial_w) store(partial_w + c, dw);
      if (partial_b) store(partial_b + c, db);
    }
    if constexpr (kWhole) sums = warp_reduce<kLanes>(sums, Sum{});
    else sums = block_reduce_in_turn(sums, Sum{}, Sums<CENTERED>{}, scratch, turn);
    float mean_g = 0.f, mean_gx;
    if constexpr (CENTERED) mean_g = sums.x / float(C), mean_gx = sums.y / float(C);
    else mean_gx = sums / float(C);
#pragma unroll
    for (int i = 0; i < N; i++)
      if (i * step < C) write<T>(near[i], dtotal[i], p, r, first + i * step, statistics.rstd, mean_g, mean_gx);
    for (int c0 = N * step; !kWhole && c0 < C; c0 += step) {
      Input<T, G, V> input;
      Raw<T, V> more;
      Values<CENTERED, V> v;
      input.load(p, r, c0 + first), load_total(more, p, r, c0 + first);
      if (c0 + first < C) v.set(input, statistics, p, c0 + first);
      write<T>(v, more, p, r, c0 + first, statistics.rstd, mean_g, mean_gx);
    }
  }
  if constexpr (kWhole) {
    if (CENTERED || partial_w) add_rows<kLanes, kWarps>(dweight, reinterpret_cast<float*>(scratch), C);
    if (partial_b) add_rows<kLanes, kWarps>(dbias, reinterpret_cast<float*>(scratch), C);
    if (threadIdx.x >= kLanes) return;
  }
#pragma unroll
  for (int i = 0; i < N; i++) {
    const int c = first + i * step;
    if (c >= C) continue;
    if (CENTERED || partial_w) store(partial_w + c, dweight[i]);
    if (partial_b) store(partial_b + c, dbias[i]);
  }
}

template <bool CENTERED, class T, class G, int V, int N, int LANES>
cudaError_t launch_rows(const LayerNormParams& p, int threads, size_t scratch, cudaStream_t stream) {
  auto kernel = norm_bwd_kernel<CENTERED, T, G, V, N, LANES>;
  LAUNCH(kernel, dim3(unsigned(norm_parts_of(p.R))), dim3(threads), scratch, stream, p);
  return cudaGetLastError();
}

template <bool CENTERED, class T, class G> cudaError_t launch(const LayerNormParams& p, cudaStream_t stream) {
  return with_width<T>(
      p.C,
      [&](auto width) {
        constexpr int V = decltype(width)::value;
        const auto in_warps = [&](auto vectors, auto lanes) {
          constexpr int N = decltype(vectors)::value, kWarps = kWarpsOf<N>;
          const size_t scratch = size_t(kWarps - 1) * size_t(p.C) * sizeof(float);
          return launch_rows<CENTERED, T, G, V, N, decltype(lanes)::value>(p, 32 * kWarps, scratch, stream);
        };
        if constexpr (V > 1 && !CENTERED) {  // rows of heads
          if (p.C <= 8 * V) return in_warps(Width<1>{}, Width<8>{});
          if (p.C <= 16 * V) return in_warps(Width<1>{}, Width<16>{});
          if (p.C <= 32 * V) return in_warps(Width<1>{}, Width<32>{});
        }
        if constexpr (V > 1) {
          constexpr int kMost = warp_vectors(V), kFewer = kMost == 4 ? 3 : kMost;
          if (p.C <= 32 * V * kFewer) return in_warps(Width<kFewer>{}, Width<32>{});
          if (p.C <= 32 * V * kMost) return in_warps(Width<kMost>{}, Width<32>{});
        }
        const auto in_a_block = [&](auto vectors) {
          constexpr int N = decltype(vectors)::value;
          const int threads = round_to_warps(ceil_div(p.C, N * V), most_threads(N));
          return launch_rows<CENTERED, T, G, V, N, 0>(p, threads, 2 * 32 * sizeof(float2), stream);
        };
        return p.C <= most_threads(1) * V ? in_a_block(Width<1>{}) : in_a_block(Width<2>{});
      },
      p.x, p.dy, p.dtotal, p.weight, p.dx, p.dresidual, Vector{p.dweight, DType::f32}, Vector{p.dbias, DType::f32});
}

template <bool CENTERED> cudaError_t norm_bwd(const LayerNormParams& p, cudaStream_t stream) {
  return with_dtype(p.x.dtype, [&](auto t) {
    using T = decltype(t);
    if (!p.dy.data || p.dy.dtype == p.x.dtype) return launch<CENTERED, T, T>(p, stream);
    if constexpr (sizeof(T) == 4) {  // under autocast: a stream of 32 bits, gradients of 16
      if (p.dy.dtype == DType::bf16) return launch<CENTERED, T, bf16>(p, stream);
      return launch<CENTERED, T, __half>(p, stream);
    }
    return launch<CENTERED, T, Any>(p, stream);
  });
}

}  // namespace
}  // namespace gptfast::cuda
