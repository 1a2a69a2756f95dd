// As csrc/cpu/kernel_prelude.h, for the engine's kernels.
#ifndef GPTFAST_KERNEL_PRELUDE
#define GPTFAST_KERNEL_PRELUDE
#include "../cpu/intrinsics.h"
#include "kernels.h"

namespace gptfast::engine::GPTFAST_ISA {
namespace {
using namespace gptfast::cpu;
#include "../cpu/simd.h"
}  // namespace
}  // namespace gptfast::engine::GPTFAST_ISA
#endif
