// embedding on CUDA: checks, allocation, launch. Ids are not read here, which would wait for the GPU: an id outside its
// table gives a row of nan.
#include "cuda_common.h"

namespace gptfast::cuda {
namespace {

constexpr const char* kOp = "embedding";

// ids (…, T) -> (…, T, C).
Tensor fwd(const Tensor& ids, const Tensor& wte, const OptTensor& wpe, const OptTensor& positions) {
  GPTFAST_CHECK(defined(wte).dim() == 2 && (!wpe || wpe->dim() == 2), kOp, ": expected tables (V, C) and (P, C)");
  const View table = view_of(kOp, wte);
  std::vector<i64> size(defined(ids).sizes().begin(), ids.sizes().end());
  size.push_back(table.C);
  Tensor out = new_tensor(kOp, wte, size, wte.scalar_type()), ids_owner, positions_owner;
  const Launch on(wte);
  EmbeddingParams p{};
  p.N = ids.numel(), p.T = ids.dim() ? ids.size(ids.dim() - 1) : 1, p.V = table.R, p.C = table.C;
  GPTFAST_CHECK(p.N <= kMostRows, kOp, ": ids has ", p.N, " entries; expected at most ", kMostRows);
  p.ids = indices_of(kOp, "ids", ids, p.N, wte, &ids_owner);
  p.wte = table.rows(), p.out = mut_rows(kOp, out, p.C);
  View places = table;
  if (wpe) {
    places = view_of(kOp, "wpe", *wpe, wte);
    GPTFAST_CHECK(places.C == p.C, kOp, ": wte and wpe differ in width");
    p.wpe = places.rows(), p.P = places.R;
    if (positions) p.positions = indices_of(kOp, "positions", *positions, p.N, wte, &positions_owner);
  }
  check(kOp, embedding_fwd(p, on.stream));
  return out;
}

// dout (N, C), keys (N) sorted, order (N) the permutation that sorted them -> gradient of table (V, C).
Tensor bwd(const Tensor& dout, const Tensor& keys, const Tensor& order, const Tensor& table) {
  const View g = view_of(kOp, dout);
  check_device(kOp, "table", table, dout);
  GPTFAST_CHECK(table.dim() == 2 && table.size(1) == g.C, kOp, ": dout and table differ in width");
  Tensor dtable = new_like(kOp, table), keys_owner, order_owner;
  torch::stable::zero_(dtable);
  const Launch on(dout);
  const i64 segments = (g.R + kEmbeddingSegment - 1) / kEmbeddingSegment;
  Tensor pieces = new_tensor(kOp, dout, {segments > 1 ? 2 * segments : 0, g.C}, ScalarType::Float);
  const EmbeddingBwdParams p{indices_of(kOp, "keys", keys, g.R, dout, &keys_owner),
                             indices_of(kOp, "order", order, g.R, dout, &order_owner),
                             g.rows(),
                             mut_rows(kOp, dtable, g.C),
                             g.R,
                             table.size(0),
                             g.C};
  check(kOp, embedding_bwd(p, floats(pieces), on.stream));
  return dtable;
}

}  // namespace

GPTFAST_CUDA_IMPL(m) {
  m.impl("embedding_fwd", GPTFAST_BOX(&fwd));
  m.impl("embedding_bwd", GPTFAST_BOX(&bwd));
}

}  // namespace gptfast::cuda
