// Asks the driver for a kernel of this library: it has one where the GPU can run what was compiled.
#include "common.cuh"

namespace gptfast::cuda {
namespace {

__global__ void nothing() {}

}  // namespace

cudaError_t probe() {
  cudaFuncAttributes attributes;
  return cleared(cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(nothing)));
}

}  // namespace gptfast::cuda
