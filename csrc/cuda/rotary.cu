// Rotary position embedding (Su et al., arXiv 2104.09864), forward and, with the sign of the sine turned, backward.
//
//   (a, b) -> (a cos - b sin, b cos + a sin)    for pairs of channels: i and half + i, or 2 i and 2 i + 1 (PAIRS)
//
// Channels past the pairs are copied. A thread has the same channels of kHeads heads of a token: their loads go out together
// and share one read of the tables. A token whose position is not in the tables becomes nan.
// Floor: one read and one write of x; the tables are read once for kHeads heads, from L2 but for the first time.
#include "common.cuh"

namespace gptfast::cuda {
namespace {

constexpr int kThreads = 256, kHeads = 4;

// The threads of a token: `turned` have pairs of channels, the others V channels that are copied, for `groups` of heads.
struct Layout {
  int turned, lanes, groups;
};

// N neighbouring floats of a row of the tables, which is aligned to as many bytes, up to 16, as N fill.
template <int N> DEV_INLINE void load_table(float (&x)[N], const float* from) {
  if constexpr (N % 4 == 0 || N == 2) load(x, from);
  else {
#pragma unroll
    for (int k = 0; k < N; k++) x[k] = from[k];
  }
}

// Two vectors of V channels, a and b, of which each pair (a[k], b[k]) is turned; in PAIRS one vector with the pairs in turn.
template <class T, int V, bool PAIRS> struct Channels {
  static constexpr int kPairs = PAIRS && V > 1 ? V / 2 : V;
  static constexpr int kVectors = kPairs == V ? 2 : 1;
  Raw<T, V> v[kVectors];
  // Where vector n of the pairs from i on begins.
  static DEV_INLINE int place(int n, int i, int half) { return PAIRS ? 2 * i + n : i + n * half; }
  DEV_INLINE void load(const T* row, int i, int half) {
#pragma unroll
    for (int n = 0; n < kVectors; n++) v[n].load(row + place(n, i, half));
  }
  DEV_INLINE void turn(T* row, int i, int half, const float (&cos)[kPairs], const float (&sin)[kPairs]) const {
    float x[kVectors * V];
#pragma unroll
    for (int n = 0; n < kVectors; n++) v[n].values(reinterpret_cast<float (&)[V]>(x[n * V]));
#pragma unroll
    for (int k = 0; k < kPairs; k++) {
      float &a = x[kVectors == 1 ? 2 * k : k], &b = x[kVectors == 1 ? 2 * k + 1 : V + k];
      const float turned = fmaf(-b, sin[k], a * cos[k]);
      b = fmaf(a, sin[k], b * cos[k]), a = turned;
    }
#pragma unroll
    for (int n = 0; n < kVectors; n++) store(row + place(n, i, half), reinterpret_cast<float (&)[V]>(x[n * V]));
  }
};

template <class T, int V, bool PAIRS>
__global__ void __launch_bounds__(kThreads, 2) rotary_kernel(const RotaryParams p, const Layout n, i64 rows) {
  using Turned = Channels<T, V, PAIRS>;
  constexpr int kPairs = Turned::kPairs;
  const uint32_t item = blockIdx.x * kThreads + threadIdx.x, group = item / n.lanes;
  const int lane = int(item % n.lanes), h0 = int(group % n.groups) * kHeads, half = int(p.half);
  const i64 t = group / n.groups;
  if (t >= p.T) return;
  const int heads = int(p.H) - h0 < kHeads ? int(p.H) - h0 : kHeads;
  for (i64 b = blockIdx.y; b < p.B; b += gridDim.y) {
    const T* x = static_cast<const T*>(p.x.data) + b * p.x.sb + t * p.x.st + h0 * p.x.sh;
    T* y = static_cast<T*>(p.y.data) + b * p.y.sb + t * p.y.st + h0 * p.y.sh;
    if (lane >= n.turned) {
      const int c = 2 * half + (lane - n.turned) * V;
      Raw<T, V> v[kHeads];
#pragma unroll
      for (int h = 0; h < kHeads; h++)
        if (h < heads) v[h].load(x + h * p.x.sh + c);
#pragma unroll
      for (int h = 0; h < kHeads; h++)
        if (h < heads) v[h].store(y + h * p.y.sh + c);
      continue;
    }
    const int i = lane * kPairs;
    Turned v[kHeads];
#pragma unroll
    for (int h = 0; h < kHeads; h++)
      if (h < heads) v[h].load(x + h * p.x.sh, i, half);
    const i64 place = p.positions ? p.positions[b * p.position_stride + t] : t;
    float cos[kPairs], sin[kPairs];
    if (place >= 0 && place < rows) {
      load_table(cos, p.cos + place * half + i), load_table(sin, p.sin + place * half + i);
    } else {
#pragma unroll
      for (int k = 0; k < kPairs; k++) cos[k] = sin[k] = __int_as_float(0x7fc00000);  // nan
    }
#pragma unroll
    for (int k = 0; k < kPairs; k++) sin[k] = p.inverse ? -sin[k] : sin[k];
#pragma unroll
    for (int h = 0; h < kHeads; h++)
      if (h < heads) v[h].turn(y + h * p.y.sh, i, half, cos, sin);
  }
}

bool heads_aligned(const Heads& x, i64 size, int V) {
  return aligned(x.data, x.sb, size, V) && aligned(x.data, x.sh, size, V) && aligned(x.data, x.st, size, V);
}
// May V channels be accessed at once, and the tables of their pairs?
bool fits(const RotaryParams& p, int V) {
  const i64 size = element_size(p.dtype);
  const int pairs = p.interleaved ? V / 2 : V;
  return p.half % pairs == 0 && (p.D - 2 * p.half) % V == 0 && heads_aligned(p.x, size, V) &&
         heads_aligned({p.y.data, p.y.sb, p.y.sh, p.y.st}, size, V) && aligned(p.cos, p.half, 4, pairs) &&
         aligned(p.sin, p.half, 4, pairs);
}

template <class T, int V, bool PAIRS> cudaError_t launch(const RotaryParams& p, i64 rows, cudaStream_t stream) {
  const i64 turned = p.half / Channels<T, V, PAIRS>::kPairs, lanes = turned + (p.D - 2 * p.half) / V;
  const Layout n{int(turned), int(lanes), int(ceil_div(p.H, kHeads))};
  const dim3 grid(unsigned(ceil_div(p.T * lanes * n.groups, kThreads)), unsigned(p.B < 65535 ? p.B : 65535));
  auto kernel = rotary_kernel<T, V, PAIRS>;
  LAUNCH(kernel, grid, dim3(kThreads), 0, stream, p, n, rows);
  return cudaGetLastError();
}

}  // namespace

cudaError_t rotary(const RotaryParams& p, i64 rows, cudaStream_t stream) {
  if (!p.B || !p.H || !p.T || !p.D) return cudaSuccess;
  return with_dtype(p.dtype, [&](auto t) {
    using T = decltype(t);
    const auto with_layout = [&](auto width) {
      constexpr int V = decltype(width)::value;
      return p.interleaved ? launch<T, V, true>(p, rows, stream) : launch<T, V, false>(p, rows, stream);
    };
    constexpr int V = 16 / int(sizeof(T));
    if (fits(p, V)) return with_layout(Width<V>{});
    if (V == 8 && fits(p, 4)) return with_layout(Width<4>{});  // 12 pairs of 16 bits, as GPT-NeoX 20B has them
    return with_layout(Width<1>{});
  });
}

}  // namespace gptfast::cuda
