// quantized_linear: which kernel runs.
#include "quantized_linear.h"

namespace gptfast::cuda {

cudaError_t quantized_linear(const QuantizedLinearParams& p, cudaStream_t stream) {
  if (!p.M || !(p.transposed ? p.w.K : p.w.N)) return cudaSuccess;
  if (quantized_linear_few_takes(p)) return quantized_linear_few(p, stream);
  if (p.x.dtype == DType::f32) return quantized_linear_fp32(p, stream);
  if (quantized_linear_sm90_takes(p)) {
    const cudaError_t error = quantized_linear_sm90(p, stream);
    if (error != cudaErrorNotSupported) return error;
  }
  return quantized_linear_sm80(p, stream);
}

}  // namespace gptfast::cuda
