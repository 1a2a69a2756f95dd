// The forward pass of the tokens of `runs_`: every thread runs forward(), and they meet at barriers.
#include <algorithm>
#include <cmath>

#include "engine.h"
#include "panel_product.h"

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
    auto first_of_mlp = [&] {
      if (s.experts) return experts(t, l, rows);
      multiply(t, layer.c_fc, branch_inputs(layer.c_fc, layer.ln_2), rows, s.gated ? Epilogue::store : s.activation,
               hidden_.get(), Fp_, hidden_.get(), Fp_);
      pool_.barrier(t);
    };
    if (s.parallel) first_of_mlp();  // it reads what entered the block
    const Activations attended = inputs_of(t, layer.attn_proj, attended_.get(), Ap_, s.attended(), rows);
    multiply(t, layer.attn_proj, attended, rows, Epilogue::add, branch_.get(), Cp_, x, Cp_);
    pool_.barrier(t);
    if (!s.pre_norm) normalise_in_place(t, layer.ln_1, rows.count);
    if (!s.parallel) first_of_mlp();
    if (s.experts) combine(t, rows.count);
    else
      multiply(t, layer.mlp_proj, hidden_inputs(t, layer.mlp_proj, rows), rows, Epilogue::add, branch_.get(), Cp_, x,
               Cp_);
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
      const float* position = model_.shape.rotary ? zeros_.get() : floats(model_.wpe) + (run.start + i) * Cp_;
      float* x = x_.get() + m * Cp_;
      if (run.vectors) {
        const float* vector = run.vectors + i * model_.shape.C;
        for (i64 c = 0; c < model_.shape.C; c++) x[c] = model_.shape.embed_scale * vector[c] + position[c];
      } else {
        kernels_.embed(model_.wte.format, weights_ + model_.wte.offset, model_.shape.C, tokens[m],
                       model_.shape.embed_scale * model_.wte.factor, position, x);
      }
      if (model_.shape.embedding_norm) normalise(model_.ln_e, x, x);
    }
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
  if (!s.logit_softcap) return;
  const Range mine = share(panels(s.V), t);
  for (i64 m = 0; m < rows.count; m++)
    kernels_.cap(s.logit_softcap, (mine.last - mine.first) * kPanel, out + m * ld + mine.first * kPanel);
}

void Engine::normalise(const Norm& norm, const float* x, float* y) {
  const Shape& s = model_.shape;
  if (s.rms_norm) kernels_.rms_norm(x, floats(norm.weight), s.eps, s.C, y);
  else kernels_.layer_norm(x, floats(norm.weight), floats(norm.bias), s.eps, s.C, y);
}
void Engine::normalise_in_place(int t, const Norm& norm, i64 rows) {
  const Range mine = share(rows, t);
  for (i64 m = mine.first; m < mine.last; m++) normalise(norm, x_.get() + m * Cp_, x_.get() + m * Cp_);
  pool_.barrier(t);
}

Activations Engine::view(Inputs& in, i64 K) const {
  return {in.normed.get(), round_up(K, kPanel), in.bf16.get(),      in.q.get(),
          in.scale.get(),  in.acc_init.get(),   round_up(K, kGroup)};
}
// x as the product with a matrix reads it; the matrix's factor goes into the scales of x. A single row is prepared by every
// thread for itself, which is quicker than waiting for another; several rows are shared out.
Activations Engine::inputs_of(int t, const Linear& linear, const float* x, i64 ld, i64 K, Rows rows) {
  const bool single = rows.count == 1;
  const Weight& weight = linear.weight;
  Inputs& to = single ? own_[size_t(t)].inputs : shared_;
  Activations in = view(to, K);
  in.f32 = x;
  in.f32_stride = ld;
  if (reads_f32(weight.format) && !has_updates(linear, rows)) return in;
  const Range mine = single ? Range{0, 1} : share(rows.count, t);
  for (i64 m = mine.first; m < mine.last && !reads_f32(weight.format); m++)
    kernels_.quantize_activations(weight.format, x + m * ld, K, in, m, weight.factor);
  share_inputs(t, linear, in, K, rows);
  return in;
}
// The same of rows that make(m, to) writes.
template <class Make> Activations Engine::made_inputs(int t, const Linear& linear, i64 K, Rows rows, Make make) {
  const bool single = rows.count == 1;
  const Weight& weight = linear.weight;
  Inputs& to = single ? own_[size_t(t)].inputs : shared_;
  const Range mine = single ? Range{0, 1} : share(rows.count, t);
  const Activations in = view(to, K);
  for (i64 m = mine.first; m < mine.last; m++) {
    float* made = to.normed.get() + m * in.f32_stride;
    make(m, made);
    std::fill(made + K, made + in.stride, 0.f);  // what formats of whole groups read beyond
    if (!reads_f32(weight.format)) kernels_.quantize_activations(weight.format, made, K, in, m, weight.factor);
  }
  share_inputs(t, linear, in, K, rows);
  return in;
}
Activations Engine::normed_inputs(int t, const Linear& linear, const Norm& norm, const float* x, i64 ld, Rows rows) {
  return made_inputs(t, linear, model_.shape.C, rows, [&](i64 m, float* to) { normalise(norm, x + m * ld, to); });
}
Activations Engine::hidden_inputs(int t, const Linear& linear, Rows rows) {
  const Shape& s = model_.shape;
  if (!s.gated) return inputs_of(t, linear, hidden_.get(), Fp_, s.F, rows);
  return made_inputs(t, linear, s.F, rows,
                     [&](i64 m, float* to) { kernels_.gate(s.gate, hidden_.get() + m * Fp_, s.F, to); });
}

void Engine::product(const Weight& w, i64 p, const Activations& x, i64 rows, float* y, i64 ldy) const {
  const i64 K = padded_depth(w.format, w.K);
  if (const uint8_t* blocks = w.outside.blocks)
    return kernels_.product_of_blocks({blocks + p * kPanel * K / 2, w.outside.scales + p * K}, x, rows, K, y, ldy);
  panel_product(kernels_, w.format, weights_ + w.offset + p * panel_bytes(w.format, w.K), x, rows, K, y, ldy);
}

void Engine::products(const Weight& w, i64 first, i64 last, const Activations& x, i64 rows, float* y, i64 ldy) const {
  const auto together = kernels_.products[int(w.format)];
  if (!together || w.outside.blocks) {
    for (i64 p = first; p < last; p++) product(w, p, x, rows, y + (p - first) * kPanel, ldy);
    return;
  }
  const i64 K = padded_depth(w.format, w.K);
  together(weights_ + w.offset + first * panel_bytes(w.format, w.K), last - first, x, rows, K, y, ldy);
}

// This thread's panels of out = finish(x W^T + updates + bias); y is room for the products, and may be `out`. With few rows all
// products come first, so that nothing interrupts the stream of weights, nor then that of updates. With many rows they may be
// gathered in memory of the thread, whose rows spread over the sets of the caches.
void Engine::multiply(int t, const Linear& linear, const Activations& x, Rows rows, Epilogue epilogue, float* y,
                      i64 ldy, float* out, i64 ldo) {
  const Weight& w = linear.weight;
  const Range mine = share(panels(w.N), t);
  const float* bias = floats(linear.bias);
  const bool few = rows.count < kUnpackedRows, gathered = !few && kernels_.gathers;
  const bool updated = has_updates(linear, rows), finished = bias || epilogue != Epilogue::store || gathered;
  const i64 together = few ? mine.last - mine.first : gathered ? kPanelsTogether : 1;
  if (gathered) ldy = kProductsRow;
  for (i64 first = mine.first; first < mine.last; first += together) {
    const i64 last = std::min(first + together, mine.last);
    float* to = gathered ? own_[size_t(t)].products.get() : y + first * kPanel;
    products(w, first, last, x, rows.count, to, ldy);
    if (updated) {
      if (few) pool_.wait(t);
      update(linear, rows, first, last - first, to, ldy);
    }
    for (i64 p = first; p < last && finished; p++) {
      const i64 n = p * kPanel;
      kernels_.epilogue(epilogue, to + n - first * kPanel, ldy, rows.count, bias ? bias + n : nullptr, out + n, ldo);
    }
  }
}

}  // namespace gptfast::engine
