// max(x, 0)^2 (So et al., arXiv 2109.08668), forward and backward; see activation.cuh.
#include "activation.cuh"

namespace gptfast::cuda {
namespace {

struct ReluSquared {
  static constexpr bool kBias = false;
  static DEV_INLINE float above(float x) { return x < 0.f ? 0.f : x; }  // nan stays
  static DEV_INLINE float value(float x) { return above(x) * above(x); }
  static DEV_INLINE float slope(float x) { return above(x) + above(x); }
};
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
