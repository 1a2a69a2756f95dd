// sample with a block a row.
#include "sample_draw.cuh"

namespace gptfast::cuda {
namespace {

using namespace sampling;

template <class T> __global__ void __launch_bounds__(kThreads) sample_kernel(const SampleParams p, bool keep) {
  DYN_SMEM(smem);
  const i64 token = sample_row<T>(p, blockIdx.x, keep, Shared(smem));
  if (threadIdx.x == 0) p.out[blockIdx.x] = token;
}

}  // namespace

cudaError_t sample(const SampleParams& p, cudaStream_t stream) {
  if (!p.R) return cudaSuccess;
  if (p.V >= kMostTokens) return cudaErrorInvalidValue;
  int room = 0;
  if (const cudaError_t error = shared_memory(&room)) return error;
  return with_dtype(p.logits.dtype, [&](auto t) {
    using T = decltype(t);
    const int threads = round_to_warps(ceil_div(p.V, 8), kThreads);
    const size_t with_row = Shared::bytes(threads, size_t(p.V + 3) / 4 * 4 * sizeof(T));
    const bool keep = with_row <= size_t(room);
    const size_t bytes = keep ? with_row : Shared::bytes(threads, 0);
    auto kernel = sample_kernel<T>;
    if (const cudaError_t refused = allow_smem(kernel, bytes)) return refused;
    LAUNCH(kernel, dim3(unsigned(p.R)), dim3(threads), bytes, stream, p, keep);
    return cudaGetLastError();
  });
}

}  // namespace gptfast::cuda
