// causal_attention: the kernel that a call runs.
#include "causal_attention.h"

#include "common.cuh"
#include "decode_attention.h"

namespace gptfast::cuda {
namespace {

// Are all rows of x whole chunks of 16 bytes at aligned addresses?
template <class H> bool whole_chunks(const AttentionParams& p, const H& x) {
  const i64 bytes = (p.D | x.sb | x.sh | x.st) * element_size(p.dtype);
  return !x.data || (bytes | i64(reinterpret_cast<uintptr_t>(x.data))) % 16 == 0;
}
AttentionParams prepared(AttentionParams p) {
  p.whole_chunks = whole_chunks(p, p.q) && whole_chunks(p, p.k) && whole_chunks(p, p.v) && whole_chunks(p, p.out) &&
                   whole_chunks(p, p.dout) && whole_chunks(p, p.y) && whole_chunks(p, p.dq) && whole_chunks(p, p.dk) &&
                   whole_chunks(p, p.dv);
  return p;
}

// The kernels for Hopper have no soft cap: those for every GPU take such calls.
bool hopper_has_scores(const AttentionParams& p) { return p.softcap == 0.f; }

}  // namespace

i64 causal_attention_partial(const AttentionParams& p) {
  const int splits = decode_attention_splits(p);
  return splits > 1 ? split_partial(p, splits) + split_counters(p) : 0;
}
cudaError_t causal_attention_fwd(AttentionParams p, cudaStream_t stream) {
  if (!p.B || !p.H || !p.T) return cudaSuccess;
  const int splits = decode_attention_splits(p);
  if (!splits) return causal_attention_fwd_tiles(p, stream);
  unsigned* counters = nullptr;
  if (splits > 1) {
    counters = reinterpret_cast<unsigned*>(p.partial + split_partial(p, splits));
    const size_t bytes = size_t(split_counters(p)) * sizeof(unsigned);
    if (const cudaError_t error = cleared(cudaMemsetAsync(counters, 0, bytes, stream))) return error;
  }
  return decode_attention(prepared(p), {}, splits, counters, stream);
}
cudaError_t causal_attention_append(AttentionParams p, const NewPosition& next, unsigned* counters,
                                    cudaStream_t stream) {
  if (!p.B || !p.H) return cudaSuccess;
  p = prepared(p);
  p.whole_chunks = p.whole_chunks && whole_chunks(p, next.k) && whole_chunks(p, next.v);
  return decode_attention(p, next, append_splits(p), counters, stream);
}
cudaError_t causal_attention_fwd_tiles(AttentionParams p, cudaStream_t stream) {
  if (!p.B || !p.H || !p.T) return cudaSuccess;
  p = prepared(p);
  if (hopper_has_scores(p) && causal_attention_fwd_sm90_takes(p))
    if (const cudaError_t error = causal_attention_fwd_sm90(p, stream); error != kMapRefused) return error;
  return causal_attention_fwd_sm80(p, stream);
}
cudaError_t causal_attention_bwd(AttentionParams p, cudaStream_t stream) {
  if (!p.H) return cudaSuccess;
  p = prepared(p);
  if (p.dsinks) {
    if (const cudaError_t error = causal_attention_delta(p, stream)) return error;
    if (const cudaError_t error = causal_attention_dsinks(p, stream)) return error;
  }
  if (!p.B) return cudaSuccess;
  if (hopper_has_scores(p) && causal_attention_bwd_sm90_takes(p))
    if (const cudaError_t error = causal_attention_bwd_sm90(p, stream); error != kMapRefused) return error;
  if (!p.dsinks)
    if (const cudaError_t error = causal_attention_delta(p, stream)) return error;
  return causal_attention_bwd_sm80(p, stream);
}

}  // namespace gptfast::cuda
