// embedding: checks, allocation, launch.
#include <cstring>

#include "common.h"

namespace gptfast {
namespace {

constexpr const char* kOp = "embedding";

// n int64 in [0, limit), contiguous; *owner keeps a copy alive.
const i64* indices_of(const char* name, const Tensor& x, i64 n, i64 limit, Tensor* owner) {
  GPTFAST_CHECK(on_cpu(x) && x.scalar_type() == ScalarType::Long && x.numel() == n, kOp, ": ", name, " must be ", n,
                " int64 values on the CPU");
  *owner = torch::stable::contiguous(x);
  const i64* values = static_cast<const int64_t*>(owner->const_data_ptr());
  for (i64 k = 0; k < n; k++)
    GPTFAST_CHECK(values[k] >= 0 && values[k] < limit, kOp, ": ", name, " holds ", values[k], "; expected 0 to ",
                  limit - 1);
  return values;
}

// ids (…, T) -> (…, T, C).
Tensor embedding_fwd(const Tensor& ids, const Tensor& wte, const OptTensor& wpe, const OptTensor& positions) {
  const RowView table = rows_of(kOp, wte);
  GPTFAST_CHECK(wte.dim() == 2 && (!wpe || (wpe->dim() == 2 && wpe->size(1) == table.C)), kOp,
                ": expected tables (V, C) and (P, C)");
  std::vector<i64> size(defined(ids).sizes().begin(), ids.sizes().end());
  size.push_back(table.C);
  Tensor out = new_tensor({size.data(), size.size()}, wte.scalar_type()), ids_owner, positions_owner, wpe_owner;
  EmbeddingParams p{};
  p.N = ids.numel(), p.T = ids.dim() ? ids.size(ids.dim() - 1) : 1, p.V = table.R, p.C = table.C;
  p.ids = indices_of("ids", ids, p.N, table.R, &ids_owner);
  p.wte = table.rows(), p.out = mut_rows(kOp, out, p.C);
  if (wpe) {
    const RowView places = rows_of(kOp, *wpe);
    wpe_owner = places.owner;
    p.wpe = places.rows(), p.P = places.R;
    if (positions) p.positions = indices_of("positions", *positions, p.N, places.R, &positions_owner);
    else GPTFAST_CHECK(p.T <= places.R, kOp, ": ids has ", p.T, " positions but wpe ", places.R, " rows");
  }
  parallel(p.N, p.C * 4, [&](i64 begin, i64 end) { cpu::kernels().embedding_fwd(p, begin, end); });
  return out;
}

// dout (N, C), keys (N) sorted, order (N) the permutation that sorted them -> gradient of table (V, C).
Tensor embedding_bwd(const Tensor& dout, const Tensor& keys, const Tensor& order, const Tensor& table) {
  const RowView g = rows_of(kOp, dout);
  GPTFAST_CHECK(on_cpu(table) && table.dim() == 2 && table.size(1) == g.C, kOp, ": dout and table differ in width");
  Tensor dtable = new_tensor({table.size(0), g.C}, table.scalar_type()), keys_owner, order_owner;
  EmbeddingBwdParams p{};
  p.keys = indices_of("keys", keys, g.R, table.size(0), &keys_owner);
  p.order = indices_of("order", order, g.R, g.R, &order_owner);
  for (i64 n = 1; n < g.R; n++)
    GPTFAST_CHECK(p.keys[n] >= p.keys[n - 1], kOp, ": keys[", n, "] is less than the one before; expected sorted keys");
  p.dout = g.rows(), p.dtable = mut_rows(kOp, dtable, g.C), p.N = g.R, p.V = table.size(0), p.C = g.C;
  const i64 row_bytes = g.C * element_size(p.dtable.dtype);
  char* rows = static_cast<char*>(p.dtable.data);
  parallel(table.size(0), row_bytes,
           [&](i64 begin, i64 end) { std::memset(rows + begin * row_bytes, 0, size_t((end - begin) * row_bytes)); });
  parallel(p.N, p.C * 4, [&](i64 begin, i64 end) { cpu::kernels().embedding_bwd(p, begin, end); });
  return dtable;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(gptfast, CPU, m) {
  m.impl("embedding_fwd", GPTFAST_BOX(&embedding_fwd));
  m.impl("embedding_bwd", GPTFAST_BOX(&embedding_bwd));
}

}  // namespace gptfast
