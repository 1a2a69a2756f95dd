// A linear layer of few rows with what stands around it in a block: the norm before, and bias, activation and residual sum
// after. It is a step of decoding, in which nothing is reused: what counts is that the weight is read once, 16 bytes at a
// time, all of it on its way before the first product, and that few kernels wait for each other.
//
// A tile is 8 outputs of all rows; the 8 warps of a block share it along K, a step of 32 values (64 bytes of 8 rows of the
// weight) each in turn. Lane (g, t) = (lane / 4, lane % 4) has 16 bytes of output g at chunk t of a step. They are the second
// operand of mma.sync as they lie, and the same chunk of row g of x is the first: the order of a contraction is free. The warps'
// sums are added in order. Blocks stay, and ask for the next tile's weights before they add up the last one's.
//
// x lies in shared memory, brought there while the first weights are under way, and is normalised there, a row by a warp, with
// the bits of layer_norm or rms_norm. Each block does that for itself: 2 M K bytes more from L2 for 16 K of the weight.
//
// It starts while the kernel before it ends, with the weights where those are ready, and waits for x.
//
// Floor: one read of the weight. The order of a sum depends on K alone, so that y has the same bits however many rows x has.
#include "linear_few.h"

#include "activation_values.cuh"
#include "mma.cuh"
#include "norm_row.cuh"
#include "overlap.cuh"

namespace gptfast::cuda {
namespace {

constexpr int kWarps = 8, kThreads = 32 * kWarps;
constexpr int kOutputs = 8, kChunk = 8, kStep = 4 * kChunk;  // values of a lane, and of a step
constexpr int kTurn = kWarps * kStep;                        // from one step of a warp to its next
constexpr int kSums = kMostLinearRows * kOutputs, kFoundBytes = 2 * kWarps * kSums * int(sizeof(float));

constexpr int blocks_at_once(int depth) { return depth > 4 ? 2 : 3; }  // on a multiprocessor, by registers

// Columns from row to row of x in shared memory: 64 bytes past a multiple of 128, so that eight lanes, which read 64 bytes of
// two rows, meet all banks once.
inline __host__ __device__ int row_of_x(int K) { return (K + 63) / 64 * 64 + kStep; }
template <class T> size_t shared_bytes(const LinearFewParams& p) {
  const i64 K = p.norm.C, affine = staged_values(0, K, p.kind);
  return kFoundBytes + (p.norm.R * row_of_x(int(K)) + affine) * sizeof(T);
}

// Asks for n values of T, whole chunks, to be copied to shared memory.
template <class T> DEV_INLINE void stage(T* to, const void* from, int n) {
#pragma unroll 1  // short code: each launch fetches it anew
  for (int c = int(threadIdx.x) * kChunk; c < n; c += kThreads * kChunk)
    cp_async(smem_u32(to + c), static_cast<const T*>(from) + c);
}

// Row r in shared memory becomes its norm. A warp calls.
template <bool CENTERED, class T>
DEV_INLINE void normalise(T* row, const T* weight, const T* bias, const LayerNormParams& p, int r) {
  const int C = int(p.C), first = int(threadIdx.x) % 32 * kChunk;
  float v[kChunk], sum = 0.f;
  float2 rest = make_float2(0.f, 0.f);
#pragma unroll 1
  for (int c = first; c < C; c += 32 * kChunk) load(v, row + c), sum += sum_of<CENTERED>(v);
  const float near = warp_reduce(sum, Sum{}) / float(C);
  if constexpr (CENTERED) {
#pragma unroll 1
    for (int c = first; c < C; c += 32 * kChunk) load(v, row + c), rest = Sum{}(rest, differences_of(v, near));
    rest = warp_reduce(rest, Sum{});
  }
  const Affine<CENTERED> affine(p, r, near, rest, false);
#pragma unroll 1
  for (int c = first; c < C; c += 32 * kChunk) {
    float w[kChunk], b[kChunk] = {};
    load(v, row + c);
    if (p.weight.data) load(w, weight + c);
    else
      for (float& one : w) one = 1.f;
    if (p.bias.data) load(b, bias + c);
    affine.apply(v, w, b);
    store(row + c, v);
  }
}

// Where a lane is in its row of the weight.
template <class T> struct Weights {
  const T* from;
  int left;  // columns from there on, or less than one where there is no such row
  DEV_INLINE void at_tile(const LinearFewParams& p, int tile, int column, int g) {
    const int n = tile * kOutputs + g, K = int(p.norm.C);
    from = static_cast<const T*>(p.weight) + i64(n) * K + column, left = n < p.N ? K - column : 0;
  }
  DEV_INLINE void advance(int columns) { from += columns, left -= columns; }
  DEV_INLINE uint4 step(int i) const {
    return i * kTurn < left ? __ldcs(reinterpret_cast<const uint4*>(from + i * kTurn)) : make_uint4(0, 0, 0, 0);
  }
};

DEV_INLINE float activated(Activation activation, float z) {
  switch (activation) {
    case Activation::gelu_tanh: return Gelu<true>::value(z);
    case Activation::gelu: return Gelu<false>::value(z);
    case Activation::relu_squared: return ReluSquared::value(z);
    default: return z;
  }
}

template <class T, bool NORM, int DEPTH>
__global__ void __launch_bounds__(kThreads, blocks_at_once(DEPTH))
    linear_few_kernel(const __grid_constant__ LinearFewParams p, int tiles) {
  DYN_SMEM(smem);
  float* found = reinterpret_cast<float*>(smem);  // in turn, of each warp: rows x kOutputs sums
  T* x = reinterpret_cast<T*>(smem + kFoundBytes);
  const int K = int(p.norm.C), M = int(p.norm.R), stride = row_of_x(K), steps = (K + kStep - 1) / kStep;
  const int lane = threadIdx.x % 32, warp = int(threadIdx.x) / 32, g = lane / 4, chunk = lane % 4 * kChunk;
  const int first_column = warp * kStep + chunk, ours = K - warp * kStep;  // of this warp on, columns that there are
  const int all = (steps + kWarps * DEPTH - 1) / (kWarps * DEPTH) * kTurn * DEPTH;
  // What a thread adds to its result, asked for early: row m, output o of a tile.
  const int m = int(threadIdx.x) / kOutputs, o = threadIdx.x % kOutputs;
  Raw<T, 1> bias, residual;
  const auto ask_for_rest = [&](int tile) {
    const int n = tile * kOutputs + o;
    bias.zero(), residual.zero();
    if (m >= M || n >= p.N) return;
    if (p.bias.data) bias.load(static_cast<const T*>(p.bias.data) + n);
    if (p.residual.data) residual.load(static_cast<const T*>(p.residual.data) + m * p.residual.stride + n);
  };

  if (!p.weights_ready) wait_for_earlier_kernels();
  T* affine = x + M * stride;  // weight, then bias
  if (NORM && p.norm.weight.data) stage(affine, p.norm.weight.data, K);
  if (NORM && p.norm.bias.data) stage(affine + K, p.norm.bias.data, K);
  int tile = blockIdx.x;
  Weights<T> from;
  from.at_tile(p, tile, first_column, g);
  uint4 ring[DEPTH];
#pragma unroll
  for (int i = 0; i < DEPTH; i++) ring[i] = from.step(i);
  wait_for_earlier_kernels();
  let_next_kernel_start();
#pragma unroll 1
  for (int r = 0; r < M; r++) stage(x + r * stride, static_cast<const T*>(p.norm.x.data) + r * p.norm.x.stride, K);
  cp_async_commit();
  ask_for_rest(tile);
  cp_async_wait<0>();
  __syncthreads();
  if constexpr (NORM) {
    if (warp < M) {
      T* row = x + warp * stride;
      if (p.kind == NormKind::layer) normalise<true>(row, affine, affine + K, p.norm, warp);
      else normalise<false>(row, affine, affine + K, p.norm, warp);
    }
    __syncthreads();
  }

  for (int turn = 0; tile < tiles; tile += int(gridDim.x), turn ^= 1) {
    float sums[2][4] = {};  // of even and odd products, which do not wait for each other
    for (int k = 0; k < all; k += DEPTH * kTurn) {
      if (k + DEPTH * kTurn < all) from.advance(DEPTH * kTurn);
      else from.at_tile(p, tile + int(gridDim.x), first_column, g);  // past the last tile there is nothing
#pragma unroll
      for (int i = 0; i < DEPTH; i++) {
        const uint4 w = ring[i];
        ring[i] = from.step(i);
        const int at = k + i * kTurn;
        if (at >= ours) continue;  // the same for the whole warp
        uint4 a = make_uint4(0, 0, 0, 0);
        if (g < M && first_column + at < K) a = *reinterpret_cast<const uint4*>(x + g * stride + first_column + at);
        const uint32_t even[4] = {a.x, 0, a.y, 0}, odd[4] = {a.z, 0, a.w, 0};  // rows 8 to 15 are none
        mma_16<T>(sums[0], even, w.x, w.y), mma_16<T>(sums[1], odd, w.z, w.w);
      }
    }
    float* sum_of_tile = found + turn * kWarps * kSums;
    const float z[2] = {sums[0][0] + sums[1][0], sums[0][1] + sums[1][1]};
    if (g < M) store(sum_of_tile + warp * kSums + g * kOutputs + lane % 4 * 2, z);
    __syncthreads();  // the sums of the next tile lie elsewhere, and this barrier is between them and those of the one after
    float y[1] = {0.f}, b[1], r[1];
    bias.values(b), residual.values(r);
    const int n = tile * kOutputs + o;
    ask_for_rest(tile + int(gridDim.x));
    if (m >= M || n >= p.N) continue;
#pragma unroll
    for (int k = 0; k < kWarps; k++) y[0] += sum_of_tile[k * kSums + int(threadIdx.x)];
    y[0] = rounded<T>(activated(p.activation, y[0] + b[0]));  // as the layer alone would leave it
    if (p.residual.data) y[0] += r[0];
    store(static_cast<T*>(p.y.data) + m * p.y.stride + n, y);
  }
}

template <class T, bool NORM, int DEPTH> cudaError_t launch(const LinearFewParams& p, cudaStream_t stream) {
  int processors = 0;
  if (const cudaError_t error = multiprocessors(&processors)) return error;
  const size_t smem = shared_bytes<T>(p);
  if (const cudaError_t error = allow_smem(linear_few_kernel<T, NORM, DEPTH>, smem)) return error;
  const i64 tiles = ceil_div(p.N, kOutputs), most = i64(processors) * blocks_at_once(DEPTH);
  const dim3 grid(unsigned(tiles < most ? tiles : most));
  return launch_early<linear_few_kernel<T, NORM, DEPTH>>(grid, dim3(kThreads), smem, stream, p, int(tiles));
}

template <class T, bool NORM> cudaError_t launch(const LinearFewParams& p, cudaStream_t stream) {
  // as many steps on their way as a warp has, where registers can hold them
  return p.norm.C <= 4 * kWarps * kStep ? launch<T, NORM, 4>(p, stream) : launch<T, NORM, 12>(p, stream);
}

template <class T> cudaError_t launch(const LinearFewParams& p, cudaStream_t stream) {
  return p.kind == NormKind::none ? launch<T, false>(p, stream) : launch<T, true>(p, stream);
}

}  // namespace

cudaError_t linear_few(const LinearFewParams& p, cudaStream_t stream) {
  if (!p.norm.R || !p.N) return cudaSuccess;
  return p.norm.x.dtype == DType::f16 ? launch<__half>(p, stream) : launch<bf16>(p, stream);
}

}  // namespace gptfast::cuda
