// What becomes of the outputs of a product.
#pragma once

namespace gptfast::engine {

enum class Epilogue {
  store,
  add,
  gelu_tanh,
  gelu,
  relu,
  silu,
  quick_gelu,
  tanh,
  relu_squared
};  // add: to what `out` holds
constexpr int kFirstActivation = int(Epilogue::gelu_tanh), kEpilogues = int(Epilogue::relu_squared) + 1;
constexpr const char* kEpilogueNames[kEpilogues] = {"store", "add",        "gelu_tanh", "gelu",        "relu",
                                                    "silu",  "quick_gelu", "tanh",      "relu_squared"};

}  // namespace gptfast::engine
