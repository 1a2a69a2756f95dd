#include "model.h"

#include <cmath>
#include <stdexcept>

namespace gptfast::engine {

namespace {
constexpr i64 kMostOf = (i64(1) << 31) - 1;  // of each size; products of two of them fit into 64 bits
constexpr i64 kMostHead = 256;               // channels of a head

// Sizes come from files: their products and sums do not wrap.
i64 product(i64 a, i64 b) {
  i64 result;
  if (__builtin_mul_overflow(a, b, &result)) throw std::invalid_argument("the model's sizes leave 64 bits");
  return result;
}
i64 sum(i64 a, i64 b) {
  i64 result;
  if (__builtin_add_overflow(a, b, &result)) throw std::invalid_argument("the model's sizes leave 64 bits");
  return result;
}
}  // namespace

void Shape::check() const {
  const std::pair<const char*, i64> sizes[] = {
      {"n_layer", layers}, {"n_head", heads},         {"n_embd", C},          {"inner_dim", F},
      {"vocab_size", V},   {"block_size", positions}, {"window", window + 1}, {"n_kv_head", kv_heads}};
  for (const auto& [name, value] : sizes)
    if (value < 1 || value > kMostOf)
      throw std::invalid_argument(std::string(name) + " is out of range; expected a size below 2**31");
  if (D < 1 || D > kMostHead || heads % kv_heads)
    throw std::invalid_argument("head_dim is " + std::to_string(D) + ", n_head " + std::to_string(heads) +
                                " and n_kv_head " + std::to_string(kv_heads) +
                                "; expected heads of 1 to 256 channels, as many for each of keys");
  for (i64 n : {heads * D, (heads + 2 * kv_heads) * D, 2 * F})
    if (n > kMostOf) throw std::invalid_argument("the model's matrices have 2**31 rows or more");
  if (experts < 0 || experts > kMostOf || (experts && (!gated || experts_a_token < 1 || experts_a_token > experts)))
    throw std::invalid_argument("n_expert is " + std::to_string(experts) + " and n_expert_per_tok " +
                                std::to_string(experts_a_token) + "; expected gated experts, at least as many");
  if (rotary < 0 || rotary % 2 || rotary > D)
    throw std::invalid_argument("rotary_dim is " + std::to_string(rotary) + "; expected an even number up to head_dim");
  if (pattern.empty() || pattern.find_first_not_of("SL") != std::string::npos)
    throw std::invalid_argument("pattern is '" + pattern + "'; expected letters S and L");
  if (!(eps > 0 && std::isfinite(eps)) || !std::isfinite(embed_scale))
    throw std::invalid_argument("eps or embed_scale is no finite number");
  if (!(attn_softcap >= 0 && logit_softcap >= 0 && gate.limit > 0 && std::isfinite(gate.alpha)))
    throw std::invalid_argument("a soft cap, or the gate's alpha or limit, is out of range");
}

Size size_of(const Shape& s, i64 number) {
  if (number < 0 || number >= numbered_matrices(s))
    throw std::invalid_argument("the model has no matrix of number " + std::to_string(number));
  if (s.experts && number < 4 * s.layers && number % 4 > 1)
    throw std::invalid_argument("matrix " + std::to_string(number) +
                                " is in a mixture of experts, which adapters leave alone");
  if (number == 4 * s.layers) return {s.V, s.C};
  const Size sizes[] = {{s.qkv(), s.C}, {s.C, s.attended()}, {s.fc(), s.C}, {s.C, s.F}};
  return sizes[number % 4];
}

i64 Weight::bytes() const { return product(panels(N), K ? panel_bytes(format, K) : kPanel * 4); }

i64 Model::bytes_of(const Shape& shape, const Formats& formats) {
  shape.check();
  Shape none = shape, one = shape;
  none.layers = 0, one.layers = 1;
  const i64 outside = Model(none, formats).bytes;
  return sum(outside, product(shape.layers, Model(one, formats).bytes - outside));  // all layers are alike
}

Weight Model::place(const std::string& name, Weight weight) {
  weight.offset = bytes;
  bytes = sum(bytes, round_up(weight.bytes(), 64));
  by_name[name] = weight;
  return weight;
}
Weight Model::matrix(const std::string& name, Format format, i64 N, i64 K) {
  const auto found = formats.exponents.find(name);
  const bool scaled = quantised(format) && found != formats.exponents.end();
  return place(name, {format, N, K, 0, scaled ? std::ldexp(1.f, found->second) : 1.f});
}
Weight Model::vector(const std::string& name, i64 N, bool present) {
  return present ? place(name, {Format::f32, N, 0, 0, 1.f}) : Weight();
}
Norm Model::norm(const std::string& name) {
  return {vector(name + ".weight", shape.C, shape.norm_weight), vector(name + ".bias", shape.C, shape.norm_bias)};
}
Linear Model::linear(const std::string& name, Format format, i64 number, bool bias) {
  const auto [N, K] = size_of(shape, number);
  const Weight own = vector(name + ".bias", N, bias);
  return {matrix(name + ".weight", format, N, K), own, number};
}
Weight Model::outside_matrix(const std::string& parameter, i64 expert, Format format, i64 N, i64 K) {
  const auto found = formats.outside.find(parameter);
  if (found == formats.outside.end()) throw std::invalid_argument(parameter + " is missing among what is outside");
  const Outside& all = found->second;
  const i64 blocks = product(N, K) / 2, scales = product(N, K) / kGroup;
  if (format != Format::mxfp4 || N % kPanel || K % kGroup || all.block_bytes != product(blocks, shape.experts) ||
      all.scale_bytes != product(scales, shape.experts))
    throw std::invalid_argument(parameter + " outside does not have the size of its experts, whole panels of mxfp4");
  Weight weight{format, N, K, -1, 1.f, {all.of.blocks + expert * blocks, all.of.scales + expert * scales}};
  by_name[parameter + "." + std::to_string(expert)] = weight;
  return weight;
}
// Of an MLP: the names of its tensors, which begin those of its experts.
Linear Model::unnumbered(const std::string& name, const std::string& bias, Format format, i64 N, i64 K, i64 expert) {
  std::string of(".");
  of += std::to_string(expert);
  const Weight own = vector(expert < 0 ? bias : bias + of, N, shape.mlp_bias);
  if (expert >= 0 && !formats.outside.empty()) return {outside_matrix(name, expert, format, N, K), own, -1};
  return {matrix(expert < 0 ? name : name + of, format, N, K), own, -1};
}

Model::Model(const Shape& s, const Formats& f) : shape(s), formats(f) {
  if (s.rotary) {
    cos = vector("rotary.cos", product(s.positions, s.rotary / 2));
    sin = vector("rotary.sin", product(s.positions, s.rotary / 2));
  } else {
    wpe = vector("wpe.weight", product(s.positions, round_up(s.C, kPanel)));
  }
  if (s.embedding_norm) ln_e = norm("ln_e");
  if (!s.tied) wte = matrix("wte.weight", formats.head, s.V, s.C);
  for (i64 l = 0; l < s.layers; l++) {
    const std::string name = "h." + std::to_string(l);
    Layer layer;
    layer.ln_1 = norm(name + ".ln_1");
    layer.c_attn = linear(name + ".attn.c_attn", formats.c_attn, 4 * l, s.attn_bias);
    layer.q_norm = vector(name + ".attn.q_norm.weight", s.D, s.qk_norm && s.norm_weight);
    layer.k_norm = vector(name + ".attn.k_norm.weight", s.D, s.qk_norm && s.norm_weight);
    layer.sinks = vector(name + ".attn.sinks", s.heads, s.sinks);
    layer.attn_proj = linear(name + ".attn.c_proj", formats.attn_proj, 4 * l + 1, s.attn_out_bias);
    layer.ln_2 = norm(name + ".ln_2");
    if (!s.experts) {
      layer.c_fc = linear(name + ".mlp.c_fc", formats.c_fc, 4 * l + 2, s.mlp_bias);
      layer.mlp_proj = linear(name + ".mlp.c_proj", formats.mlp_proj, 4 * l + 3, s.mlp_bias);
    } else {
      const std::string mlp = name + ".mlp.";
      layer.router = unnumbered(mlp + "router.weight", mlp + "router.bias", Format::f32, s.experts, s.C);
      for (i64 e = 0; e < s.experts; e++) {
        layer.experts.push_back(
            {unnumbered(mlp + "gate_up_proj", mlp + "gate_up_proj_bias", formats.c_fc, s.fc(), s.C, e),
             unnumbered(mlp + "down_proj", mlp + "down_proj_bias", formats.mlp_proj, s.C, s.F, e)});
      }
    }
    layers.push_back(layer);
  }
  if (s.final_norm) ln_f = norm("ln_f");
  head = matrix(s.tied ? "wte.weight" : "lm_head.weight", formats.head, s.V, s.C);
  if (s.tied) wte = head;
}

}  // namespace gptfast::engine
