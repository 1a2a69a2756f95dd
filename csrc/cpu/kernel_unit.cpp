// One kernel for one instruction set: setup.py compiles this file once for each pair, with GPTFAST_KERNEL=gelu_fwd,
// GPTFAST_ISA=isa_avx2 and that instruction set's own -m flags. The kernel's -inl.h ends with fill(), which puts its
// functions into the table.
//
// To keep the instructions out of every other unit, nothing from the standard library is instantiated here and all code
// sits in an anonymous namespace; a test disassembles the shared objects and fails on wide registers outside of isa_*.
#ifndef GPTFAST_VECTORS
#define GPTFAST_VECTORS GPTFAST_ISA
#endif
#include "kernel_prelude.h"

#define QUOTED(file) #file
// clang-format off
#define HEADER(kernel) QUOTED(kernel-inl.h)
// clang-format on
#define FILL(kernel) NAMED(kernel)
#define NAMED(kernel) fill_##kernel

namespace gptfast::cpu::GPTFAST_ISA {
namespace {
using namespace GPTFAST_VECTORS;
[[maybe_unused]] Kernels base;  // the table that an instruction set of some kernels adds to: what is_left_to_base
#include HEADER(GPTFAST_KERNEL)
}  // namespace

void FILL(GPTFAST_KERNEL)(Kernels&);
void FILL(GPTFAST_KERNEL)(Kernels& k) {
  if constexpr (kOnlyBf16) base = k;
  fill(k);
}

}  // namespace gptfast::cpu::GPTFAST_ISA
