// The body of every isa_*.cpp: all kernels, compiled with that file's flags into one table.
//
// An isa_*.cpp is compiled with its own -m flags (setup.py). To keep its instructions out of every other unit, nothing
// from the standard library is instantiated here and all code sits in an anonymous namespace; a test disassembles the
// shared object and fails on wide registers outside these namespaces.
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "kernels.h"

namespace gptfast::cpu::GPTFAST_ISA {
namespace {
#include "simd.h"

#include "sum_chunks-inl.h"

#include "peak-inl.h"

#include "gelu-inl.h"

#include "tile_product-inl.h"

#include "gemm-inl.h"

#include "attention_tile-inl.h"

#include "causal_attention_fwd-inl.h"

#include "causal_attention_bwd-inl.h"

#include "dropout-inl.h"

#include "layer_norm-inl.h"

#include "cross_entropy-inl.h"

#include "embedding-inl.h"

#include "sample-inl.h"
}  // namespace

extern const Kernels table;
const Kernels table = {
    GPTFAST_ISA_NAME,
    L,
    gelu_fwd,
    gelu_bwd,
    causal_attention_fwd,
    causal_attention_bwd,
    causal_attention_bwd_sum,
    dropout,
    dropout_mask,
    layer_norm_fwd,
    layer_norm_bwd,
    cross_entropy_fwd,
    cross_entropy_bwd,
    embedding_fwd,
    embedding_bwd,
    sample,
    kPairs,
    gemm_pack,
    gemm,
    peak_flops,
    sum_chunks,
};

}  // namespace gptfast::cpu::GPTFAST_ISA
