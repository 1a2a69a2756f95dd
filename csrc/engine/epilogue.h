// What becomes of the outputs of a product.
#pragma once

namespace gptfast::engine {

enum class Epilogue { store, add, gelu_tanh, gelu, relu, silu, quick_gelu, tanh };  // add: to what `out` holds
constexpr int kFirstActivation = int(Epilogue::gelu_tanh), kEpilogues = int(Epilogue::tanh) + 1;
constexpr const char* kEpilogueNames[kEpilogues] = {"store", "add",  "gelu_tanh",  "gelu",
                                                    "relu",  "silu", "quick_gelu", "tanh"};

}  // namespace gptfast::engine
