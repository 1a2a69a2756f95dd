// What becomes of the outputs of a product.
#pragma once

namespace gptfast::engine {

enum class Finish { store, add, gelu_tanh, gelu, relu, silu, quick_gelu, tanh };  // add: to what `out` holds
constexpr int kFirstActivation = int(Finish::gelu_tanh), kFinishes = int(Finish::tanh) + 1;
constexpr const char* kFinishNames[kFinishes] = {"store", "add",  "gelu_tanh",  "gelu",
                                                 "relu",  "silu", "quick_gelu", "tanh"};

}  // namespace gptfast::engine
