// What every kernel of an instruction set, here and in csrc/engine, reads before its own code. The build compiles it once for
// each set of vectors, where the compiler is g++; else each unit reads it. An instruction set that adds none to another's vectors has
// that one's: GPTFAST_VECTORS=isa_avx512_bf16 of amx. What g++ precompiles must not name what differs.
#ifndef GPTFAST_KERNEL_PRELUDE
#define GPTFAST_KERNEL_PRELUDE
#include "intrinsics.h"
#include "kernels.h"

namespace gptfast::cpu::GPTFAST_VECTORS {
namespace {
#include "simd.h"
}  // namespace
}  // namespace gptfast::cpu::GPTFAST_VECTORS
#endif
