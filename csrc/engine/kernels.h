// The engine's kernels as its model code sees them: one table of function pointers per instruction set.
//
// What a kernel computes for one row never depends on the other rows of the call, nor on how many there are: every sum
// runs in the same order for any tile. That is why a sequence gives the same bits alone, in a batch, in any stretches
// of prefill, and on any number of threads.
#pragma once
#include "../cpu/kernels.h"
#include "epilogue.h"
#include "format.h"

namespace gptfast::engine {

// Rows of inputs of a product. `f32` has its own stride; of the others `stride` is a multiple of 32.
struct Activations {
  const float* f32 = nullptr;
  i64 f32_stride = 0;
  uint16_t* bf16 = nullptr;
  int8_t* q = nullptr;          // x / scale
  float* scale = nullptr;       // per group of 32: stride / 32 a row
  int32_t* acc_init = nullptr;  // where the integer sum of a group begins: -offset * sum of q, see weight_offset
  i64 stride = 0;
  int offset = weight_offset(Format::int8);  // of the weights' bytes; those of an unpacked panel keep their format's

  // Of mxfp4 q is in the order of the nibbles: of each 8 along k the even ones, then the odd ones.
  // Those from column k on, a multiple of 32, of bf16 alone.
  Activations columns(i64 k) const { return {nullptr, 0, bf16 + k, nullptr, nullptr, nullptr, stride, offset}; }
  // Those from row m on.
  Activations from(i64 m) const {
    const i64 at = m * stride, groups = at / kGroup;
    return {f32 + m * f32_stride, f32_stride, bf16 + at, q + at, scale + groups, acc_init + groups, stride, offset};
  }
};

constexpr i64 kMostRows = 512;     // of a pass, on any instruction set
constexpr i64 kUnpackedRows = 16;  // at this number of rows and more a panel is unpacked first

// A low-rank update (adapter.h) in fp32 or bf16. A: r rows of K values, each padded with zeros to lora_stride(K).  B: for each
// panel of 32 outputs [r][32].
struct LowRank {
  const char *A = nullptr, *B = nullptr;
  bool half = false;  // bf16
  i64 r = 0;          // 0: none
  float scale = 1.f;
  i64 row = 0;  // bytes of a row of A

  i64 panel() const { return r * kPanel * (half ? 2 : 4); }  // bytes of B
  LowRank ranks(i64 first, i64 last) const { return {A + first * row, B, half, last - first, scale, row}; }  // of A
};
constexpr i64 lora_stride(i64 K) { return round_up(K, 32); }

constexpr i64 kPage = 64;  // positions of a page of keys and values

// Neighbouring heads of keys of one run of neighbouring new positions, and of the queries that read them the rows of each:
// those of one head at n positions, or `together` those of n heads at one position. For each layer a page holds the keys of
// all heads, [D][64], and then their values, [64][D rounded up to 16], in the type `cache`.
struct AttendParams {
  const float *q, *k, *v;         // k, v: (n, heads, D), positions `stride` apart
  i64 stride, q_stride, q_heads;  // q: rows q_stride apart, those of the next head of keys q_heads further
  i64 n, heads, D;
  i64 start;      // position of the first
  bool together;  // all rows are at this position
  i64 window;     // positions that a query sees, its own included; 0: all
  float scale;
  float softcap;       // 0: none; else scores are softcap tanh(scale / softcap q . k)
  const float* sinks;  // null, or a logit of no key: of each row of each head `together`, else of the head
  DType cache;
  char* const* pages;
  i64 keys, values;  // bytes into a page, where those of the first head begin
  float* out;        // as q, rows `out_stride` apart
  i64 out_stride;
  float* scratch;  // attend_scratch floats

  i64 position(i64 row) const { return together ? start : start + row; }
};
constexpr i64 kAttendRows = 6;  // queries of a head that are computed together
// Some queries, `row` the first of them, and the positions [first, end) of which each sees some. n: these in whole pages.
struct AttendRows {
  const AttendParams& p;
  i64 row, first, end, n;
  float* scores;  // (heads, queries, n)
};

inline i64 padded_head(i64 D) { return round_up(D, 16); }
inline i64 key_elements(i64 D) { return kPage * D; }
inline i64 value_elements(i64 D) { return kPage * padded_head(D); }
inline i64 attend_scratch(i64 heads, i64 positions) {
  return (heads < kAttendRows ? kAttendRows : heads) * (round_up(positions, kPage) + 1);
}

// y = (u + shift) g sigmoid(alpha g),  g = min(gate, limit),  u = up within -limit and limit
struct GateForm {
  float alpha = 1.f, shift = 0.f, limit = __builtin_inff();
  bool interleaved = false;  // gate and up are neighbours, else C gates and then C others
};

// Each is compiled by kernel_unit.cpp for each instruction set, from the -inl.h of its name. The build reads
// this list. The sampler is that of csrc/cpu.
// clang-format off
#define GPTFAST_ENGINE_KERNELS(X) \
  X(product_float) X(product_bytes) X(product_small) X(product_mxfp4) X(rows) X(heads) X(gate) X(attention) X(page_scores) \
  X(page_values) X(checksum) X(lora)
// clang-format on

struct Kernels {
  const char* isa;
  bool bf16_pairs;                // products of bf16 weights read Activations::bf16, else f32
  i64 most_rows = kMostRows / 2;  // of a pass; more make inputs leave L2, and are worth it where products are fast
  bool gathers = false;           // products of many rows add to y several times, so it should lie close together
  // Brings a row of K values into the form that the format's product reads (none for those that read f32). `factor`, a
  // power of two, goes into the scales of quantised formats; it is 1 with others.
  void (*quantize_activations)(Format, const float* x, i64 K, const Activations& to, i64 row, float factor);
  // By format: y[m][0..32) = x[m] W^T for rows [0, M) and one panel of depth K, which is padded_depth.
  void (*product[kFormats])(const char* panel, const Activations& x, i64 M, i64 K, float* y, i64 ldy);
  // The same of `count` panels, one after the other, which read x together where rows are many; null: one by one.
  void (*products[kFormats])(const char* panels, i64 count, const Activations& x, i64 M, i64 K, float* y, i64 ldy) = {};
  // The same of mxfp4 that lies outside the block of weights.
  void (*product_of_blocks)(const Blocks& panel, const Activations& x, i64 M, i64 K, float* y, i64 ldy);
  // A panel of a format narrower than int8 -> one of int8, which products of kUnpackedRows or more read; else null.
  void (*unpack[kFormats])(const char* panel, i64 K, char* to) = {};
  // The panel's outputs y, M rows: out = epilogue(y + bias). bias has 32 values, or is null.
  void (*epilogue)(Epilogue, const float* y, i64 ldy, i64 M, const float* bias, float* out, i64 ldo);
  // h[m][0..r) = scale x[m] A^T for the M rows m of K values
  void (*lora_down)(const float* x, i64 ldx, const i64* rows, i64 M, i64 K, const LowRank&, float* h, i64 ldh);
  // y[m][0..32 count) += h[m] B^T of `count` panels from `panel` on, for the M rows m
  void (*lora_up)(const float* h, i64 ldh, const i64* rows, i64 M, const LowRank&, i64 panel, i64 count, float* y,
                  i64 ldy);
  // weight, bias: null where there is none
  void (*layer_norm)(const float* x, const float* weight, const float* bias, float eps, i64 C, float* y);
  void (*rms_norm)(const float* x, const float* weight, float eps, i64 C, float* y);
  // Turns the first 2 half channels of a head at one position, whose row of the tables cos and sin have.
  void (*rotate)(const float* cos, const float* sin, i64 half, bool interleaved, float* x);
  void (*gate)(const GateForm&, const float* gate_up, i64 C, float* y);
  void (*cap)(float cap, i64 C, float* y);  // y -> cap tanh(y / cap)
  // out = scale * row n of W + position
  void (*embed)(Format, const char* matrix, i64 K, i64 n, float scale, const float* position, float* out);
  void (*store_kv)(const AttendParams&);  // the new keys and values into the pages
  // softmax(q k^T scale) v; and its products, by the type of the cache and the number of queries, less 1
  void (*attend)(const Kernels&, const AttendParams&);
  void (*page_scores[3][kAttendRows])(const AttendRows&);  // scores = scale q . keys
  void (*page_values[3][kAttendRows])(const AttendRows&);  // out = weights . values, where scores are the weights
  void (*sample)(const SampleParams&, i64 row_begin, i64 row_end);
  int64_t (*read)(const char* data, i64 bytes);  // only reads: the limit of what streams its weights
  uint64_t (*checksum)(const char* data, i64 bytes, uint64_t seed);  // the same on every instruction set
};

// The table of this instruction set, or null where it is unknown or cannot run here.
const Kernels* kernels(const char* isa);

}  // namespace gptfast::engine
