// GELU of x + bias, forward and backward; see activation.cuh and activation_values.cuh.
#include "activation.cuh"
#include "activation_values.cuh"

namespace gptfast::cuda {

cudaError_t gelu_fwd(const GeluParams& p, cudaStream_t stream) {
  return p.tanh ? activation_fwd<Gelu<true>>(p, stream) : activation_fwd<Gelu<false>>(p, stream);
}
cudaError_t gelu_bwd(const GeluParams& p, cudaStream_t stream) {
  return p.tanh ? activation_bwd<Gelu<true>>(p, stream) : activation_bwd<Gelu<false>>(p, stream);
}

}  // namespace gptfast::cuda
