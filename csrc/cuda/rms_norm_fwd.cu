// rms_norm and add_rms_norm, forward; see norm_fwd.cuh.
#include "norm_fwd.cuh"

namespace gptfast::cuda {

cudaError_t rms_norm_fwd(const LayerNormParams& p, cudaStream_t stream) { return norm_fwd<false>(p, stream); }

}  // namespace gptfast::cuda
