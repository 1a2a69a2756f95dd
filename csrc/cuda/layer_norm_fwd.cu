// layer_norm and add_layer_norm, forward; see norm_fwd.cuh.
#include "norm_fwd.cuh"

namespace gptfast::cuda {

cudaError_t layer_norm_fwd(const LayerNormParams& p, cudaStream_t stream) { return norm_fwd<true>(p, stream); }

}  // namespace gptfast::cuda
