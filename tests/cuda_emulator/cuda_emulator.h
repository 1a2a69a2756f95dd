// Runs CUDA kernels on the CPU (C++20, g++, x86-64): one fiber per CUDA thread, one block at a time per OS thread.
// Force-include it into a .cu file, which then compiles as C++; see README.md.
//
//     g++ -std=c++20 -fno-strict-aliasing -x c++ -include cuda_emulator.h -I$CUDA_HOME/include kernel.cu
//
// Environment, read once (or emu::opt()):
//   EMU_ORDER=fwd|rev|rand   order in which warps and lanes run between synchronisations; EMU_SEED=n for rand
//   EMU_COPY=lazy|eager      asynchronous copies happen as late as they may, or at once
//   EMU_MMA=lazy|eager       the same for wgmma
//   EMU_POISON=0|1           fill shared memory with NaN bits before every block
//   EMU_THREADS=n            OS threads that share the blocks of a launch
#ifndef GPTFAST_CUDA_EMULATOR_H  // #pragma once means nothing in a header that is compiled by itself
#define GPTFAST_CUDA_EMULATOR_H
#define CUDA_EMU 1
#include <cuda_runtime.h>  // vector types, dim3, cudaError_t: plain g++ sees the toolkit's host half
#include <cuda_bf16.h>
#include <cuda_fp16.h>

// Everything of the standard library comes before the words of CUDA are redefined: it uses some of them itself.
#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <thread>
#include <tuple>
#include <type_traits>
#include <vector>

#undef __global__
#undef __device__
#undef __host__
#undef __shared__
#undef __constant__
#undef __launch_bounds__
#undef __grid_constant__
#undef __forceinline__
#undef __noinline__
#define __global__
#define __device__
#define __host__
#define __constant__
#define __launch_bounds__(...)
#define __grid_constant__
#define __forceinline__ inline __attribute__((always_inline))
#if defined(__SANITIZE_ADDRESS__)  // plain static variables get redzones; run with one OS thread
#define __shared__ static
#else
#define __shared__ static thread_local
#endif

#if defined(EMU_RACECHECK)
#include "racecheck.h"
#define EMU_RACE(...) __VA_ARGS__
#else
#define EMU_RACE(...)
#endif

#include "fibers.h"
#include "collectives.h"
#include "launch.h"
#include "intrinsics.h"
#endif
