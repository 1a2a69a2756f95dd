// The CPU kernels as the rest of the project sees them: one table of function pointers per ISA, and the parameters that only
// they have; ../params.h has those that they share with CUDA. Nothing here or below knows of torch. A kernel is serial over
// a range of work items; the caller spreads the range over threads. What one item computes never depends on how the range
// was split, so neither do the results.
#pragma once
#include <cstddef>
#include <cstdint>

#include "../params.h"

namespace gptfast::cpu {

// Rows of one item of a kernel that sums over rows: partial sums are kept per chunk and added in chunk order.
constexpr i64 kRowChunk = 64;

struct DropoutMaskParams {
  bool* keep;  // (matrices, rows, C)
  i64 rows, C;
  Dropout dropout;
};

struct AttentionParams {
  i64 B, H, T, S, D;
  i64 group;        // query heads of a key head: query head h reads key head h / group
  DType dtype;      // of q, k, v, out and their gradients
  Heads q, k, v;    // (B, H, T, D), (B, H / group, S, D)
  Heads out, dout;  // (B, H, T, D), backward only
  MutHeads y;       // (B, H, T, D): the output, forward only
  MutHeads dq, dk, dv;
  float*
      partial;  // (B H / group, slices, 2, S, D rounded up to 16): sums of dk and dv; nullptr when there is one slice
  float *shift, *level;  // (B, H, T), written by forward, read by backward: weights are exp2(c (q k^T - shift) - level)
  const i64 *left_pad, *seq_lens;  // (B) or nullptr
  const i64* cu_seqlens;           // (documents + 1) or nullptr
  i64 documents;
  i64 window;  // 0: none
  bool causal;
  float scale;         // >= 0
  float softcap;       // 0: none; else scores are softcap tanh(scale / softcap q k^T)
  const float* sinks;  // (H) or nullptr: a logit of each query head
  float* dsinks;       // (B, blocks of the rows of a key head, H): sums of each block, backward with sinks only
  Dropout dropout;
};
constexpr i64 kAttentionBlock = 64;  // rows that are computed together; the heads of a group have T * group of them

// C[r][lane] (op)= sum_k A[r * ra + k * ka] * B[k * ldb + lane], in 32-bit words: fp32 values, or pairs of bf16 along k.
enum class TileOp : int {
  set,         // C = product
  accumulate,  // C += product
  add,         // C += product, which was summed by itself: more exact over a long contraction
  scale,       // C = C * alpha[lane] + product
};
struct TileProduct {
  TileOp op;
  const uint32_t* A;
  i64 ra, ka;
  const uint32_t* B;
  i64 ldb, K;
  float* C;
  i64 ldc, M;
  int vectors;         // of lanes
  const float* alpha;  // read by `scale` only
};

// Element (i, j) lies at data + i * stride + j, or with by_columns at data + j * stride + i.
struct Matrix {
  const void* data;
  i64 stride;
  DType dtype;
  bool by_columns;
};
constexpr i64 kGemmDepth = 256;  // words of k that are summed in registers
constexpr i64 kGemmPanel = 32;   // columns of a panel of packed B: whole register tiles on every ISA
constexpr i64 kGemmRows = 96;    // rows of an item: the same
constexpr i64 kPackPanels = 8;   // panels of an item of the packing

// C = A B (+ bias) (+ C): one stretch [n0, n1) of columns and [k0, k1) of words of k. Words: fp32 values, or pairs of
// bf16 along k.
struct GemmParams {
  Matrix a, b;    // (M, K), (K, N), any dtypes
  MutRows c;      // (M, N)
  Vector bias;    // (N)
  float* a_sums;  // (M): sum_k A, or null; only for A by columns
  i64 M, N, K;
  bool pairs, accumulate;  // pairs: multiply as bf16, where the ISA can
  i64 k0, k1, n0, n1;      // n0 a multiple of 32, k0 of kGemmDepth
  // of B: ceil((k1 - k0) / kGemmDepth) x ceil((n1 - n0) / kGemmPanel) panels of kGemmDepth rows. Null: B, by columns, is read
  // where it lies, for few rows of A by rows and all k at once.
  uint32_t* packed;
  float* carry;  // (M, N) sums of the stretches of k before; null when there is one stretch
  i64 columns;   // of an item, a multiple of 32
};

// C = A^T B for an A of at most kMostFew columns.
struct GemmFewParams {
  Rows a, b;  // (K, M), any dtype; (K, N), bf16
  MutRows c;  // (M, N)
  i64 M, N, K;
  uint32_t* packed;  // of A: ceil(K / 2) x kMostFew pairs
};
constexpr i64 kMostFew = 32;
constexpr i64 kFewColumns = 256;  // of an item

// C = A B for a B of at most kMostFew columns.
struct GemmNarrowParams {
  Rows a;    // (M, K), bf16
  Matrix b;  // (K, N), any dtype
  float* c;  // (M, N)
  i64 c_stride, N, K;
  uint16_t* packed;  // of B: narrow_values(N, K) values of bf16
};
// Values of a packed B: whole groups of 8 columns, of K up to a multiple of what two vectors hold at most.
inline i64 narrow_values(i64 N, i64 K) { return (N + 7) / 8 * 8 * ((K + 31) / 32 * 32); }

// W (N outputs, K inputs) in codes: W[n, k] = scales[n, k / group] * value of code [n, k].
enum class Codes : int { int8 = 0, int4 = 1, nf4 = 2, mxfp4 = 3 };
struct QuantizedMatrix {
  const uint8_t* codes;  // rows of whole groups: a byte each, or two to a byte, the first in the high half; mxfp4: low
  i64 row_bytes;
  Rows scales;  // (N, groups); of mxfp4 bytes, 127 more than the exponent of a power of two, whatever dtype says
  i64 N, K, group;
  Codes format;
  // Of doubly quantised scales, which are bytes without gaps: scale b is the value of its byte * nested[b / kNestedBlock] + offset.
  const float* nested = nullptr;
  float offset = 0;
};
constexpr i64 kNestedBlock = 256;
// Packs a stretch of W^T (by columns of W^T: y = x W^T) or W (dx = dy W) as gemm_pack does; `gemm.b` is not read.
struct QuantizedPackParams {
  QuantizedMatrix w;
  GemmParams gemm;
  bool transposed;  // W^T
};
// Columns [first, last) of W as bf16, a row after another; `first` is the begin of a group.
struct QuantizedDecodeParams {
  QuantizedMatrix w;
  i64 first, last;
  uint16_t* out;
};
// y = x W^T + bias for few rows of x.
struct QuantizedRowsParams {
  QuantizedMatrix w;
  Rows x;
  Vector bias;
  MutRows y;
  i64 M;
  float* spread;  // M rows of x, up to kChunkCodes, in the order in which the codes are read
};
constexpr i64 kQuantizedRows = 32;  // outputs of an item
constexpr i64 kFewRows = 8;         // rows of x, at most
constexpr i64 kChunkCodes = 128;    // K is rounded up to it in `spread`

// Each is compiled by kernel_unit.cpp for each instruction set, from the -inl.h of its name. The build reads
// this list.
// clang-format off
#define GPTFAST_CPU_KERNELS(X) \
  X(sum_chunks) X(peak) X(gelu_fwd) X(gelu_bwd) \
  X(tile_product) X(tile_product_pairs) X(gemm) X(gemm_few) X(gemm_narrow) X(quantized_pack) X(quantized_rows) \
  X(causal_attention_fwd) X(causal_attention_bwd) X(dropout) \
  X(relu_squared) X(swiglu) X(rotary) X(layer_norm_fwd) X(layer_norm_bwd) X(cross_entropy) X(embedding) X(sample)
// clang-format on

struct Kernels {
  const char* isa;
  int lanes;  // fp32 values in a vector
  void (*gelu_fwd)(const GeluParams&, i64 row_begin, i64 row_end);
  void (*gelu_bwd)(const GeluParams&, i64 chunk_begin, i64 chunk_end);
  // Blocks first, first + step, … of the rows of key head bh = b * (H / group) + h.
  void (*causal_attention_fwd)(const AttentionParams&, i64 bh, i64 first, i64 step);
  // Blocks slice, slice + slices, … of key head bh: their dq, and dk and dv if they are all, else the partial sums.
  void (*causal_attention_bwd)(const AttentionParams&, i64 bh, i64 slice, i64 slices);
  void (*causal_attention_bwd_sum)(const AttentionParams&, i64 bh, i64 slices);  // partial sums -> dk, dv
  void (*dropout)(const DropoutRowsParams&, i64 row_begin, i64 row_end);
  void (*dropout_mask)(const DropoutMaskParams&, i64 row_begin, i64 row_end);
  void (*relu_squared_fwd)(const ReluSquaredParams&, i64 row_begin, i64 row_end);
  void (*relu_squared_bwd)(const ReluSquaredParams&, i64 row_begin, i64 row_end);
  void (*swiglu_fwd)(const SwigluParams&, i64 row_begin, i64 row_end);
  void (*swiglu_bwd)(const SwigluParams&, i64 row_begin, i64 row_end);
  void (*rotary)(const RotaryParams&, i64 token_begin, i64 token_end);
  void (*layer_norm_fwd)(const LayerNormParams&, i64 row_begin, i64 row_end);
  void (*layer_norm_bwd)(const LayerNormParams&, i64 chunk_begin, i64 chunk_end);
  void (*cross_entropy_fwd)(const CrossEntropyParams&, i64 row_begin, i64 row_end);
  void (*cross_entropy_bwd)(const CrossEntropyParams&, i64 row_begin, i64 row_end);
  void (*embedding_fwd)(const EmbeddingParams&, i64 row_begin, i64 row_end);
  void (*embedding_bwd)(const EmbeddingBwdParams&, i64 begin, i64 end);
  void (*sample)(const SampleParams&, i64 row_begin, i64 row_end);
  bool multiplies_pairs;  // of bf16
  // Called by other kernels; the second is null without products of bf16 pairs.
  void (*tile_product)(const TileProduct&);
  void (*tile_product_pairs)(const TileProduct&);
  void (*tiles_end)();  // after the last tile product of an item; null but on AMX, which it leaves
  void (*gemm_pack)(const GemmParams&, i64 item_begin, i64 item_end);
  void (*gemm)(const GemmParams&, i64 item);
  void (*gemm_few_pack)(const GemmFewParams&);  // both null without products of bf16 pairs
  void (*gemm_few)(const GemmFewParams&, i64 item);
  void (*gemm_narrow_pack)(const GemmNarrowParams&);  // both null without products of bf16 pairs
  void (*gemm_narrow)(const GemmNarrowParams&, i64 row_begin, i64 row_end);
  void (*quantized_pack)(const QuantizedPackParams&, i64 item);
  void (*quantized_decode)(const QuantizedDecodeParams&, i64 row_begin, i64 row_end);
  void (*quantized_spread)(const QuantizedRowsParams&);
  void (*quantized_rows)(const QuantizedRowsParams&, i64 item);
  // Runs independent multiply-adds (of bf16 pairs where the CPU has them); returns the flops done.
  double (*peak_flops)(i64 iterations, bool pairs, float* sink);
  void (*sum_chunks)(const PartialSums&, i64 c_begin, i64 c_end);
};

// The table in use: the best ISA that this CPU and operating system support and that was compiled in, or the one
// that GPTFAST_CPU_ISA or set_isa names.
const Kernels& kernels();
// Names of the tables that can run here, worst first: those of isa_select.h.
const char* const* available_isas(int* count);
// Returns false, changing nothing, when `name` cannot run here. nullptr restores the automatic choice.
bool set_isa(const char* name);
// Whether this CPU and operating system let this process use AMX's tiles of bf16 and of bytes (amx.cpp).
bool amx_permitted();
// The value of GPTFAST_CPU_ISA when it names no table that can run here, else nullptr; the bindings raise.
const char* rejected_isa();

// Grow-only, 64-byte aligned memory of this thread; the contents survive until the next call from it. `workspace` is
// for what a launch shares among its threads: a second one, which kernels do not take for their scratch.
void* scratch(size_t bytes);
void* workspace(size_t bytes);

}  // namespace gptfast::cpu
