// max(x, 0)^2, forward and backward; see activation.cuh and activation_values.cuh.
#include "activation.cuh"
#include "activation_values.cuh"

namespace gptfast::cuda {
namespace {

GeluParams as_activation(const ReluSquaredParams& p) {
  return {p.x, {}, p.dout, p.out, nullptr, p.R, p.C, p.tail, false};
}

}  // namespace

cudaError_t relu_squared_fwd(const ReluSquaredParams& p, cudaStream_t stream) {
  return activation_fwd<ReluSquared>(as_activation(p), stream);
}
cudaError_t relu_squared_bwd(const ReluSquaredParams& p, cudaStream_t stream) {
  return activation_bwd<ReluSquared>(as_activation(p), stream);
}

}  // namespace gptfast::cuda
