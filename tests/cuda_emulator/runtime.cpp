// The CUDA runtime calls that launchers and bindings make, and the switches that tests turn. Compiled with the
// emulator, linked in place of libcudart.
#include <cuda_runtime_api.h>

namespace {
constexpr int kSmemOptin = 227 << 10;  // of an H100; gptfast_emu_configure can play a smaller GPU
int smem_optin = kSmemOptin;
}  // namespace

extern "C" {

cudaError_t cudaGetLastError() { return cudaSuccess; }
cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int bytes) {
  return bytes <= smem_optin ? cudaSuccess : cudaErrorInvalidValue;
}
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, const void*) { return cudaSuccess; }
cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = smem_optin; return cudaSuccess;
    case cudaDevAttrMultiProcessorCount: *value = 4; return cudaSuccess;
    case cudaDevAttrComputeCapabilityMajor: *value = 9; return cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor: *value = 0; return cudaSuccess;
    default: return cudaErrorInvalidValue;
  }
}
const char* cudaGetErrorString(cudaError_t error) { return error == cudaSuccess ? "no error" : "an emulated error"; }

// order: 0 forward, 1 reverse, 2 random. smem: bytes of shared memory that a block may ask for; 0: an H100's.
__attribute__((visibility("default"))) void gptfast_emu_configure(int order, unsigned seed, int lazy_copies, int lazy_mma,
                                                                  int smem) {
  emu::opt().order = order, emu::opt().seed = seed;
  emu::opt().lazy = lazy_copies != 0, emu::opt().lazy_mma = lazy_mma != 0;
  smem_optin = smem ? smem : kSmemOptin;
}
}
