// Which keys a query sees, and which queries see a key, as intervals; for all attention kernels.
#pragma once
#include "causal_attention.h"
#include "common.cuh"

namespace gptfast::cuda {

// Positions [lo, hi); none where hi <= lo. For rising queries (keys) both ends of what they see (are seen by) rise too,
// so the first and the last row of a tile bound all of its rows.
struct Range {
  int lo, hi;
  DEV_INLINE void clip(int from, int to) { lo = max(lo, from), hi = min(hi, to); }
  DEV_INLINE bool holds(int x) const { return x >= lo && x < hi; }
};
DEV_INLINE int length_at(const Lengths& x, int n, int most) {
  const i64 v = x.wide ? static_cast<const i64*>(x.data)[n] : static_cast<const int*>(x.data)[n];
  return int(v < 0 ? 0 : v > most ? most : v);
}
// The document of position i: the number of offsets <= i, less one. -1 before the first, `documents` after the last.
DEV_INLINE int document_of(const AttentionParams& p, int i) {
  int below = 0, above = p.documents + 1;
  while (below < above) {
    const int middle = (below + above) / 2;
    if (length_at(p.cu_seqlens, middle, p.S) <= i) below = middle + 1;
    else above = middle;
  }
  return below - 1;
}
DEV_INLINE void clip_to_document(Range& r, const AttentionParams& p, int i) {
  const int d = document_of(p, i);
  if (d < 0) r.clip(0, 0);
  else if (d >= p.documents) r.clip(p.S, p.S);
  else r.clip(length_at(p.cu_seqlens, d, p.S), length_at(p.cu_seqlens, d + 1, p.S));
}
// Keys that query i sees.
DEV_INLINE Range visible_keys(const AttentionParams& p, int b, int i) {
  const int last = i + p.S - p.T;
  Range r{0, p.S};
  if (p.causal) r.clip(0, last + 1);
  if (p.window) r.clip(last - p.window + 1, p.S);
  if (p.seq_lens.data) r.clip(0, length_at(p.seq_lens, b, p.S));
  if (p.left_pad.data) r.clip(length_at(p.left_pad, b, p.S), p.S);
  if (p.cu_seqlens.data) clip_to_document(r, p, i);
  return r;
}
// Queries that see key j.
DEV_INLINE Range visible_queries(const AttentionParams& p, int b, int j) {
  const int first = j - (p.S - p.T);
  Range r{0, p.T};
  if (p.causal) r.clip(first, p.T);
  if (p.window && first + p.window < p.T) r.clip(0, max(first + p.window, 0));
  if (p.cu_seqlens.data) clip_to_document(r, p, j);  // T = S
  if (p.left_pad.data && j < length_at(p.left_pad, b, p.S)) r.clip(0, 0);
  if (j >= (p.seq_lens.data ? length_at(p.seq_lens, b, p.S) : p.S)) r.clip(p.T, p.T);
  return r;
}

}  // namespace gptfast::cuda
