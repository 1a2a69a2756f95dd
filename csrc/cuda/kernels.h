// The CUDA kernels as the rest of the project sees them: parameter structs and launchers. Nothing here or below knows of
// torch. A launcher checks nothing, allocates nothing and returns what the launch returned; it does not wait.
//
// Conventions: pointers are device pointers; strides are in elements; the last dimension is contiguous; `dtype` is the
// type behind a void pointer. On GPUs of one architecture results depend on the shapes alone, not on the order in which
// blocks run nor on how many run at once. From one architecture to another the last bits of attention may differ: tiles
// have other sizes, and mma and wgmma round partial sums differently.
#pragma once
#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

namespace gptfast::cuda {

using i64 = int64_t;

enum class DType : int { f32 = 0, bf16 = 1, f16 = 2 };

// A matrix of rows: element (i, c) lies at data + i * stride + c.
struct Rows {
  const void* data;
  i64 stride;
  DType dtype;
};
struct MutRows {
  void* data;
  i64 stride;
  DType dtype;
};
// A vector such as a bias; data == nullptr when absent.
struct Vector {
  const void* data;
  DType dtype;
};

struct Dropout {
  uint64_t seed;
  uint32_t offset, threshold;        // in 1/65536; 0: none; 65536: everything
  uint32_t first_row, first_matrix;  // what row 0 and matrix 0 are in the whole batch
};

// Kernels that sum over rows leave one row of partial sums for each of parts_of(R) parts; sum_parts adds them in order.
inline i64 parts_of(i64 R) {
  const i64 parts = (R + 7) / 8;  // eight rows a part, until there are enough parts to fill a large GPU
  return parts < 1 ? 1 : parts > 1024 ? 1024 : parts;
}
// The same of layer_norm, whose blocks take many rows each: two of them for each of the 132 processors of an H100.
inline i64 norm_parts_of(i64 R) {
  const i64 parts = (R + 7) / 8;
  return parts < 1 ? 1 : parts > 264 ? 264 : parts;
}
struct SumPartsParams {
  const float* partial;  // (parts, C)
  i64 parts, C;
  void* out;  // (C)
  DType dtype;
  const float* second_partial;  // the same again, in one launch; or null
  void* second_out;
  DType second_dtype;
};
cudaError_t sum_parts(const SumPartsParams&, cudaStream_t);

// Whether the current device can run the kernels of this library.
cudaError_t probe();

// What a call of the runtime has returned. The runtime also keeps an error until it is asked for the last one: a refusal
// that stays there would be reported by the next launch, which is healthy.
inline cudaError_t cleared(cudaError_t error) {
  if (error != cudaSuccess) (void)cudaGetLastError();
  return error;
}

struct GeluParams {
  Rows x;        // (R, C)
  Vector bias;   // (C)
  Rows dout;     // (R, C), backward only
  MutRows out;   // (R, C): y, or dx in backward
  float* dbias;  // (parts_of(R), C) partial sums, backward with bias only
  i64 R, C;
  i64 tail;   // columns of the last row (C unless a flat buffer was cut into rows)
  bool tanh;  // tanh approximation or erf
};
cudaError_t gelu_fwd(const GeluParams&, cudaStream_t);
cudaError_t gelu_bwd(const GeluParams&, cudaStream_t);

struct DropoutRowsParams {
  Rows x;
  MutRows y;  // of x's dtype
  i64 R, C;
  Dropout dropout;
};
cudaError_t dropout(const DropoutRowsParams&, cudaStream_t);

// layer_norm when residual.data is null, else add_layer_norm; the backward reads x as what was normalised. dtotal is of
// that dtype; y and its gradient dy may be of another.
struct LayerNormParams {
  Rows x, residual;  // (R, C)
  Vector weight, bias;
  MutRows total, y;
  Rows dy, dtotal;         // backward: either may be null
  MutRows dx, dresidual;   // backward: dx after dropout, dresidual before it; either may be null
  float *mean, *rstd;      // (2, R): the mean, and what its rounding left out; (R)
  float *dweight, *dbias;  // (norm_parts_of(R), C) partial sums; dbias may be null
  i64 R, C;
  float eps;
  Dropout dropout;
};
cudaError_t layer_norm_fwd(const LayerNormParams&, cudaStream_t);
cudaError_t layer_norm_bwd(const LayerNormParams&, cudaStream_t);

struct CrossEntropyParams {
  Rows logits;         // (R, V)
  const i64* targets;  // (R), in [0, V) or ignore_index; any other value makes the row's loss nan
  float* loss;         // (R)
  float* lse;          // (R, 2): the maximum m, and log sum exp(x - m); both 0 where ignored
  const float* dloss;  // (R) or null for ones, backward
  MutRows dlogits;     // (R, V) of the logits' dtype, backward; may be the logits themselves
  i64 R, V, ignore_index;
  float label_smoothing;
};
cudaError_t cross_entropy_fwd(const CrossEntropyParams&, cudaStream_t);
cudaError_t cross_entropy_bwd(const CrossEntropyParams&, cudaStream_t);
// Forward and backward in one launch: the row is in cache when its gradient takes its place.
cudaError_t cross_entropy_in_place(const CrossEntropyParams&, cudaStream_t);

struct SampleParams {
  Rows logits;                   // (R, V)
  const i64 *position, *stream;  // (R)
  i64* out;                      // (R): a token, -1 where the row holds nan, -2 where nothing but -inf
  i64 R, V, top_k;               // 0: all
  float temperature;
  double top_p;  // not rounded: 0.3 of ten equal tokens are three
  uint64_t seed;
};
cudaError_t sample(const SampleParams&, cudaStream_t);

// out[n] = wte[ids[n]] + wpe[positions[n]]; ids and positions outside their tables give nan.
struct EmbeddingParams {
  const i64 *ids, *positions;  // (N); positions may be null: n mod T
  Rows wte, wpe;               // (V, C), (P, C); wpe.data may be null
  MutRows out;                 // (N, C) of wte's dtype
  i64 N, T, V, P, C;
};
cudaError_t embedding_fwd(const EmbeddingParams&, cudaStream_t);

// dtable[keys[n]] += dout[order[n]], where keys is sorted and order is the permutation that sorted it. Equal keys of one
// segment are summed at once, in order, and then the sums of segments.
constexpr i64 kEmbeddingSegment = 256;
struct EmbeddingBwdParams {
  const i64 *keys, *order;  // (N)
  Rows dout;                // (N, C)
  MutRows dtable;           // (V, C), zeros on entry
  float* pieces;  // (2 * segments, C), filled where a run of keys goes from one into the next; null for one segment
  i64 N, V, C;
};
cudaError_t embedding_bwd(const EmbeddingBwdParams&, cudaStream_t);

}  // namespace gptfast::cuda
