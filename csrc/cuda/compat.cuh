// The spellings that nvcc and the emulator (tests/cuda_emulator, which is force-included) need differently. Everything
// else in a kernel is plain CUDA. Shared memory is always dynamic: only that is poisoned and checked for races.
#pragma once
#include <cstdint>
#if defined(CUDA_EMU)
#define DYN_SMEM(name) char* name = emu::dyn_smem<char>()
#define LAUNCH(kernel, grid, block, smem, stream, ...) \
  ((void)(stream), emu::launch(kernel, grid, block, smem, __VA_ARGS__))
#define DEV_INLINE inline
#define EXPECT_ALIGNED(pointer, bytes) emu::expect_aligned(pointer, bytes)
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define DYN_SMEM(name) extern __shared__ __align__(1024) char name[]
#define LAUNCH(kernel, grid, block, smem, stream, ...) kernel<<<grid, block, smem, stream>>>(__VA_ARGS__)
#define DEV_INLINE __device__ __forceinline__
#define EXPECT_ALIGNED(pointer, bytes)  // the GPU faults by itself
#endif
using bf16 = __nv_bfloat16;
using bf162 = __nv_bfloat162;
