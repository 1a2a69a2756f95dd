// The CUDA kernels as the rest of the project sees them: launchers. Their parameters are in ../params.h, those of attention
// in causal_attention.h. Nothing here or below knows of torch. A launcher checks nothing, allocates nothing and returns what
// the launch returned; it does not wait.
//
// On GPUs of one architecture results depend on the shapes alone, not on the order in which blocks run nor on how many run
// at once. From one architecture to another the last bits of attention may differ: tiles have other sizes, and mma and
// wgmma round partial sums differently.
#pragma once
#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "../params.h"

namespace gptfast::cuda {

// Kernels that sum over rows leave one row of partial sums for each of parts_of(R) parts; sum_parts adds them in order.
inline i64 parts_of(i64 R) {
  const i64 parts = (R + 7) / 8;  // eight rows a part, until there are enough parts to fill a large GPU
  return parts < 1 ? 1 : parts > 1024 ? 1024 : parts;
}
// The same of layer_norm and rms_norm, whose blocks take many rows each: two of them for each of the 132 processors of an H100.
inline i64 norm_parts_of(i64 R) {
  const i64 parts = (R + 7) / 8;
  return parts < 1 ? 1 : parts > 264 ? 264 : parts;
}
// Two sums of as many parts and columns in one launch; the partial sums of the second may be null.
cudaError_t sum_parts(const PartialSums&, const PartialSums& second, cudaStream_t);

// Whether the current device can run the kernels of this library.
cudaError_t probe();

// What a call of the runtime has returned. The runtime also keeps an error until it is asked for the last one: a refusal
// that stays there would be reported by the next launch, which is healthy.
inline cudaError_t cleared(cudaError_t error) {
  if (error != cudaSuccess) (void)cudaGetLastError();
  return error;
}

cudaError_t gelu_fwd(const GeluParams&, cudaStream_t);
cudaError_t gelu_bwd(const GeluParams&, cudaStream_t);
cudaError_t relu_squared_fwd(const ReluSquaredParams&, cudaStream_t);
cudaError_t relu_squared_bwd(const ReluSquaredParams&, cudaStream_t);
cudaError_t swiglu_fwd(const SwigluParams&, cudaStream_t);
cudaError_t swiglu_bwd(const SwigluParams&, cudaStream_t);
cudaError_t dropout(const DropoutRowsParams&, cudaStream_t);
cudaError_t layer_norm_fwd(const LayerNormParams&, cudaStream_t);
cudaError_t layer_norm_bwd(const LayerNormParams&, cudaStream_t);
cudaError_t rms_norm_fwd(const LayerNormParams&, cudaStream_t);
cudaError_t rms_norm_bwd(const LayerNormParams&, cudaStream_t);
// A token whose position is not one of the `rows` of the tables becomes nan.
cudaError_t rotary(const RotaryParams&, i64 rows, cudaStream_t);
cudaError_t cross_entropy_fwd(const CrossEntropyParams&, cudaStream_t);
cudaError_t cross_entropy_bwd(const CrossEntropyParams&, cudaStream_t);
// Forward and backward in one launch: the row is in cache when its gradient takes its place.
cudaError_t cross_entropy_in_place(const CrossEntropyParams&, cudaStream_t);
cudaError_t sample(const SampleParams&, cudaStream_t);
cudaError_t embedding_fwd(const EmbeddingParams&, cudaStream_t);

// Equal keys of one segment are summed at once, in order, and then the sums of segments. pieces is (2 * segments, C), filled
// where a run of keys goes from one into the next; null for one segment.
constexpr i64 kEmbeddingSegment = 256;
cudaError_t embedding_bwd(const EmbeddingBwdParams&, float* pieces, cudaStream_t);

}  // namespace gptfast::cuda
