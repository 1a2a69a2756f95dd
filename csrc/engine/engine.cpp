#include "engine.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <utility>

#include "pack.h"

namespace gptfast::engine {

namespace {
constexpr i64 kPass = 512;       // tokens of a pass: their activations stay in the caches
constexpr i64 kStreamRows = 32;  // up to so many rows a panel is read at full depth: its read is what counts
// Depth that is multiplied before the next panel: x at this depth stays in L2, the panel's part in L1.
constexpr i64 depth_of(Format f) { return f == Format::f32 ? 256 : f == Format::bf16 ? 512 : 1024; }
}  // namespace

Engine::Engine(const Shape& shape, const Formats& formats, char* weights, int threads, bool bf16_cache,
               const Kernels& kernels)
    : model_(shape, formats), weights_(weights), kernels_(kernels), pool_(threads), bf16_cache_(bf16_cache),
      head_bytes_(head_elements(shape.D()) * (bf16_cache ? 2 : 4)), Cp_(round_up(shape.C, kPanel)),
      Qp_(round_up(3 * shape.C, kPanel)), Fp_(round_up(shape.F, kPanel)), stride_(std::max(Cp_, Fp_)),
      next_(size_t(shape.layers)), own_(size_t(threads)) {}

void Engine::pack(const Weight& weight, const float* values, i64 ld) {
  const std::lock_guard guard(mutex_);
  char* to = weights_ + weight.offset;
  if (!weight.K) {
    std::memcpy(to, values, size_t(weight.N) * 4);
    return;
  }
  pool_.run([&](int t) {
    const Range mine = share(panels(weight.N), t);
    engine::pack(weight.format, values, ld, weight.N, weight.K, mine.first, mine.last, to);
  });
}

double Engine::read_rate(int times) {
  const std::lock_guard guard(mutex_);
  std::atomic<int64_t> sink{0};
  const auto start = std::chrono::steady_clock::now();
  pool_.run([&](int t) {
    const Range mine = share(model_.bytes / 4096, t);
    for (int i = 0; i < times; i++) {
      sink += kernels_.read(weights_ + mine.first * 4096, (mine.last - mine.first) * 4096);
      pool_.barrier(t);
    }
  });
  return double(model_.bytes) * times / std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

void Engine::extend(Cache& cache, const std::vector<i64>& rows, const std::vector<i64>& counts, const int* tokens,
                    bool last_only, float* out, i64 ld) {
  const std::lock_guard guard(mutex_);
  extend_locked(cache, rows, counts, tokens, last_only, out, ld);
}

void Engine::decode(Cache& cache, const std::vector<i64>& rows, const std::vector<i64>& streams, const Sampling& sampling,
                    i64 steps, bool more, float* logits, i64 ld, std::vector<std::vector<int>>& tokens) {
  const std::lock_guard guard(mutex_);
  const auto& ends = sampling.end_tokens;
  std::vector<size_t> active(rows.size());
  for (size_t i = 0; i < rows.size(); i++) active[i] = i;
  tokens.assign(rows.size(), {});
  for (i64 step = 0; step < steps && !active.empty(); step++) {
    std::vector<i64> active_rows, active_streams;
    for (size_t i : active) active_rows.push_back(rows[i]), active_streams.push_back(streams[i]);
    const std::vector<i64> drawn = sample(cache, active_rows, active_streams, sampling, logits, ld);
    std::vector<size_t> left;
    std::vector<i64> left_rows;
    std::vector<int> left_tokens;
    bool broken = false;
    for (size_t i = 0; i < active.size(); i++) {
      tokens[active[i]].push_back(int(drawn[i]));
      broken |= drawn[i] < 0;
      if (std::find(ends.begin(), ends.end(), drawn[i]) != ends.end()) continue;
      left.push_back(active[i]);
      left_rows.push_back(active_rows[i]);
      left_tokens.push_back(int(drawn[i]));
    }
    if (broken) return;
    active = std::move(left);
    if (active.empty() || (step == steps - 1 && !more)) return;
    extend_locked(cache, left_rows, std::vector<i64>(left_rows.size(), 1), left_tokens.data(), true, logits, ld);
  }
}

std::vector<i64> Engine::sample(const Cache& cache, const std::vector<i64>& rows, const std::vector<i64>& streams,
                                const Sampling& sampling, const float* logits, i64 ld) {
  const i64 n = i64(rows.size());
  std::vector<i64> positions, drawn(rows.size());
  for (i64 row : rows) positions.push_back(cache.length(row));
  const cpu::SampleParams p{{logits, ld, cpu::DType::f32}, positions.data(), streams.data(), drawn.data(), model_.shape.V,
                            sampling.top_k, sampling.temperature, sampling.top_p, sampling.seed};
  if (n == 1) {
    kernels_.sample(p, 0, 1);
  } else {
    pool_.run([&](int t) {
      const Range mine = share(n, t);
      if (mine.first < mine.last) kernels_.sample(p, mine.first, mine.last);
    });
  }
  return drawn;
}

void Engine::extend_locked(Cache& cache, const std::vector<i64>& rows, const std::vector<i64>& counts, const int* tokens,
                           bool last_only, float* out, i64 ld) {
  for (size_t i = 0; i < rows.size(); i++) cache.reserve(rows[i], counts[i]);
  std::vector<Run> runs;
  std::vector<i64> wanted;  // rows of the pass whose logits are asked for
  i64 M = 0, written = 0, done = 0;
  auto flush = [&] {
    if (!M) return;
    pass(runs, tokens + done, wanted, out + written * ld, ld);
    written += i64(wanted.size());
    done += M;
    M = 0;
    runs.clear();
    wanted.clear();
  };
  for (size_t i = 0; i < rows.size(); i++)
    for (i64 at = 0; at < counts[i];) {
      const i64 n = std::min(counts[i] - at, kPass - M);
      runs.push_back({M, n, cache.length(rows[i]) + at, cache.pages(rows[i])});
      at += n;
      for (i64 k = 0; k < n; k++)
        if (!last_only || (k == n - 1 && at == counts[i])) wanted.push_back(M + k);
      M += n;
      if (M == kPass) flush();
    }
  flush();
  for (size_t i = 0; i < rows.size(); i++) cache.append(rows[i], counts[i]);
}

void Engine::need_memory(i64 M, i64 longest) {
  for (Thread& own : own_) own.scratch.need(kAttendRows * round_up(longest, kPage) + 64);
  if (M <= capacity_) return;
  const i64 rows = M == 1 ? 1 : round_up(M, 8);
  auto inputs = [&](Inputs& in, i64 n) {
    in.normed.need(n * Cp_);
    in.bf16.need(n * stride_);
    in.q.need(n * stride_);
    in.scale.need(n * stride_ / kGroup);
    in.sum.need(n * stride_ / kGroup);
  };
  for (Thread& own : own_) inputs(own.inputs, 1);
  inputs(shared_, rows);
  x_.need(rows * Cp_);
  qkv_.need(rows * Qp_);
  attended_.need(rows * Cp_);
  hidden_.need(rows * Fp_);
  branch_.need(rows * Cp_);
  capacity_ = rows;
  work_bytes_ = (rows + threads()) * (4 * Cp_ + 3 * stride_ + stride_ / 4) + rows * 4 * (3 * Cp_ + Qp_ + Fp_);
}

void Engine::pass(const std::vector<Run>& runs, const int* tokens, const std::vector<i64>& wanted, float* out, i64 ld) {
  i64 longest = 0;
  M_ = runs.back().first + runs.back().n;
  for (const Run& run : runs) longest = std::max(longest, run.start + run.n);
  need_memory(M_, longest);
  runs_ = runs;
  for (auto& item : next_) item = 0;
  pool_.run([&](int t) { forward(t, tokens, wanted, out, ld); });
}

void Engine::forward(int t, const int* tokens, const std::vector<i64>& wanted, float* out, i64 ld) {
  const Shape& s = model_.shape;
  const Finish gelu = s.gelu_tanh ? Finish::gelu_tanh : Finish::gelu;
  float* x = x_.get();
  embed(t, tokens);
  pool_.barrier(t);
  for (i64 l = 0; l < s.layers; l++) {
    const Layer& layer = model_.layers[size_t(l)];
    auto branch_inputs = [&](const Linear& linear, const Norm& norm) {
      return s.pre_norm ? normed_inputs(t, linear.weight.format, norm, x, Cp_, nullptr, M_)
                        : inputs_of(t, linear.weight.format, x, Cp_, s.C, M_);
    };
    multiply(t, layer.c_attn, branch_inputs(layer.c_attn, layer.ln_1), M_, Finish::store, qkv_.get(), Qp_, qkv_.get(), Qp_);
    pool_.barrier(t);
    attention(t, l);
    pool_.barrier(t);
    const Activations attended = inputs_of(t, layer.attn_proj.weight.format, attended_.get(), Cp_, s.C, M_);
    multiply(t, layer.attn_proj, attended, M_, Finish::add, branch_.get(), Cp_, x, Cp_);
    pool_.barrier(t);
    if (!s.pre_norm) normalise_in_place(t, layer.ln_1);
    multiply(t, layer.c_fc, branch_inputs(layer.c_fc, layer.ln_2), M_, gelu, hidden_.get(), Fp_, hidden_.get(), Fp_);
    pool_.barrier(t);
    const Activations hidden = inputs_of(t, layer.mlp_proj.weight.format, hidden_.get(), Fp_, s.F, M_);
    multiply(t, layer.mlp_proj, hidden, M_, Finish::add, branch_.get(), Cp_, x, Cp_);
    pool_.barrier(t);
    if (!s.pre_norm) normalise_in_place(t, layer.ln_2);
  }
  if (!wanted.empty()) head(t, wanted, out, ld);
}

void Engine::embed(int t, const int* tokens) {
  const Range mine = share(M_, t);
  for (const Run& run : runs_)
    for (i64 i = 0; i < run.n; i++) {
      const i64 m = run.first + i;
      if (m < mine.first || m >= mine.last) continue;
      kernels_.embed(model_.wte.format, weights_ + model_.wte.offset, model_.shape.C, tokens[m], model_.shape.embed_scale,
                     floats(model_.wpe) + (run.start + i) * Cp_, x_.get() + m * Cp_);
    }
}

// One item is a head of a run. Single positions are shared out evenly; longer runs go to whoever is free.
void Engine::attention(int t, i64 layer) {
  const i64 items = i64(runs_.size()) * model_.shape.heads;
  if (M_ == i64(runs_.size())) {
    const Range mine = share(items, t);
    for (i64 i = mine.first; i < mine.last; i++) attend(t, layer, i);
  } else {
    for (i64 i; (i = next_[size_t(layer)].fetch_add(1)) < items;) attend(t, layer, i);
  }
}
void Engine::attend(int t, i64 layer, i64 item) {
  const Shape& s = model_.shape;
  const Run& run = runs_[size_t(item / s.heads)];
  const i64 h = item % s.heads, D = s.D();
  const float* q = qkv_.get() + run.first * Qp_ + h * D;
  const AttendParams p{q, q + s.C, q + 2 * s.C, Qp_, run.n, D, run.start, s.window_of(layer),
                       float(1 / std::sqrt(double(D))), bf16_cache_, run.pages, (layer * s.heads + h) * head_bytes_,
                       attended_.get() + run.first * Cp_ + h * D, Cp_, own_[size_t(t)].scratch.get()};
  kernels_.store_kv(p);
  kernels_.attend(p);
}

void Engine::head(int t, const std::vector<i64>& wanted, float* out, i64 ld) {
  const i64 rows = i64(wanted.size());
  const Format format = model_.head.format;
  Activations x;
  if (model_.shape.final_norm) {
    x = normed_inputs(t, format, model_.ln_f, x_.get(), Cp_, wanted.data(), rows);
  } else {  // gather the rows
    const Range mine = share(rows, t);
    for (i64 i = mine.first; i < mine.last; i++)
      std::memcpy(branch_.get() + i * Cp_, x_.get() + wanted[size_t(i)] * Cp_, size_t(Cp_) * 4);
    pool_.barrier(t);
    x = inputs_of(t, format, branch_.get(), Cp_, model_.shape.C, rows);
  }
  multiply(t, {model_.head, Weight()}, x, rows, Finish::store, out, ld, out, ld);
}

void Engine::normalise_in_place(int t, const Norm& norm) {
  const Range mine = share(M_, t);
  for (i64 m = mine.first; m < mine.last; m++) {
    float* x = x_.get() + m * Cp_;
    kernels_.layer_norm(x, floats(norm.weight), floats(norm.bias), model_.shape.eps, model_.shape.C, x);
  }
  pool_.barrier(t);
}

Activations Engine::view(Inputs& in) const {
  return {in.normed.get(), Cp_, in.bf16.get(), in.q.get(), in.scale.get(), in.sum.get(), stride_};
}
// x as the product of a format reads it. A single row is prepared by every thread for itself, which is quicker than waiting
// for another; several rows are shared out.
Activations Engine::inputs_of(int t, Format format, const float* x, i64 ld, i64 K, i64 rows) {
  const bool single = rows == 1;
  Activations in = view(single ? own_[size_t(t)].inputs : shared_);
  in.f32 = x;
  in.f32_stride = ld;
  if (reads_f32(format)) return in;
  const Range mine = single ? Range{0, 1} : share(rows, t);
  for (i64 m = mine.first; m < mine.last; m++) kernels_.prepare(format, x + m * ld, K, in, m);
  if (!single) pool_.barrier(t);
  return in;
}
// The same of LayerNorm(x), rows which[0], which[1], … (null: all in order).
Activations Engine::normed_inputs(int t, Format format, const Norm& norm, const float* x, i64 ld, const i64* which, i64 rows) {
  const bool single = rows == 1;
  Inputs& to = single ? own_[size_t(t)].inputs : shared_;
  const Range mine = single ? Range{0, 1} : share(rows, t);
  const Activations in = view(to);
  for (i64 m = mine.first; m < mine.last; m++) {
    float* normed = to.normed.get() + m * Cp_;
    kernels_.layer_norm(x + (which ? which[m] : m) * ld, floats(norm.weight), floats(norm.bias), model_.shape.eps,
                        model_.shape.C, normed);
    if (!reads_f32(format)) kernels_.prepare(format, normed, model_.shape.C, in, m);
  }
  if (!single) pool_.barrier(t);
  return in;
}

// This thread's panels of out = finish(x W^T + bias); y is room for the products, and may be `out`.
void Engine::multiply(int t, const Linear& linear, const Activations& x, i64 rows, Finish finish, float* y, i64 ldy,
                      float* out, i64 ldo) {
  const Weight& w = linear.weight;
  const Range mine = share(panels(w.N), t);
  const i64 K = padded_depth(w.format, w.K), depth = rows <= kStreamRows ? K : depth_of(w.format);
  const i64 panel = panel_bytes(w.format, w.K);
  const float* bias = floats(linear.bias);
  for (i64 k0 = 0; k0 < K; k0 += depth) {
    const i64 k1 = std::min(K, k0 + depth);
    for (i64 p = mine.first; p < mine.last; p++) {
      const i64 n = p * kPanel;
      kernels_.product(w.format, weights_ + w.offset + p * panel, x, rows, k0, k1, y + n, ldy, k0 > 0);
      if (k1 == K && (bias || finish != Finish::store))
        kernels_.finish(finish, y + n, ldy, rows, bias ? bias + n : nullptr, out + n, ldo);
    }
  }
}

}  // namespace gptfast::engine
