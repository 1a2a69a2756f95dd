// SwiGLU (Shazeer, arXiv 2002.05202) and gpt-oss' form of it, forward and backward.
//
//   y = (u + shift) g s,   s = sigmoid(alpha g),   g = min(gate, limit),   u = min(max(up, -limit), limit)
//   dup = dy g s,   dgate = dy (u + shift) (s + alpha g s (1 - s));   0 where the clamp has cut
//
// Plain: alpha 1, shift 0, limit inf. With t = e^-|z|, z = alpha g: s is 1 / (1 + t) or t / (1 + t), s (1 - s) is
// t / (1 + t)^2; nothing overflows or cancels. gate and up are rows of their own, or neighbouring values of one row (PAIRS).
//
// A thread has V neighbouring columns of the result and walks down the rows, kRows at a time, whose loads go out together. In
// pairs V is half as many: a thread then reads 16 bytes of gate and up, and lanes read and write without gaps.
// Floor: two reads and one write forward, three reads and two writes backward.
#include "pointwise.cuh"

namespace gptfast::cuda {
namespace {

// Rows at a time: 64 bytes of gate and up a thread, backward 32, and 16 of dout.
template <bool PAIRS, bool BACKWARD> constexpr int kRows = (PAIRS ? 2 : 1) * (BACKWARD ? 1 : 2);

struct Gate {
  float sigmoid, slope;  // s, and s + z s (1 - s)
  DEV_INLINE explicit Gate(float z) {
    z = z > 200.f ? 200.f : z < -200.f ? -200.f : z;  // beyond, s is 1 or 0; keeps inf * 0 away; nan stays
    const float t = exp2f(-kLog2e * fabsf(z)), r = __fdividef(1.f, 1.f + t);
    sigmoid = z < 0.f ? t * r : r;
    slope = fmaf(z * t, r * r, sigmoid);
  }
};

// gate and up of columns c .. c + V - 1 of row r as memory has them.
template <class T, int V, bool PAIRS> struct GateAndUp {
  Raw<T, V> gate, up;  // in pairs the first and the second half of V pairs
  DEV_INLINE void load(const SwigluParams& p, i64 r, i64 c) {
    const T* row = static_cast<const T*>(p.gate.data) + r * p.gate.stride;
    gate.load(row + (PAIRS ? 2 * c : c));
    up.load(PAIRS ? row + 2 * c + V : static_cast<const T*>(p.up.data) + r * p.up.stride + c);
  }
  DEV_INLINE void values(float (&g)[V], float (&u)[V]) const {
    gate.values(g), up.values(u);
    if constexpr (PAIRS) {
      float both[2 * V];
#pragma unroll
      for (int k = 0; k < V; k++) both[k] = g[k], both[V + k] = u[k];
#pragma unroll
      for (int k = 0; k < V; k++) g[k] = both[2 * k], u[k] = both[2 * k + 1];
    }
  }
};
// The same where V pairs fill one access of 16 bytes.
template <class T, int V>
  requires(2 * V * sizeof(T) == 16)
struct GateAndUp<T, V, true> {
  Raw<T, 2 * V> both;
  DEV_INLINE void load(const SwigluParams& p, i64 r, i64 c) {
    both.load(static_cast<const T*>(p.gate.data) + r * p.gate.stride + 2 * c);
  }
  DEV_INLINE void values(float (&g)[V], float (&u)[V]) const {
    float v[2 * V];
    both.values(v);
#pragma unroll
    for (int k = 0; k < V; k++) g[k] = v[2 * k], u[k] = v[2 * k + 1];
  }
};

DEV_INLINE float cut(float x, float limit) { return x > limit ? limit : x; }  // nan stays

template <class T, int V, bool PAIRS>
DEV_INLINE void write_value(const SwigluParams& p, i64 r, i64 c, GateAndUp<T, V, PAIRS> in) {
  float g[V], u[V];
  in.values(g, u);
#pragma unroll
  for (int k = 0; k < V; k++) {
    const float gate = cut(g[k], p.limit), up = -cut(-cut(u[k], p.limit), p.limit);
    g[k] = (up + p.shift) * (gate * Gate(p.alpha * gate).sigmoid);
  }
  store(static_cast<T*>(p.out.data) + r * p.out.stride + c, g);
}
template <class T, int V, bool PAIRS>
DEV_INLINE void write_gradients(const SwigluParams& p, i64 r, i64 c, GateAndUp<T, V, PAIRS> in, Raw<T, V> dout) {
  float g[V], u[V], d[V];
  in.values(g, u), dout.values(d);
#pragma unroll
  for (int k = 0; k < V; k++) {
    const float gate = cut(g[k], p.limit), up = -cut(-cut(u[k], p.limit), p.limit);
    const Gate s(p.alpha * gate);
    const bool gate_counts = !(g[k] > p.limit), up_counts = !(fabsf(u[k]) > p.limit);
    g[k] = gate_counts ? d[k] * (up + p.shift) * s.slope : 0.f;
    u[k] = up_counts ? d[k] * (gate * s.sigmoid) : 0.f;
  }
  T* dgate = static_cast<T*>(p.dgate.data) + r * p.dgate.stride;
  if constexpr (PAIRS) {
    float both[2 * V];
#pragma unroll
    for (int k = 0; k < V; k++) both[2 * k] = g[k], both[2 * k + 1] = u[k];
    if constexpr (V > 1) {
      store(dgate + 2 * c, both);
    } else {
      from_float(dgate[2 * c], g[0]), from_float(dgate[2 * c + 1], u[0]);
    }
  } else {
    store(dgate + c, g);
    store(static_cast<T*>(p.dup.data) + r * p.dup.stride + c, u);
  }
}

template <class T, int V, bool PAIRS, bool BACKWARD>
__global__ void __launch_bounds__(kThreads, 4) swiglu_kernel(const SwigluParams p) {
  const i64 c0 = (i64(blockIdx.x) * blockDim.x + threadIdx.x) * V, step = i64(gridDim.y) * blockDim.y;
  const T* dout = static_cast<const T*>(p.dout.data);
  constexpr int kAtOnce = kRows<PAIRS, BACKWARD>;
  i64 r = i64(blockIdx.y) * blockDim.y + threadIdx.y;
  for (; r + (kAtOnce - 1) * step < p.R - 1 && c0 < p.C; r += kAtOnce * step) {  // the last row may end before column C
    GateAndUp<T, V, PAIRS> in[kAtOnce];
    Raw<T, V> d[kAtOnce];
#pragma unroll
    for (int k = 0; k < kAtOnce; k++) {
      in[k].load(p, r + k * step, c0);
      if constexpr (BACKWARD) d[k].load(dout + (r + k * step) * p.dout.stride + c0);
    }
#pragma unroll
    for (int k = 0; k < kAtOnce; k++) {
      if constexpr (BACKWARD) write_gradients(p, r + k * step, c0, in[k], d[k]);
      else write_value(p, r + k * step, c0, in[k]);
    }
  }
  for (; r < p.R; r += step) {
    for_columns<V>(c0, r == p.R - 1 ? p.tail : p.C, [&](auto width, i64 c) {
      GateAndUp<T, width.value, PAIRS> in;
      in.load(p, r, c);
      if constexpr (BACKWARD) {
        Raw<T, width.value> d;
        d.load(dout + r * p.dout.stride + c), write_gradients(p, r, c, in, d);
      } else {
        write_value(p, r, c, in);
      }
    });
  }
}

template <bool BACKWARD> cudaError_t launch(const SwigluParams& p, cudaStream_t stream) {
  if (!p.R || !p.C) return cudaSuccess;
  const auto run = [&](auto t, auto width, auto pairs) {
    constexpr int V = decltype(width)::value;
    constexpr bool kPairs = decltype(pairs)::value == 2;
    const Shape s = shape_of<V>(p.C, p.R, kRows<kPairs, BACKWARD>);
    auto kernel = swiglu_kernel<decltype(t), V, kPairs, BACKWARD>;
    LAUNCH(kernel, s.grid, s.block, 0, stream, p);
    return cudaGetLastError();
  };
  return with_dtype(p.gate.dtype, [&](auto t) {
    using T = decltype(t);
    if (!p.interleaved)
      return with_width<T>(
          p.C, [&](auto width) { return run(t, width, Width<1>{}); }, p.gate, p.up, p.dout, p.out, p.dgate, p.dup);
    constexpr int V = 8 / int(sizeof(T));  // V pairs are 16 bytes
    const bool wide =
        p.C % V == 0 && aligned(p.gate, 2 * V) && aligned(p.dgate, 2 * V) && aligned(p.dout, V) && aligned(p.out, V);
    return wide ? run(t, Width<V>{}, Width<2>{}) : run(t, Width<1>{}, Width<2>{});
  });
}

}  // namespace

cudaError_t swiglu_fwd(const SwigluParams& p, cudaStream_t stream) { return launch<false>(p, stream); }
cudaError_t swiglu_bwd(const SwigluParams& p, cudaStream_t stream) { return launch<true>(p, stream); }

}  // namespace gptfast::cuda
