#include "model.h"

namespace gptfast::engine {

Weight Model::place(const std::string& name, Weight weight) {
  weight.offset = bytes;
  bytes += round_up(weight.bytes(), 64);
  by_name[name] = weight;
  return weight;
}
Weight Model::matrix(const std::string& name, Format format, i64 N, i64 K) { return place(name, {format, N, K, 0}); }
Weight Model::vector(const std::string& name, i64 N, bool present) {
  return present ? place(name, {Format::f32, N, 0, 0}) : Weight();
}
Norm Model::norm(const std::string& name) {
  return {vector(name + ".weight", shape.C), vector(name + ".bias", shape.C, shape.bias)};
}
Linear Model::linear(const std::string& name, Format format, i64 N, i64 K) {
  const Weight bias = vector(name + ".bias", N, shape.bias);
  return {matrix(name + ".weight", format, N, K), bias};
}

Model::Model(const Shape& s, const Formats& formats) : shape(s) {
  wpe = vector("wpe.weight", s.positions * round_up(s.C, kPanel));
  if (!s.tied) wte = matrix("wte.weight", formats.head, s.V, s.C);
  for (i64 l = 0; l < s.layers; l++) {
    const std::string name = "h." + std::to_string(l);
    Layer layer;
    layer.ln_1 = norm(name + ".ln_1");
    layer.c_attn = linear(name + ".attn.c_attn", formats.c_attn, 3 * s.C, s.C);
    layer.attn_proj = linear(name + ".attn.c_proj", formats.attn_proj, s.C, s.C);
    layer.ln_2 = norm(name + ".ln_2");
    layer.c_fc = linear(name + ".mlp.c_fc", formats.c_fc, s.F, s.C);
    layer.mlp_proj = linear(name + ".mlp.c_proj", formats.mlp_proj, s.C, s.F);
    layers.push_back(layer);
  }
  if (s.final_norm) ln_f = norm("ln_f");
  head = matrix(s.tied ? "wte.weight" : "lm_head.weight", formats.head, s.V, s.C);
  if (s.tied) wte = head;
}

}  // namespace gptfast::engine
