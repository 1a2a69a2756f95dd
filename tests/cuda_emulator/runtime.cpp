// The CUDA runtime calls that launchers and bindings make, and the switches that tests turn. Compiled with the
// emulator, linked in place of libcudart.
#include <cuda_runtime_api.h>

#include <utility>

namespace {
constexpr int kSmemOptin = 227 << 10;  // of an H100; gptfast_emu_configure can play a smaller GPU
int smem_optin = kSmemOptin, smem_asked = 0;
thread_local cudaError_t last_error = cudaSuccess;
cudaError_t refused(cudaError_t error) { return last_error = error; }
}  // namespace

extern "C" {

cudaError_t cudaGetLastError() { return std::exchange(last_error, cudaSuccess); }
cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t) {
  memset(to, value, bytes);
  return cudaSuccess;
}
cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int bytes) {
  smem_asked = bytes;
  return bytes <= smem_optin ? cudaSuccess : refused(cudaErrorInvalidValue);
}
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  attributes->maxThreadsPerBlock = emu::opt().hopper_code ? 1024 : 32;  // as HOPPER_BOUNDS says
  return cudaSuccess;
}
cudaError_t cudaGetDevice(int* device) {
  *device = emu::opt().hopper_code ? 0 : 1;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = smem_optin; return cudaSuccess;
    case cudaDevAttrMultiProcessorCount: *value = 4; return cudaSuccess;
    case cudaDevAttrComputeCapabilityMajor: *value = 9; return cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor: *value = 0; return cudaSuccess;
    default: return refused(cudaErrorInvalidValue);
  }
}
const char* cudaGetErrorString(cudaError_t error) { return error == cudaSuccess ? "no error" : "an emulated error"; }

// order: 0 forward, 1 reverse, 2 random. smem: bytes of shared memory that a block may ask for; 0: an H100's.
__attribute__((visibility("default"))) void gptfast_emu_configure(int order, unsigned seed, int lazy_copies,
                                                                  int lazy_mma, int smem) {
  emu::opt().order = order, emu::opt().seed = seed;
  emu::opt().lazy = lazy_copies != 0, emu::opt().lazy_mma = lazy_mma != 0;
  smem_optin = smem ? smem : kSmemOptin;
}
// Another GPU: one for which the library has no code of sm_90a (hopper_code 0), or whose driver makes no TMA maps.
__attribute__((visibility("default"))) void gptfast_emu_play(int hopper_code, int maps) {
  emu::opt().hopper_code = hopper_code != 0, emu::opt().maps = maps != 0;
}
// What the kernels before write no sooner than a kernel that starts early waits for them; bytes 0: nothing any more.
__attribute__((visibility("default"))) void gptfast_emu_late(void* data, size_t bytes) {
  if (bytes) emu::opt().late.push_back({static_cast<char*>(data), bytes});
  else emu::opt().late.clear();
}
__attribute__((visibility("default"))) int gptfast_emu_shared_memory() { return smem_asked; }
}
