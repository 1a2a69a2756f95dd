// The body of every isa_*.cpp here: the engine's kernels, compiled with that file's flags into one table. As in
// csrc/cpu/isa.h nothing of the standard library is instantiated, and all code sits in an anonymous namespace.
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "kernels.h"

namespace gptfast::engine::GPTFAST_ISA {
namespace {
using namespace gptfast::cpu;
#include "../cpu/simd.h"

#pragma GCC diagnostic ignored "-Wunused-function"  // of gelu only the value is needed here
#include "../cpu/gelu-inl.h"

#include "../cpu/sample-inl.h"

#include "dot-inl.h"

#include "product-inl.h"

#include "activation-inl.h"

#include "rows-inl.h"

#include "attention-inl.h"

#include "checksum-inl.h"
}  // namespace

extern const Kernels table;
const Kernels table = {GPTFAST_ISA_NAME, kPairs, prepare, product, finish,  layer_norm, embed,
                       store_kv,         attend, sample,  read,    checksum};

}  // namespace gptfast::engine::GPTFAST_ISA
