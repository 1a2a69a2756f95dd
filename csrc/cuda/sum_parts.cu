// out[c] = sum_k partial[k][c]: the second stage of every sum over rows. A block has 32 columns; 32 threads share each
// column, every thread adds its parts in order, and the 32 sums are added in order. Floor: one read of the partial sums.
#include "common.cuh"

namespace gptfast::cuda {
namespace {

constexpr int kLanes = 32;

__global__ void __launch_bounds__(32 * kLanes) sum_parts_kernel(const PartialSums p, const PartialSums second) {
  DYN_SMEM(smem);
  float (*sums)[33] = reinterpret_cast<float (*)[33]>(smem);  // 33: a column's values lie in different banks
  const i64 c = i64(blockIdx.x) * 32 + threadIdx.x;
  const float* partial = blockIdx.y ? second.partial : p.partial;
  float sum = 0.f;
  if (c < p.C) {
#pragma unroll 8
    for (i64 k = threadIdx.y; k < p.parts; k += kLanes) sum += partial[k * p.C + c];
  }
  sums[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y || c >= p.C) return;
  float total[1] = {0.f};
#pragma unroll
  for (int y = 0; y < kLanes; y++) total[0] += sums[y][threadIdx.x];
  if (blockIdx.y) store_any<1>(second.out, second.dtype, c, total);
  else store_any<1>(p.out, p.dtype, c, total);
}

}  // namespace

cudaError_t sum_parts(const PartialSums& p, const PartialSums& second, cudaStream_t stream) {
  if (!p.C) return cudaSuccess;
  const dim3 grid(unsigned(ceil_div(p.C, 32)), second.partial ? 2 : 1);
  LAUNCH(sum_parts_kernel, grid, dim3(32, kLanes), sizeof(float) * 33 * kLanes, stream, p, second);
  return cudaGetLastError();
}

}  // namespace gptfast::cuda
