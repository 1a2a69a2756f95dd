// What the attention kernels for Hopper share on the host: which calls TMA can serve, and its maps.
#pragma once
#include "causal_attention_finite.cuh"
#include "causal_attention_softmax.cuh"
#include "causal_attention_tile.cuh"
#include "wgmma.cuh"

namespace gptfast::cuda {

// The number of the warp in the block, the same register in all its lanes as the compiler sees it: what is computed from it
// need not be moved to the uniform registers that wgmma takes its descriptors from.
DEV_INLINE int uniform(int x) { return __shfl_sync(kAllLanes, x, 0); }
DEV_INLINE int warp_number() { return uniform(int(threadIdx.x) / 32); }

// The block of rows and the matrix (of a batch and a head) of a thread block. `blocks` a matrix, of falling length, are dealt
// for `together` matrices at a time, the longest of all first: so they end together, and what they read stays in L2.
struct Place {
  int block, matrix;
};
DEV_INLINE Place place_of(int index, int blocks, int matrices, int together) {
  const int before = index / (blocks * together) * together, count = min(together, matrices - before);
  const int rest = index - before * blocks;
  return {rest / count, before + rest % count};
}
// As many matrices as read no more than half of Hopper's L2, `bytes` a matrix; `group` of them read the same.
inline int matrices_together(int matrices, int group, i64 bytes) {
  const i64 fit = (i64(25) << 20) / (bytes < 1 ? 1 : bytes) * group;
  return int(fit < group ? group : fit < matrices ? fit : matrices);
}

// The tasks of a kernel: `blocks` of rows of `matrices`, as place_of deals them. Where rows are few, so that a task is short beside
// its first loads, the blocks of the kernel stay, one on each multiprocessor, and take one task after another. Elsewhere each
// task has a block of its own, which goes to whichever multiprocessor is free: that balances long ones better.
struct Schedule {
  int blocks, matrices, together;
  float scale_log2;  // the kernel would keep it in a register
  unsigned grid;
};
constexpr int kFewRows = 2048;
inline cudaError_t schedule_of(Schedule* schedule, const AttentionParams& p, int rows, int height, int matrices,
                               int group, i64 bytes) {
  const int blocks = int(ceil_div(rows, height));
  const i64 tasks = i64(blocks) * matrices;
  const float scale_log2 = (p.scale > 1e-30f ? p.scale : 1e-30f) * kLog2e;  // as scale_log2_of
  *schedule = {blocks, matrices, matrices_together(matrices, group, bytes), scale_log2, unsigned(tasks)};
  if (rows > kFewRows) return cudaSuccess;
  int device = 0, processors = 0;
  cudaError_t error = cleared(cudaGetDevice(&device));
  if (error == cudaSuccess)
    error = cleared(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device));
  schedule->together = matrices;
  if (tasks > processors) schedule->grid = unsigned(processors);
  return error;
}
// The task of a block in its turn: there and back over the blocks, so that the longest of one turn gets the shortest of the next.
DEV_INLINE int task_number(int turn) {
  const int count = int(gridDim.x), mine = int(blockIdx.x);
  return turn * count + (turn % 2 ? count - 1 - mine : mine);
}

// Does a thread, number `thread` of THREADS, find nan or inf in its part of BYTES of shared memory? For warps of few registers.
template <class E, int BYTES, int THREADS> DEV_INLINE bool holds_nonfinite(const char* data, int thread) {
  uint32_t found = 0;
#pragma unroll 2
  for (int c = thread; c < BYTES / 16; c += THREADS) {
    const uint4 x = *reinterpret_cast<const uint4*>(data + c * 16);
    found |= nonfinite_bits<E>(x.x) | nonfinite_bits<E>(x.y) | nonfinite_bits<E>(x.z) | nonfinite_bits<E>(x.w);
  }
  return found != 0;
}

// x (B, heads, rows, D) as a map of tiles of 64 columns and `tile_rows` rows; a dimension of one element has no stride to
// speak of.
template <class H>
bool map_of(CUtensorMap* map, const AttentionParams& p, const H& x, int heads, int rows, int tile_rows) {
  const uint64_t row = uint64_t(p.D) * 2;
  auto stride = [&](i64 elements, int size) { return size == 1 ? row : uint64_t(elements) * 2; };
  const TensorShape shape{x.data,
                          {uint64_t(p.D), uint64_t(rows), uint64_t(heads), uint64_t(p.B)},
                          {stride(x.st, rows), stride(x.sh, heads), stride(x.sb, p.B)},
                          p.dtype};
  return tensor_map(map, shape, uint32_t(tile_rows));
}
// TMA has no stride 0, as of expanded tensors.
inline bool has_map(const AttentionParams& p, const Heads& x, int heads, int rows) {
  auto fits = [](i64 stride, i64 size) { return size == 1 || (stride > 0 && stride < i64(1) << 39); };
  return fits(x.st, rows) && fits(x.sh, heads) && fits(x.sb, p.B);
}
// 16 bits, and a head dim of at most 128. The kernels are for 64 and 128: TMA loads zeros past the last column, and does not
// store what lies there.
inline bool has_hopper_shape(const AttentionParams& p) {
  return p.dtype != DType::f32 && p.D <= 128 && p.whole_chunks && p.T && p.S;
}

// The GPUs that can run a kernel: of Hopper, with so much shared memory a block, and with a body in the code that this
// library has for them. Where that was compiled for 9.0 without the "a", or from older PTX, it has none (HOPPER_BOUNDS).
class HopperGpus {
 public:
  template <class... P>
  HopperGpus(void (*kernel)(P...), int threads, int smem)
      : kernel_(reinterpret_cast<const void*>(kernel)), threads_(threads), smem_(smem) {}

  bool has_current() {
    int device = 0, major = 0, most = 0;
    return cleared(cudaGetDevice(&device)) == cudaSuccess &&
           cleared(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device)) == cudaSuccess &&
           major == 9 &&
           cleared(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device)) == cudaSuccess &&
           most >= smem_ && has_body_.holds(kernel_, [&](const cudaFuncAttributes& code) {
             return code.maxThreadsPerBlock >= threads_;
           });
  }

 private:
  const void* kernel_;
  int threads_, smem_;
  KernelFact has_body_;
};

}  // namespace gptfast::cuda
