// Attention in the forward pass: queries and keys are normalised and turned to their positions, keys and values stored, and
// the queries of the pass attend to the pages.
#include <algorithm>
#include <cmath>

#include "engine.h"

namespace gptfast::engine {

// One item is a head of a run. Single positions are shared out evenly, the heads of a run together, and the queries that
// read a head of keys with it. The heads of queries of longer runs are taken dynamically; where several read one of keys,
// all keys are stored before.
void Engine::attention(int t, i64 layer) {
  const i64 kv_heads = model_.shape.kv_heads, group = model_.shape.group(), runs = i64(runs_.size());
  const Range mine = share(runs * kv_heads, t);
  if (M_ > runs) {
    if (group > 1) {
      for (i64 i = mine.first; i < mine.last; i++) store(layer, runs_[size_t(i / kv_heads)], i % kv_heads, 1);
      pool_.barrier(t);
    }
    const i64 heads = kv_heads * group;
    for (i64 i; (i = next_[size_t(layer)].fetch_add(1)) < runs * heads;) {
      const Run& run = runs_[size_t(i / heads)];
      if (group == 1) store(layer, run, i % heads, 1);
      attend(t, layer, run, i % heads, 1);
    }
    return;
  }
  for (i64 i = mine.first, n; i < mine.last; i += n) {
    const Run& run = runs_[size_t(i / kv_heads)];
    n = std::min(kv_heads - i % kv_heads, mine.last - i);
    store(layer, run, i % kv_heads, n);
    attend(t, layer, run, i % kv_heads * group, n * group);
  }
}

// Neighbouring heads of queries or keys at a position.
void Engine::place_heads(const Weight& norm, float* x, i64 position, i64 heads) {
  const Shape& s = model_.shape;
  const i64 half = s.rotary / 2;
  for (i64 h = 0; h < heads; h++, x += s.D) {
    if (s.qk_norm) kernels_.rms_norm(x, floats(norm), s.eps, s.D, x);
    if (half)
      kernels_.rotate(floats(model_.cos) + position * half, floats(model_.sin) + position * half, half, s.interleaved,
                      x);
  }
}

// Keys and values of heads of keys from `first` on.
void Engine::store(i64 layer, const Run& run, i64 first, i64 heads) {
  const Shape& s = model_.shape;
  AttendParams p = pages_of(layer, run, first, heads);
  float* k = qkv_.get() + run.first * Qp_ + (s.heads + first) * s.D;
  if (s.qk_norm || s.rotary)
    for (i64 i = 0; i < run.n; i++) place_heads(model_.layers[size_t(layer)].k_norm, k + i * Qp_, run.start + i, heads);
  p.k = k;
  p.v = k + s.kv_heads * s.D;
  p.stride = Qp_;
  kernels_.store_kv(p);
}

AttendParams Engine::pages_of(i64 layer, const Run& run, i64 first, i64 heads) const {
  AttendParams p = {};
  p.n = run.n, p.heads = heads, p.D = model_.shape.D, p.start = run.start;
  const i64 begin = place_[size_t(layer)] * layer_bytes_;
  p.cache = cache_type_, p.pages = model_.shape.window_of(layer) > 0 ? run.banded : run.pages;
  p.keys = begin + first * key_bytes_;
  p.values = begin + model_.shape.kv_heads * key_bytes_ + first * value_bytes_;
  return p;
}

// Heads of queries from `first` on: one, or at a single position all that read their heads of keys.
void Engine::attend(int t, i64 layer, const Run& run, i64 first, i64 heads) {
  const Shape& s = model_.shape;
  const Layer& weights = model_.layers[size_t(layer)];
  const bool last = layer == s.layers - 1;
  const i64 unread = last ? run.unwanted() : 0;  // queries whose answer nobody reads
  if (unread == run.n) return;
  float* q = qkv_.get() + (run.first + unread) * Qp_ + first * s.D;
  if (s.qk_norm || s.rotary)
    for (i64 i = unread; i < run.n; i++) place_heads(weights.q_norm, q + (i - unread) * Qp_, run.start + i, heads);
  const i64 rows = std::min(s.group(), heads);
  AttendParams p = pages_of(layer, run, first / s.group(), heads / rows);
  p.together = rows > 1;
  p.q = q, p.q_stride = p.together ? s.D : Qp_, p.q_heads = rows * s.D;
  p.n = p.together ? rows : run.n - unread;
  p.start = run.start + unread;
  p.window = s.window_of(layer);
  p.scale = float(1 / std::sqrt(double(s.D)));
  p.softcap = s.attn_softcap;
  p.sinks = s.sinks ? floats(weights.sinks) + first : nullptr;
  p.out = attended_.get() + (last ? run.row : run.first) * Ap_ + first * s.D;
  p.out_stride = p.together ? s.D : Ap_;
  p.scratch = own_[size_t(t)].scratch.get();
  kernels_.attend(kernels_, p);
}

}  // namespace gptfast::engine
