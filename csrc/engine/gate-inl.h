// The gate of an MLP (SwiGLU: Shazeer, arXiv 2002.05202; clamped in gpt-oss), and the soft cap of logits.
#include "../cpu/pairs-inl.h"
#include "activation-inl.h"

template <bool PAIRS> static void gate_row(const GateForm& form, const float* gate_up, i64 C, float* y) {
  const F alpha = set(form.alpha), shift = set(form.shift), most = set(form.limit), least = set(-form.limit);
  for_lanes(C, [&](i64 c, i64 n) {
    Pair v;
    if constexpr (PAIRS) v = load_pairs<DType::f32>(gate_up, c, n);
    else v = {load_lanes(gate_up + c, n), load_lanes(gate_up + C + c, n)};
    const F g = min(most, v.first), u = max(least, min(most, v.second));  // nan stays
    store_lanes(y + c, (u + shift) * (g * sigmoid(alpha * g)), n);
  });
}
static void gate(const GateForm& form, const float* gate_up, i64 C, float* y) {
  form.interleaved ? gate_row<true>(form, gate_up, C, y) : gate_row<false>(form, gate_up, C, y);
}
static void cap(float cap, i64 C, float* y) {
  const F most = set(cap), inverse = set(1.f / cap);
  for_lanes(C, [&](i64 c, i64 n) { store_lanes(y + c, most * tanh(load_lanes(y + c, n) * inverse), n); });
}

static void fill(Kernels& k) {
  k.gate = gate;
  k.cap = cap;
}
