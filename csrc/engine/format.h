// How a weight matrix W (N outputs, K inputs) lies in memory: one layout that decode, batches and prefill all read.
//
// Panels of 32 outputs follow one another; a panel is read from front to back once per product:
//   f32    [K][32] floats
//   bf16   [K/2][32] pairs of neighbours along k
//   int8   per group of 32 k: [32] fp16 scales, then [8][32] quads of bytes, w / scale + 128
//   4-bit  per group of 32 k: [32] fp16 scales, then [4][32] quads of bytes: k = 4j + b in the low nibble of byte b of
//          quad j, k = 16 + 4j + b in the high one. int4: w / scale + 8; nf4: index into kNf4
// K is rounded up to whole pairs or groups and N to whole panels, with zeros. Every stretch of 32 k is a multiple of 64
// bytes, so that all loads are aligned.
#pragma once
#include <cstddef>
#include <cstdint>

namespace gptfast::engine {

using i64 = int64_t;

enum class Format : int { f32 = 0, bf16 = 1, int8 = 2, int4 = 3, nf4 = 4 };
constexpr int kFormats = 5;
constexpr i64 kPanel = 32;  // outputs of a panel
constexpr i64 kGroup = 32;  // values along k that share a scale

// The 16 values of NormalFloat (Dettmers et al., arXiv 2305.14314, appendix E) in 1/127: the product multiplies bytes.
constexpr int8_t kNf4[16] = {-127, -88, -67, -50, -36, -23, -12, 0, 10, 20, 31, 43, 56, 71, 92, 127};

constexpr i64 round_up(i64 n, i64 to) { return (n + to - 1) / to * to; }
constexpr bool quantised(Format f) { return f >= Format::int8; }
// Bytes of the 32 k x 32 outputs of a panel.
constexpr i64 group_bytes(Format f) {
  const i64 values = kGroup * kPanel, scales = 2 * kPanel;
  return f == Format::f32    ? values * 4
         : f == Format::bf16 ? values * 2
                             : scales + (f == Format::int8 ? values : values / 2);
}
constexpr i64 padded_depth(Format f, i64 K) {
  return f == Format::f32 ? K : round_up(K, f == Format::bf16 ? 2 : kGroup);
}
constexpr i64 panel_bytes(Format f, i64 K) { return padded_depth(f, K) * group_bytes(f) / kGroup; }
constexpr i64 panels(i64 N) { return (N + kPanel - 1) / kPanel; }

}  // namespace gptfast::engine
