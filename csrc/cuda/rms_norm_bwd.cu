// rms_norm and add_rms_norm, backward; see norm_bwd.cuh.
#include "norm_bwd.cuh"

namespace gptfast::cuda {

cudaError_t rms_norm_bwd(const LayerNormParams& p, cudaStream_t stream) { return norm_bwd<false>(p, stream); }

}  // namespace gptfast::cuda
