// One of the engine's kernels for one instruction set, as csrc/cpu/kernel_unit.cpp has those of the ops.
#ifndef GPTFAST_VECTORS
#define GPTFAST_VECTORS GPTFAST_ISA
#endif
#include "../cpu/kernel_prelude.h"
#include "kernels.h"

#define QUOTED(file) #file
// clang-format off
#define HEADER(kernel) QUOTED(kernel-inl.h)
// clang-format on
#define FILL(kernel) NAMED(kernel)
#define NAMED(kernel) fill_##kernel

namespace gptfast::engine::GPTFAST_ISA {
namespace {
using namespace gptfast::cpu;
using namespace gptfast::cpu::GPTFAST_VECTORS;
#include HEADER(GPTFAST_KERNEL)
}  // namespace

void FILL(GPTFAST_KERNEL)(Kernels&);
void FILL(GPTFAST_KERNEL)(Kernels& k) { fill(k); }

}  // namespace gptfast::engine::GPTFAST_ISA
