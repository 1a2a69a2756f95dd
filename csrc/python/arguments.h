// What Python says to the engine, read and checked.
#pragma once
#include <cmath>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "../engine/engine.h"
#include "matrix.h"

namespace gptfast::engine {

using python::from_python;
using python::Object;

inline Format format_named(const std::string& name) {
  for (int i = 0; i < kFormats; i++)
    if (name == kFormatNames[i]) return Format(i);
  throw std::invalid_argument("unknown format " + name);
}
inline DType type_named(const std::string& name) {
  if (name == "float32") return DType::f32;
  if (name == "float16") return DType::f16;
  if (name == "bfloat16") return DType::bf16;
  throw std::invalid_argument("unknown type " + name);
}
inline Epilogue activation_named(const std::string& name) {
  for (int i = kFirstActivation; i < kEpilogues; i++)
    if (name == kEpilogueNames[i]) return Epilogue(i);
  throw std::invalid_argument("unknown activation " + name);
}
inline Shape shape_of(const Object& d) {
  Shape s;
  auto count = [&](const char* key) {
    const Object value = d[key];
    try {
      return from_python<i64>(value.get());
    } catch (const python::Raised&) {  // beyond 64 bits
      PyErr_Clear();
      throw std::invalid_argument(std::string(key) + " is out of range; expected a size below 2**31");
    }
  };
  auto flag = [&](const char* key) { return from_python<bool>(d[key].get()); };
  s.layers = count("n_layer"), s.heads = count("n_head"), s.C = count("n_embd"), s.F = count("inner_dim");
  s.V = count("vocab_size"), s.positions = count("block_size"), s.window = count("window");
  s.kv_heads = count("n_kv_head"), s.D = count("head_dim"), s.rotary = count("rotary_dim");
  s.pattern = from_python<std::string>(d["pattern"].get());
  s.pre_norm = flag("pre_norm"), s.final_norm = flag("final_norm"), s.embedding_norm = flag("embedding_norm");
  s.parallel = flag("parallel"), s.tied = flag("tied"), s.interleaved = flag("interleaved");
  s.attn_bias = flag("attn_bias"), s.attn_out_bias = flag("attn_out_bias"), s.mlp_bias = flag("mlp_bias");
  s.norm_bias = flag("norm_bias"), s.norm_weight = flag("norm_weight"), s.rms_norm = flag("rms_norm");
  s.qk_norm = flag("qk_norm"), s.sinks = flag("sinks"), s.gated = flag("gated");
  if (!s.gated) s.activation = activation_named(from_python<std::string>(d["activation"].get()));
  const auto real = [&](const char* key) { return from_python<float>(d[key].get()); };
  s.gate = {real("gate_alpha"), real("gate_shift"), real("gate_limit"), flag("gate_interleaved")};
  s.experts = count("n_expert"), s.experts_a_token = count("n_expert_per_tok");
  s.eps = real("eps"), s.embed_scale = real("embed_scale");
  s.attn_softcap = real("attn_softcap"), s.logit_softcap = real("logit_softcap");
  s.check();
  return s;
}
// `kept`: gets the memory of what is outside, which these formats point to.
inline Formats formats_of(const Object& d, std::vector<Memory>* kept = nullptr) {
  auto of = [&](const char* key) { return format_named(from_python<std::string>(d[key].get())); };
  Formats formats{of("c_attn"), of("attn_proj"), of("c_fc"), of("mlp_proj"), of("head"), {}, {}};
  if (d.contains("exponents")) formats.exponents = from_python<decltype(formats.exponents)>(d["exponents"].get());
  using Parts = std::unordered_map<std::string, std::tuple<Object, Object>>;
  if (d.contains("outside"))
    for (const auto& [name, parts] : from_python<Parts>(d["outside"].get())) {
      const Memory blocks(std::get<0>(parts)), scales(std::get<1>(parts));
      formats.outside[name] = {
          {reinterpret_cast<uint8_t*>(blocks.data), reinterpret_cast<uint8_t*>(scales.data)}, blocks.size, scales.size};
      if (kept) kept->insert(kept->end(), {blocks, scales});
    }
  return formats;
}

using SamplingTuple =
    std::tuple<double, i64, double, uint64_t, i64, i64>;  // SamplingParams of gptfast/generation/sampling.py
inline std::vector<Sampling> samplings_of(const char* what, const std::vector<SamplingTuple>& tuples) {
  std::vector<Sampling> samplings;
  for (const auto& [temperature, top_k, top_p, seed, stream, vocab] : tuples) {
    if (!(temperature >= 0 && std::isfinite(temperature)) || top_k < 0 || !(top_p > 0 && top_p <= 1) || stream < 0 ||
        stream > UINT32_MAX || vocab < 0)
      throw std::invalid_argument(std::string(what) + ": a sampling is out of range; see gptfast.ops.sample");
    samplings.push_back({float(temperature), top_k, top_p, seed, stream, vocab});
  }
  return samplings;
}
// Logits of `rows` rows, as the engine reads (V columns) or writes (whole panels) them.
inline void check_logits(const char* what, const Matrix& logits, i64 rows, i64 columns) {
  if (logits.rows < rows || logits.columns < columns)
    throw std::invalid_argument(std::string(what) + ": logits has " + std::to_string(logits.rows) + " rows of " +
                                std::to_string(logits.columns) + "; expected " + std::to_string(rows) + " of " +
                                std::to_string(columns));
}

}  // namespace gptfast::engine
