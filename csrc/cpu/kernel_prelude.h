// What every kernel of an instruction set reads before its own code. The build compiles it once for each of them, where the
// compiler is g++; else each unit reads it.
#ifndef GPTFAST_KERNEL_PRELUDE
#define GPTFAST_KERNEL_PRELUDE
#include "intrinsics.h"
#include "kernels.h"

namespace gptfast::cpu::GPTFAST_ISA {
namespace {
#include "simd.h"
}  // namespace
}  // namespace gptfast::cpu::GPTFAST_ISA
#endif
