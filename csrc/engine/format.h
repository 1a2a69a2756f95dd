// How a weight matrix W (N outputs, K inputs) lies in memory: one layout that decode, batches and prefill all read.
//
// Panels of 32 outputs follow one another; a panel is read from front to back once per product:
//   f32    [K][32] floats
//   bf16   a table of 16 exponents, then per 4 k: [32] words of four nibbles, which choose the exponents, and [2][32]
//          pairs of bytes, sign and fraction; 12 bits a weight. See pack_bf16 and Bf16Step
//   int8   per group of 32 k: [32] fp16 scales, then [8][32] quads of bytes, w / scale + 128
//   int6   per group of 32 k: [32] fp16 scales, then [2][32] quads with the high two bits of w / scale + 32: byte b of
//          quad h holds k = 16h + 4j + b at bits 2j; then the low four bits like those of the
//   4-bit  per group of 32 k: [32] fp16 scales, then [4][32] quads of bytes: k = 4j + b in the low nibble of byte b of
//          quad j, k = 16 + 4j + b in the high one. int4: w / scale + 8; nf4, q4: index into kNf4, kQ4
//   mxfp4  as in checkpoints of gpt-oss, row by row: [32][K / 32] blocks of 16 bytes, of which byte j holds k = 2j in the low
//          nibble and k = 2j + 1 in the high one, indices into kMxfp4; then [32][K / 32] bytes, 128 more than the exponent of
//          the scale of kMxfp4. Blocks and scales of a whole matrix may lie in a mapped file: see Outside
// K is rounded up to whole steps and N to whole panels, with zeros. Every stretch of 32 k is a multiple of 64 bytes, so
// that all loads are aligned, but for those of mxfp4.
#pragma once
#include <cstddef>
#include <cstdint>

namespace gptfast::engine {

using i64 = int64_t;

enum class Format : int { f32 = 0, bf16 = 1, int8 = 2, int6 = 3, int4 = 4, nf4 = 5, q4 = 6, mxfp4 = 7 };
constexpr int kFormats = 8;
constexpr const char* kFormatNames[kFormats] = {"float32", "bfloat16", "int8", "int6", "int4", "nf4", "q4", "mxfp4"};
constexpr i64 kPanel = 32;  // outputs of a panel
constexpr i64 kGroup = 32;  // values along k that share a scale

// The 16 values of NormalFloat (Dettmers et al., arXiv 2305.14314, appendix E) in 1/127: the product multiplies bytes.
constexpr int8_t kNf4[16] = {-127, -88, -67, -50, -36, -23, -12, 0, 10, 20, 31, 43, 56, 71, 92, 127};
// Levels of least squared error: Lloyd's iteration over groups of Gaussian values and of trained weights, each with its
// best scale. The scale may be negative, so that the longer side is where the largest value is.
constexpr int8_t kQ4[16] = {-127, -100, -78, -61, -47, -33, -21, -9, 2, 13, 24, 36, 49, 64, 82, 106};
// Twice the values of MXFP4 (E2M1 of OCP Microscaling Formats 1.0).
constexpr int8_t kMxfp4[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};
constexpr int kMxfp4Bias = 128;  // of the scales of these, whose values are doubled
// A matrix of mxfp4, or 32 rows of one: rows of blocks, and rows of scales.
struct Blocks {
  const uint8_t *blocks = nullptr, *scales = nullptr;
};

constexpr i64 round_up(i64 n, i64 to) { return (n + to - 1) / to * to; }
constexpr bool quantised(Format f) { return f >= Format::int8; }
// Bytes are multiplied as w + offset, unsigned; what that adds to a product is taken off again (Activations::acc_init).
constexpr int weight_offset(Format f) {
  return f == Format::int4 ? 8 : f == Format::int6 ? 32 : f == Format::mxfp4 ? 12 : 128;
}
constexpr int code_bits(Format f) { return f == Format::int8 ? 8 : f == Format::int6 ? 6 : 4; }
// Bytes of the 32 k x 32 outputs of a panel.
constexpr i64 group_bytes(Format f) {
  const i64 values = kGroup * kPanel;
  if (f == Format::mxfp4) return kPanel + values / 2;
  return f == Format::f32 ? values * 4 : f == Format::bf16 ? values * 3 / 2 : kPanel * 2 + values * code_bits(f) / 8;
}
constexpr i64 header_bytes(Format f) { return f == Format::bf16 ? 64 : 0; }  // of a panel
constexpr i64 padded_depth(Format f, i64 K) {
  return f == Format::f32 ? K : round_up(K, f == Format::bf16 ? 4 : kGroup);
}
constexpr i64 panel_bytes(Format f, i64 K) { return header_bytes(f) + padded_depth(f, K) * group_bytes(f) / kGroup; }
constexpr i64 panels(i64 N) { return (N + kPanel - 1) / kPanel; }

}  // namespace gptfast::engine
