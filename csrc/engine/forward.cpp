// The forward pass of the tokens of `runs_`: every thread runs forward(), and they meet at barriers.
#include <algorithm>
#include <cmath>

#include "engine.h"

namespace gptfast::engine {

void Engine::forward(int t, const int* tokens, float* out, i64 ld) {
  const Shape& s = model_.shape;
  float* x = x_.get();
  Rows rows{M_, &updated_};
  embed(t, tokens);
  pool_.barrier(t);
  for (i64 l = 0; l < s.layers; l++) {
    const Layer& layer = model_.layers[size_t(l)];
    auto branch_inputs = [&](const Linear& linear, const Norm& norm) {
      return s.pre_norm ? normed_inputs(t, linear, norm, x, Cp_, rows) : inputs_of(t, linear, x, Cp_, s.C, rows);
    };
    multiply(t, layer.c_attn, branch_inputs(layer.c_attn, layer.ln_1), rows, Epilogue::store, qkv_.get(), Qp_,
             qkv_.get(), Qp_);
    pool_.barrier(t);
    attention(t, l);
    if (l == s.layers - 1 && wanted_ < M_) {  // from here on nothing else is read
      if (t == 0) keep_wanted();
      rows = {wanted_, &updated_wanted_};
    }
    pool_.barrier(t);
    if (!rows.count) return;
    const Activations attended = inputs_of(t, layer.attn_proj, attended_.get(), Cp_, s.C, rows);
    multiply(t, layer.attn_proj, attended, rows, Epilogue::add, branch_.get(), Cp_, x, Cp_);
    pool_.barrier(t);
    if (!s.pre_norm) normalise_in_place(t, layer.ln_1, rows.count);
    multiply(t, layer.c_fc, branch_inputs(layer.c_fc, layer.ln_2), rows, s.activation, hidden_.get(), Fp_,
             hidden_.get(), Fp_);
    pool_.barrier(t);
    const Activations hidden = inputs_of(t, layer.mlp_proj, hidden_.get(), Fp_, s.F, rows);
    multiply(t, layer.mlp_proj, hidden, rows, Epilogue::add, branch_.get(), Cp_, x, Cp_);
    pool_.barrier(t);
    if (!s.pre_norm) normalise_in_place(t, layer.ln_2, rows.count);
  }
  head(t, out, ld);
}

void Engine::embed(int t, const int* tokens) {
  const Range mine = share(M_, t);
  for (const Run& run : runs_)
    for (i64 i = 0; i < run.n; i++) {
      const i64 m = run.first + i;
      if (m < mine.first || m >= mine.last) continue;
      const float* position = floats(model_.wpe) + (run.start + i) * Cp_;
      float* x = x_.get() + m * Cp_;
      if (run.vectors) {
        const float* vector = run.vectors + i * model_.shape.C;
        for (i64 c = 0; c < model_.shape.C; c++) x[c] = model_.shape.embed_scale * vector[c] + position[c];
        continue;
      }
      kernels_.embed(model_.wte.format, weights_ + model_.wte.offset, model_.shape.C, tokens[m],
                     model_.shape.embed_scale * model_.wte.factor, position, x);
    }
}

// One item is a head of a run. Single positions are shared out evenly, the heads of a run together; longer runs are
// taken dynamically.
void Engine::attention(int t, i64 layer) {
  const i64 heads = model_.shape.heads, items = i64(runs_.size()) * heads;
  if (M_ > i64(runs_.size())) {
    for (i64 i; (i = next_[size_t(layer)].fetch_add(1)) < items;)
      attend(t, layer, runs_[size_t(i / heads)], i % heads, 1);
    return;
  }
  const Range mine = share(items, t);
  for (i64 i = mine.first, n; i < mine.last; i += n) {
    n = std::min(heads - i % heads, mine.last - i);
    attend(t, layer, runs_[size_t(i / heads)], i % heads, n);
  }
}
void Engine::attend(int t, i64 layer, const Run& run, i64 first, i64 heads) {
  const Shape& s = model_.shape;
  const i64 D = s.D(), keys = layer * layer_bytes_;
  const bool last = layer == s.layers - 1;
  const i64 unread = last ? run.unwanted() : 0;  // queries whose answer nobody reads
  const float* q = qkv_.get() + run.first * Qp_ + first * D;
  AttendParams p{q,
                 q + s.C,
                 q + 2 * s.C,
                 Qp_,
                 run.n,
                 heads,
                 D,
                 run.start,
                 s.window_of(layer),
                 float(1 / std::sqrt(double(D))),
                 cache_type_,
                 run.pages,
                 keys + first * key_bytes_,
                 keys + s.heads * key_bytes_ + first * value_bytes_,
                 attended_.get() + (last ? run.row : run.first) * Cp_ + first * D,
                 Cp_,
                 own_[size_t(t)].scratch.get()};
  kernels_.store_kv(p);
  p.q += unread * Qp_;
  p.n -= unread;
  p.start += unread;
  kernels_.attend(kernels_, p);
}

// Moves the rows that are asked for to the front.
void Engine::keep_wanted() {
  for (const Run& run : runs_)
    std::memmove(x_.get() + run.row * Cp_, x_.get() + (run.first + run.unwanted()) * Cp_,
                 size_t(run.wanted * Cp_) * sizeof(float));
}

void Engine::head(int t, float* out, i64 ld) {
  const Shape& s = model_.shape;
  const Linear head{model_.head, Weight(), 4 * s.layers};
  const Rows rows{wanted_, &updated_wanted_};
  const Activations x = s.final_norm ? normed_inputs(t, head, model_.ln_f, x_.get(), Cp_, rows)
                                     : inputs_of(t, head, x_.get(), Cp_, s.C, rows);
  multiply(t, head, x, rows, Epilogue::store, out, ld, out, ld);
}

void Engine::normalise_in_place(int t, const Norm& norm, i64 rows) {
  const Range mine = share(rows, t);
  for (i64 m = mine.first; m < mine.last; m++) {
    float* x = x_.get() + m * Cp_;
    kernels_.layer_norm(x, floats(norm.weight), floats(norm.bias), model_.shape.eps, model_.shape.C, x);
  }
  pool_.barrier(t);
}

Activations Engine::view(Inputs& in, i64 K) const {
  return {in.normed.get(), Cp_, in.bf16.get(), in.q.get(), in.scale.get(), in.acc_init.get(), round_up(K, kGroup)};
}
// x as the product with a matrix reads it; the matrix's factor goes into the scales of x. And x A^T of the rows that have
// adapters. A single row is prepared by every thread for itself, which is quicker than waiting for another; several rows
// are shared out.
Activations Engine::inputs_of(int t, const Linear& linear, const float* x, i64 ld, i64 K, Rows rows) {
  const bool single = rows.count == 1;
  const Weight& weight = linear.weight;
  Inputs& to = single ? own_[size_t(t)].inputs : shared_;
  Activations in = view(to, K);
  in.f32 = x;
  in.f32_stride = ld;
  if (reads_f32(weight.format) && rows.updated->empty()) return in;
  const Range mine = single ? Range{0, 1} : share(rows.count, t);
  for (i64 m = mine.first; m < mine.last && !reads_f32(weight.format); m++)
    kernels_.quantize_activations(weight.format, x + m * ld, K, in, m, weight.factor);
  project(linear, in, K, rows, mine.first, mine.last, to);
  if (!single) pool_.barrier(t);
  return in;
}
// The same of LayerNorm(x).
Activations Engine::normed_inputs(int t, const Linear& linear, const Norm& norm, const float* x, i64 ld, Rows rows) {
  const bool single = rows.count == 1;
  const Weight& weight = linear.weight;
  Inputs& to = single ? own_[size_t(t)].inputs : shared_;
  const Range mine = single ? Range{0, 1} : share(rows.count, t);
  const Activations in = view(to, model_.shape.C);
  for (i64 m = mine.first; m < mine.last; m++) {
    float* normed = to.normed.get() + m * Cp_;
    kernels_.layer_norm(x + m * ld, floats(norm.weight), floats(norm.bias), model_.shape.eps, model_.shape.C, normed);
    if (!reads_f32(weight.format))
      kernels_.quantize_activations(weight.format, normed, model_.shape.C, in, m, weight.factor);
  }
  project(linear, in, model_.shape.C, rows, mine.first, mine.last, to);
  if (!single) pool_.barrier(t);
  return in;
}

// Of one panel; with many rows one of few bits becomes one of int8 first.
static void product(const Kernels& k, Format f, const char* panel, const Activations& x, i64 rows, i64 K, float* y,
                    i64 ldy) {
  if (k.unpack[int(f)] && rows >= kUnpackedRows) {
    char* bytes = static_cast<char*>(cpu::scratch(size_t(panel_bytes(Format::int8, K))));
    k.unpack[int(f)](panel, K, bytes);
    f = Format::int8;
    panel = bytes;
  }
  k.product[int(f)](panel, x, rows, K, y, ldy);
}

// This thread's panels of out = finish(x W^T + updates + bias); y is room for the products, and may be `out`.
void Engine::multiply(int t, const Linear& linear, const Activations& x, Rows rows, Epilogue epilogue, float* y,
                      i64 ldy, float* out, i64 ldo) {
  const Weight& w = linear.weight;
  const Range mine = share(panels(w.N), t);
  const i64 K = padded_depth(w.format, w.K), panel = panel_bytes(w.format, w.K);
  const float* bias = floats(linear.bias);
  const Inputs& in = rows.count == 1 ? own_[size_t(t)].inputs : shared_;
  for (i64 p = mine.first; p < mine.last; p++) {
    const i64 n = p * kPanel;
    product(kernels_, w.format, weights_ + w.offset + p * panel, x, rows.count, K, y + n, ldy);
    update(linear, rows, p, in, y + n, ldy);
    if (bias || epilogue != Epilogue::store)
      kernels_.epilogue(epilogue, y + n, ldy, rows.count, bias ? bias + n : nullptr, out + n, ldo);
  }
}

}  // namespace gptfast::engine
