// causal_attention as the bindings see it; semantics: see gptfast/ops/causal_attention.py. Conventions as
// in kernels.h: device pointers, strides in elements, a contiguous last dimension.
#pragma once
#include "kernels.h"

namespace gptfast::cuda {

// int32 or int64 values on the device; data == nullptr when absent. Kernels clamp what they read to the sizes of the
// tensors: nobody waits for the GPU to check them.
struct Lengths {
  const void* data;
  bool wide;
};

struct AttentionParams {
  int B, H, T, S, D;
  int group;        // query heads of a key head: query head h reads key head h / group
  DType dtype;      // of q, k, v, out and their gradients
  Heads q, k, v;    // (B, H, T, D), (B, H / group, S, D)
  Heads out, dout;  // (B, H, T, D), backward only
  MutHeads y;       // (B, H, T, D): the output, forward only
  MutHeads dq, dk, dv;
  float *shift, *level;  // (B, H, T), written by forward: weights are exp2(scale log2(e) (q k^T - shift) - level)
  float* delta;          // (B, H, T), backward only: sum over d of out * dout
  float* partial;        // forward: room for causal_attention_partial(p) values
  Lengths left_pad;      // (B)
  Lengths seq_lens;      // (B)
  Lengths cu_seqlens;    // (documents + 1)
  int documents;
  int window;  // 0: none
  bool causal;
  bool whole_chunks;  // rows of all tensors are whole, aligned chunks of 16 bytes; set by the launchers
  float scale;        // >= 0
  float softcap;      // 0: none; else scores are softcap tanh(scale / softcap q k^T), without softcap in what is summed
  const float* sinks;  // (H) or nullptr: a logit of each query head
  float* dsinks;       // (H), backward with sinks
  Dropout dropout;
};

// Values of fp32 scratch memory that the forward needs: 0 unless keys are split among blocks (decode_attention).
i64 causal_attention_partial(const AttentionParams&);
cudaError_t causal_attention_fwd(AttentionParams, cudaStream_t);
cudaError_t causal_attention_bwd(AttentionParams, cudaStream_t);
// The forward by the kernels that sum scores as the backward does; decode_attention has an order of its own, and where scores
// are large the weights show it.
cudaError_t causal_attention_fwd_tiles(AttentionParams, cudaStream_t);

// Parts of the forward, each for the calls that it takes on. Those for Hopper return kMapRefused where the driver makes no
// TMA map of a tensor; the ones for sm_80 then do all of it.
constexpr cudaError_t kMapRefused = cudaErrorNotSupported;
cudaError_t causal_attention_fwd_sm80(const AttentionParams&, cudaStream_t);  // all
cudaError_t causal_attention_bwd_sm80(const AttentionParams&, cudaStream_t);  // all
bool causal_attention_fwd_sm90_takes(const AttentionParams&);
cudaError_t causal_attention_fwd_sm90(const AttentionParams&, cudaStream_t);
cudaError_t causal_attention_dsinks(const AttentionParams&, cudaStream_t);  // of the backward, from p.delta
cudaError_t causal_attention_delta(const AttentionParams&, cudaStream_t);   // fills p.delta, for dsinks and for sm_80
bool causal_attention_bwd_sm90_takes(const AttentionParams&);
cudaError_t causal_attention_bwd_sm90(const AttentionParams&, cudaStream_t);

}  // namespace gptfast::cuda
