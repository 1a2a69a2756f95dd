// Kernels of a stream that overlap: one starts while the last blocks of the one before still run (programmatic dependent
// launch, from capability 9.0 on). Its start, and its loads of what no kernel writes, then take no time of their own.
//
// Two rules make this safe. Every thread waits before it touches memory that an earlier kernel may write, and before it writes
// any itself. And a kernel lets the next one start only after its own wait: whoever has waited thus knows that all kernels
// before it have ended, not the last one alone.
#pragma once
#include <cstdlib>

#include "common.cuh"

namespace gptfast::cuda {

#if defined(CUDA_EMU) || (defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900)
#define GPTFAST_OVERLAP 1  // this pass compiles for GPUs whose kernels can overlap
constexpr bool kOverlaps = true;
#else
constexpr bool kOverlaps = false;
#endif

#if !defined(CUDA_EMU)
// Until all earlier kernels of the stream have ended and what they wrote can be read. At once in a kernel that was launched
// as usual.
DEV_INLINE void wait_for_earlier_kernels() {
#if defined(GPTFAST_OVERLAP)
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
// The next kernel may start when all blocks have come here. It still waits for the end of this one.
DEV_INLINE void let_next_kernel_start() {
#if defined(GPTFAST_OVERLAP)
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Whether the code of a kernel for the current GPU has a wait in it, and the driver takes such launches into CUDA graphs.
template <auto KERNEL> bool can_overlap() {
  static KernelFact waits;
  constexpr int kCaptures = 12030;  // CUDA 12.3
  const char* wanted = std::getenv("GPTFAST_CUDA_OVERLAP");
  if (wanted && wanted[0] == '0') return false;
  return waits.holds(reinterpret_cast<const void*>(KERNEL), [](const cudaFuncAttributes& code) {
    int driver = 0;
    return code.ptxVersion >= 90 && cleared(cudaDriverGetVersion(&driver)) == cudaSuccess && driver >= kCaptures;
  });
}

// Launches a kernel that follows the two rules, before the one before it has ended where that can be.
template <auto KERNEL, class... A>
cudaError_t launch_early(dim3 grid, dim3 block, size_t smem, cudaStream_t stream, const A&... arguments) {
  cudaLaunchAttribute early{};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid, config.blockDim = block, config.dynamicSmemBytes = smem, config.stream = stream;
  config.attrs = &early, config.numAttrs = can_overlap<KERNEL>() ? 1 : 0;
  return cleared(cudaLaunchKernelEx(&config, KERNEL, arguments...));
}
#else
inline void wait_for_earlier_kernels(int line = __builtin_LINE()) { emu::wait_for_earlier_kernels(line); }
inline void let_next_kernel_start(int line = __builtin_LINE()) { emu::let_next_kernel_start(line); }
template <auto KERNEL, class... A>
cudaError_t launch_early(dim3 grid, dim3 block, size_t smem, cudaStream_t, const A&... arguments) {
  emu::launch_early(KERNEL, grid, block, smem, arguments...);
  return cudaSuccess;
}
#endif

}  // namespace gptfast::cuda
