// layer_norm and add_layer_norm, backward; see norm_bwd.cuh.
#include "norm_bwd.cuh"

namespace gptfast::cuda {

cudaError_t layer_norm_bwd(const LayerNormParams& p, cudaStream_t stream) { return norm_bwd<true>(p, stream); }

}  // namespace gptfast::cuda
