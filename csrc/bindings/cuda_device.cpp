// Whether the kernels of this library run on the GPUs that torch sees: asked once, when the library is loaded.
#include "cuda_common.h"

namespace gptfast::cuda {
namespace {

// "" when device `index` can run them, else why not.
std::string unavailable_reason(i64 index) {
  GPTFAST_CHECK(index >= 0 && index <= INT32_MAX, "cuda_unavailable_reason: there is no GPU number ", index);
  cudaDeviceProp device;
  if (const cudaError_t error = cleared(cudaGetDeviceProperties(&device, int(index))); error != cudaSuccess)
    return cudaGetErrorString(error);
  if (device.major < 8)
    return std::string(device.name) + " has compute capability " + std::to_string(device.major) + "." +
           std::to_string(device.minor) + "; the kernels need 8.0 or newer";
  const torch::stable::accelerator::DeviceGuard guard{int32_t(index)};
  const cudaError_t error = probe();
  return error == cudaSuccess ? "" : cudaGetErrorString(error);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(gptfast, CompositeExplicitAutograd, m) {
  m.impl("cuda_unavailable_reason", GPTFAST_BOX(&unavailable_reason));
}

}  // namespace gptfast::cuda
