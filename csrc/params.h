// The parameters of the ops that have a kernel on the CPU and one on CUDA. Nothing here knows of torch, of SIMD or of CUDA.
//
// Conventions: pointers are to memory of the device; strides are in elements; the last dimension is contiguous; `dtype` is
// the type behind a void pointer. A kernel on the CPU is given a range of rows beside them, one on CUDA takes them all.
#pragma once
#include <cstdint>

namespace gptfast {

using i64 = int64_t;

enum class DType : int { f32 = 0, bf16 = 1, f16 = 2 };
constexpr i64 element_size(DType t) { return t == DType::f32 ? 4 : 2; }

// A matrix of rows: element (i, c) lies at data + i * stride + c.
struct Rows {
  const void* data;
  i64 stride;
  DType dtype;
};
// non_temporal, on the CPU: write past the caches, for results that do not fit there; data and rows are then aligned to 64 bytes.
struct MutRows {
  void* data;
  i64 stride;
  DType dtype;
  bool non_temporal = false;
};
// A vector such as a bias; data == nullptr when absent.
struct Vector {
  const void* data;
  DType dtype;
};

// One head's worth of rows of q, k, v, … : element (b, h, t, d) lies at data + b * sb + h * sh + t * st + d.
struct Heads {
  const void* data;
  i64 sb, sh, st;
};
struct MutHeads {
  void* data;
  i64 sb, sh, st;
};

struct Dropout {
  uint64_t seed;
  uint32_t offset, threshold;        // threshold in 1/65536; 0: none; 65536: everything
  uint32_t first_row, first_matrix;  // what row 0 and matrix 0 are in the whole batch
};

// Kernels that sum over rows leave a row of partial sums for each of some parts of them: chunks of kRowChunk rows on the CPU,
// parts_of(R) or norm_parts_of(R) on CUDA; another kernel adds these in order: out[c] = sum_k partial[k][c].
struct PartialSums {
  const float* partial;  // (parts, C)
  i64 parts, C;
  void* out;  // (C)
  DType dtype;
};

struct GeluParams {
  Rows x;        // (R, C)
  Vector bias;   // (C)
  Rows dout;     // (R, C), backward only
  MutRows out;   // (R, C): y, or dx in backward
  float* dbias;  // (parts, C) partial sums, backward with bias only
  i64 R, C;
  i64 tail;   // columns of the last row (C unless a flat buffer was cut into rows)
  bool tanh;  // tanh approximation or erf
};

struct ReluSquaredParams {
  Rows x;       // (R, C)
  Rows dout;    // (R, C), backward only
  MutRows out;  // (R, C): y, or dx in backward
  i64 R, C;
  i64 tail;  // columns of the last row, as in GeluParams
};

// y = (up + shift) gate sigmoid(alpha gate), gate at most limit, up within -limit and limit (inf: no clamp).
struct SwigluParams {
  Rows gate, up;       // (R, C); interleaved: gate is (R, 2 C) with gate and up in turn, and up is not read
  Rows dout;           // (R, C), backward only
  MutRows out;         // (R, C), forward only
  MutRows dgate, dup;  // laid out as gate and up, backward only
  i64 R, C;
  i64 tail;  // columns of the last row, as in GeluParams
  float alpha, shift, limit;
  bool interleaved;
};

// Token (b, t) of every head turned by row positions[b * position_stride + t] of the tables, or row t where it is null.
struct RotaryParams {
  Heads x;
  MutHeads y;
  DType dtype;
  bool non_temporal;       // as in MutRows
  const float *cos, *sin;  // (rows, half)
  const i64* positions;
  i64 position_stride;
  i64 B, H, T, D, half;
  bool interleaved, inverse;  // pairs of neighbours, not of halves; turned back, not on
};

struct DropoutRowsParams {
  Rows x;
  MutRows y;  // of x's dtype
  i64 R, C;
  Dropout dropout;
};

// layer_norm when residual.data is null, else add_layer_norm; rms_norm and add_rms_norm when mean is null. The backward reads
// x as what was normalised. dtotal is of that dtype; y and its gradient dy may be of another.
struct LayerNormParams {
  Rows x, residual;     // (R, C)
  Vector weight, bias;  // absent: ones, zeros
  MutRows total, y;
  Rows dy, dtotal;         // backward: either may be null
  MutRows dx, dresidual;   // backward: dx after dropout, dresidual before it; either may be null
  float *mean, *rstd;      // (2, R): the mean, and what its rounding left out; (R)
  float *dweight, *dbias;  // (parts, C) partial sums; either may be null
  i64 R, C;
  float eps;
  Dropout dropout;
};

struct CrossEntropyParams {
  Rows logits;         // (R, V)
  const i64* targets;  // (R), in [0, V) or ignore_index; on CUDA any other value makes the row's loss nan
  float* loss;         // (R)
  float* lse;          // (R, 2): the maximum m, and log sum exp(x - m); both 0 where ignored
  const float* dloss;  // (R) or null for ones, backward
  MutRows dlogits;     // (R, V) of the logits' dtype, backward; may be the logits themselves
  i64 R, V, ignore_index;
  float label_smoothing;
};

// How a token is drawn: four numbers of 64 bits, as a row of the options of sample_rows.
struct SampleOptions {
  double temperature;
  i64 top_k;     // 0: all
  double top_p;  // not rounded: 0.3 of ten equal tokens are three
  uint64_t seed;
};
struct SampleParams {
  Rows logits;                   // (R, V)
  const i64 *position, *stream;  // (R)
  const SampleOptions* each;     // (R); null: `all` for every row
  i64*
      out;  // (R): a token, -1 where the row holds nan, -2 where nothing but -inf; on CUDA -3 where its options are out
            // of range
  i64 R, V;
  SampleOptions all;
};

// out[n] = wte[ids[n]] + wpe[positions[n]]. On the CPU all of them are checked before; on CUDA those outside give nan.
struct EmbeddingParams {
  const i64 *ids, *positions;  // (N); positions may be null: n mod T
  Rows wte, wpe;               // (V, C), (P, C); wpe.data may be null
  MutRows out;                 // (N, C) of wte's dtype
  i64 N, T, V, P, C;
};
// dtable[keys[n]] += dout[order[n]], where keys is sorted and order is the permutation that sorted it.
struct EmbeddingBwdParams {
  const i64 *keys, *order;  // (N)
  Rows dout;                // (N, C)
  MutRows dtable;           // (V, C), zeros on entry
  i64 N, V, C;
};

}  // namespace gptfast
