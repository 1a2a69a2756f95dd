// embedding: schemas. The CPU runs PyTorch's own, which is at the memory's limit; cuda_embedding.cpp has the kernels.
#include "common.h"

namespace gptfast {

STABLE_TORCH_LIBRARY_FRAGMENT(gptfast, m) {
  m.def("embedding_fwd(Tensor ids, Tensor wte, Tensor? wpe, Tensor? positions) -> Tensor");
  m.def("embedding_bwd(Tensor dout, Tensor keys, Tensor order, Tensor table) -> Tensor");
}

}  // namespace gptfast
