// The gate of an MLP (SwiGLU: Shazeer, arXiv 2002.05202; clamped in gpt-oss), and the soft cap of logits.
#include "activation-inl.h"

static void gate(const GateForm& form, const float* gates, const float* ups, i64 C, float* y) {
  const F alpha = set(form.alpha), shift = set(form.shift), most = set(form.limit), least = set(-form.limit);
  for_lanes(C, [&](i64 c, i64 n) {
    const F g = min(most, load_lanes(gates + c, n)), u = max(least, min(most, load_lanes(ups + c, n)));  // nan stays
    store_lanes(y + c, (u + shift) * (g * sigmoid(alpha * g)), n);
  });
}
static void cap(float cap, i64 C, float* y) {
  const F most = set(cap), inverse = set(1.f / cap);
  for_lanes(C, [&](i64 c, i64 n) { store_lanes(y + c, most * tanh(load_lanes(y + c, n) * inverse), n); });
}

static void fill(Kernels& k) {
  k.gate = gate;
  k.cap = cap;
}
