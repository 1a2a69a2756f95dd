// What the engine holds of a GPT, and where: all weights lie in one block of memory, in the order of their use.
#pragma once
#include <string>
#include <unordered_map>
#include <vector>

#include "epilogue.h"
#include "format.h"
#include "kernels.h"

namespace gptfast::engine {

struct Shape {
  i64 layers = 0, heads = 0, C = 0, F = 0, V = 0, positions = 0;  // F: hidden channels of the MLP
  i64 kv_heads = 0, D = 0;    // heads of keys, each read by heads / kv_heads of queries
  i64 rotary = 0;             // channels of a head that are rotated; 0: positions are added to the embedding
  i64 window = 0;             // of the layers with an S
  std::string pattern = "L";  // a letter for each layer, from the first again after the last
  bool pre_norm = true, final_norm = true, embedding_norm = false, parallel = false, tied = true;
  bool attn_bias = true, attn_out_bias = true, mlp_bias = true, norm_bias = true;
  bool rms_norm = false, norm_weight = true, qk_norm = false, interleaved = false, sinks = false;
  bool gated = false;                         // c_fc has 2 F rows: of the gate, and of what it multiplies
  Epilogue activation = Epilogue::gelu_tanh;  // of the MLP, where it is not gated
  GateForm gate = {};
  i64 experts = 0, experts_a_token = 0;  // of each MLP, all gated; 0: one MLP
  float eps = 1e-5f;
  float embed_scale = 1.f;                        // of the token embedding
  float attn_softcap = 0.f, logit_softcap = 0.f;  // 0: none

  i64 group() const { return heads / kv_heads; }
  i64 attended() const { return heads * D; }
  i64 qkv() const { return (heads + 2 * kv_heads) * D; }
  i64 fc() const { return gated ? 2 * F : F; }
  void check() const;  // std::invalid_argument where a number cannot be a model's
  i64 window_of(i64 layer) const { return pattern[size_t(layer) % pattern.size()] == 'S' ? window : 0; }
};

// A packed matrix (N, K), or with K == 0 a vector of N floats, followed by zeros up to a whole panel.
struct Weight {
  Format format = Format::f32;
  i64 N = 0, K = 0;
  i64 offset = -1;      // bytes into the block; -1: the model has none
  float factor = 1.f;   // a power of two: the matrix is what is packed, times this
  Blocks outside = {};  // of mxfp4 that lies in no block of weights
  i64 bytes() const;
};
struct Norm {
  Weight weight, bias;
};
struct Linear {
  Weight weight, bias;
  i64 number =
      0;  // 4 layer + 0 to 3 in the order of Layer, and 4 layers for the head; -1: no adapter has updates of it
};
struct Expert {
  Linear fc, proj;
};
struct Layer {
  Norm ln_1, ln_2;
  Linear c_attn, attn_proj, c_fc, mlp_proj;
  Linear router;  // in fp32: its rounding would send tokens elsewhere
  std::vector<Expert> experts;
  Weight q_norm, k_norm, sinks;
};

// A parameter with the matrices of all experts of a layer, in mxfp4, as a mapped file has them.
struct Outside {
  Blocks of;
  i64 block_bytes, scale_bytes;
};

// The formats of the matrices of a layer, in the order c_attn, attn.c_proj, c_fc, mlp.c_proj, and of the embeddings; the
// exponents of the factors that are not 1, by the names of their matrices; and the matrices of experts that are not in the block
// of weights, all or none, by the names of their parameters.
struct Formats {
  Format c_attn, attn_proj, c_fc, mlp_proj, head;
  std::unordered_map<std::string, int> exponents = {};
  std::unordered_map<std::string, Outside> outside = {};
};

// N and K of the matrix of a number; std::invalid_argument where there is none.
struct Size {
  i64 N, K;
};
Size size_of(const Shape& shape, i64 number);
inline i64 numbered_matrices(const Shape& shape) { return 4 * shape.layers + 1; }

struct Model {
  Model(const Shape& shape, const Formats& formats);
  // Of the packed weights, from the numbers alone: nothing is built that is as large as they say. The constructor takes
  // time and memory for each layer: compare this with the bytes that are there before.
  static i64 bytes_of(const Shape& shape, const Formats& formats);

  Shape shape;
  Formats formats;
  Weight wte, wpe;  // wpe: fp32, positions rows of C rounded up to a panel
  Weight cos, sin;  // of rotary positions, rotary / 2 each
  std::vector<Layer> layers;
  Norm ln_e, ln_f;
  Weight head;  // wte itself when tied
  i64 bytes = 0;
  std::unordered_map<std::string, Weight> by_name;  // of all, under GPT-2's parameter names

 private:
  Weight place(const std::string& name, Weight weight);
  Weight matrix(const std::string& name, Format format, i64 N, i64 K);
  Weight outside_matrix(const std::string& parameter, i64 expert, Format format, i64 N, i64 K);
  Weight vector(const std::string& name, i64 N, bool present = true);
  Norm norm(const std::string& name);
  Linear linear(const std::string& name, Format format, i64 number, bool bias);
  Linear unnumbered(const std::string& name, const std::string& bias, Format format, i64 N, i64 K, i64 expert = -1);
};

}  // namespace gptfast::engine
