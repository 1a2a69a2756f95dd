// A mixture of experts in the forward pass: a router chooses the experts of each token, each expert multiplies the rows of its
// tokens together, and the answers are added a token at a time in the order of its experts.
//
// Floor: the weights of the experts that have tokens are read once. What a token gets depends on no other token.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "engine.h"

namespace gptfast::engine {

// Up to the answers of the experts, which `combine` adds.
void Engine::experts(int t, i64 l, Rows rows) {
  const Shape& s = model_.shape;
  const Layer& layer = model_.layers[size_t(l)];
  const Rows plain{rows.count, &none_};
  const i64 width = round_up(s.experts, kPanel), C = s.C;
  float* logits = routes_.logits.get();
  const Activations x = s.pre_norm ? normed_inputs(t, layer.router, layer.ln_2, x_.get(), Cp_, plain)
                                   : inputs_of(t, layer.router, x_.get(), Cp_, C, plain);
  multiply(t, layer.router, x, plain, Epilogue::store, logits, width, logits, width);
  pool_.barrier(t);
  if (t == 0) route(rows.count);
  pool_.barrier(t);
  std::atomic<i64>* next = &next_[size_t(s.layers + 2 * l)];
  const bool few = rows.count == 1;
  const Activations in = slot_inputs(t, layer, &Expert::fc, C, [&](i64 slot, float* to) {
    std::memcpy(to, x.f32 + routes_.row[size_t(slot)] * x.f32_stride, size_t(C) * sizeof(float));
  });
  expert_products(t, l, &Expert::fc, in, few, next[0], hidden_.get(), Fp_);
  pool_.barrier(t);
  const Activations hidden = slot_inputs(t, layer, &Expert::proj, s.F, [&](i64 slot, float* to) {
    kernels_.gate(s.gate, hidden_.get() + slot * Fp_, s.F, to);
  });
  expert_products(t, l, &Expert::proj, hidden, few, next[1], routes_.answers.get(), Cp_);
  pool_.barrier(t);
}

// The experts of each token: those with the largest logits, of equal ones the first, weighted by the softmax over them.
void Engine::route(i64 rows) {
  const i64 E = model_.shape.experts, k = model_.shape.experts_a_token, width = round_up(E, kPanel);
  Routes& r = routes_;
  std::fill(r.first.begin(), r.first.end(), 0);
  for (i64 m = 0; m < rows; m++) {
    const float* logits = r.logits.get() + m * width;
    float* share = &r.share[size_t(m * k)];
    i64* chosen = &r.slot[size_t(m * k)];
    float sum = 0;
    for (i64 j = 0; j < k; j++) {
      i64 best = -1;
      for (i64 e = 0; e < E; e++)
        if ((best < 0 || logits[e] > logits[best]) && std::find(chosen, chosen + j, e) == chosen + j) best = e;
      chosen[j] = best;
      r.first[size_t(best) + 1]++;
      sum += share[j] = std::exp(logits[best] - logits[chosen[0]]);
    }
    for (i64 j = 0; j < k; j++) share[j] /= sum;
  }
  r.active.clear();
  for (i64 e = 0; e < E; e++) {
    if (r.first[size_t(e) + 1]) r.active.push_back(e);
    r.first[size_t(e) + 1] += r.first[size_t(e)];
  }
  for (i64 i = 0; i < rows * k; i++) {
    const i64 e = r.slot[size_t(i)], slot = r.first[size_t(e)]++;
    r.row[size_t(slot)] = i / k, r.expert[size_t(slot)] = e;
    r.slot[size_t(i)] = slot;
  }
  for (i64 e = E; e > 0; e--) r.first[size_t(e)] = r.first[size_t(e) - 1];
  r.first[0] = 0;
}

// The rows that fill(slot, to) writes, as the products of `linear` read them.
template <class Fill>
Activations Engine::slot_inputs(int t, const Layer& layer, Linear Expert::* linear, i64 K, Fill fill) {
  const Activations in = view(routes_.inputs, K);
  const Range mine = share(routes_.first.back(), t);
  for (i64 slot = mine.first; slot < mine.last; slot++) {
    const Weight& weight = (layer.experts[size_t(routes_.expert[size_t(slot)])].*linear).weight;
    float* row = routes_.inputs.normed.get() + slot * in.f32_stride;
    fill(slot, row);
    std::fill(row + K, row + in.stride, 0.f);
    if (!reads_f32(weight.format)) kernels_.quantize_activations(weight.format, row, K, in, slot, weight.factor);
  }
  pool_.barrier(t);
  return in;
}

// y = x W^T + bias of the slots of each expert. An item is a panel of an expert: with one token threads have neighbouring ones,
// else a few.
void Engine::expert_products(int t, i64 layer, Linear Expert::* linear, const Activations& x, bool few,
                             std::atomic<i64>& next, float* y, i64 ldy) {
  const std::vector<Expert>& experts = model_.layers[size_t(layer)].experts;
  const Weight& any = (experts[0].*linear).weight;
  const i64 each = panels(any.N), items = i64(routes_.active.size()) * each;
  const auto run = [&](i64 item) {
    const i64 e = routes_.active[size_t(item / each)], p = item % each;
    const i64 first = routes_.first[size_t(e)], count = routes_.first[size_t(e) + 1] - first;
    const Linear& own = experts[size_t(e)].*linear;
    float* to = y + first * ldy + p * kPanel;
    product(own.weight, p, x.from(first), count, to, ldy);
    if (const float* bias = floats(own.bias))
      kernels_.epilogue(Epilogue::store, to, ldy, count, bias + p * kPanel, to, ldy);
  };
  if (few) {
    const Range mine = share(items, t);
    for (i64 item = mine.first; item < mine.last; item++) run(item);
  } else {
    constexpr i64 kTogether = 4;  // a panel asks for the next one's blocks
    for (i64 first; (first = next.fetch_add(kTogether)) < items;)
      for (i64 item = first; item < std::min(first + kTogether, items); item++) run(item);
  }
}

// Adds to each token the answers of its experts.
void Engine::combine(int t, i64 rows) {
  const i64 C = model_.shape.C, k = model_.shape.experts_a_token;
  const Range mine = share(rows, t);
  for (i64 m = mine.first; m < mine.last; m++) {
    float* x = x_.get() + m * Cp_;
    const i64* slots = &routes_.slot[size_t(m * k)];
    const float* shares = &routes_.share[size_t(m * k)];
    for (i64 c = 0; c < C; c++) {
      float sum = 0;
      for (i64 j = 0; j < k; j++) sum += shares[j] * routes_.answers.get()[slots[j] * Cp_ + c];
      x[c] += sum;
    }
  }
}

}  // namespace gptfast::engine
