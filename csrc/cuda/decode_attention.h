// Attention of few queries over keys that are split among blocks, and of a decoding step that appends to its cache.
// Conventions as in kernels.h.
#pragma once
#include "causal_attention.h"

namespace gptfast::cuda {

// The key and value of one new position a row, which a step attends to and stores: at seq_lens[b] of row b, where p.seq_lens
// (int64) says how many keys there were. Of a row where that lies outside of [0, S) nothing is stored, nor attended to.
struct NewPosition {
  Heads k, v;             // (B, H / group, 1, D); k.data is null where there is no new position
  MutHeads keys, values;  // what p.k and p.v read
  bool cache_ready;       // no kernel that may still run writes these, nor p.seq_lens
};

int decode_attention_splits(const AttentionParams&);  // of causal_attention_fwd; 0: not taken
int append_splits(const AttentionParams&);            // of causal_attention_append
// Of splits > 1: values of fp32 for p.partial, and zeros that a launch leaves as zeros.
i64 split_partial(const AttentionParams&, int splits);
i64 split_counters(const AttentionParams&);

// Both of T few; `counters` are split_counters(p) of them, and null for one split. p.shift may be null.
cudaError_t decode_attention(const AttentionParams&, const NewPosition&, int splits, unsigned* counters, cudaStream_t);
cudaError_t causal_attention_append(AttentionParams, const NewPosition&, unsigned* counters, cudaStream_t);

}  // namespace gptfast::cuda
