// sample where rows are fewer than processors, as the bindings see it. Conventions as in kernels.h.
#pragma once
#include "kernels.h"

namespace gptfast::cuda {

// Bytes that sample_parts needs, aligned to 16; 0: the call is one for sample.
i64 sample_parts_room(const SampleParams&);
cudaError_t sample_parts(const SampleParams&, void* room, cudaStream_t);

}  // namespace gptfast::cuda
