// causal_attention: checks, allocation, launch.
#include <algorithm>

#include "common.h"

namespace gptfast {
namespace {

constexpr const char* kOp = "causal_attention";

void check_heads(const char* name, const Tensor& x) {
  GPTFAST_CHECK(on_cpu(x) && x.dim() == 4, kOp, ": ", name, " must be a CPU tensor (B, H, T, D)");
}
// x (B, heads, rows, D) of q's dtype with a contiguous last dimension; a copy otherwise, kept alive by *owner.
Heads heads_of(const char* name, const Tensor& x, i64 heads, i64 rows, const Tensor& q, Tensor* owner) {
  check_heads(name, x);
  GPTFAST_CHECK(x.size(0) == q.size(0) && x.size(1) == heads && x.size(2) == rows && x.size(3) == q.size(3) &&
                    x.scalar_type() == q.scalar_type(),
                kOp, ": ", name, " and q differ in shape or dtype");
  *owner = x.stride(3) == 1 || x.size(3) == 1 ? x : torch::stable::contiguous(x);
  return {owner->const_data_ptr(), owner->stride(0), owner->stride(1), owner->stride(2)};
}
// A fresh (B, H, T, D) stored as (B, T, H, D), the layout that the next projection reads without a copy.
Tensor new_heads(const Tensor& like, MutHeads* view) {
  const i64 B = like.size(0), H = like.size(1), T = like.size(2), D = like.size(3);
  Tensor x = new_tensor({B, T, H, D}, like.scalar_type());
  *view = {x.mutable_data_ptr(), T * H * D, D, H * D};
  return torch::stable::transpose(x, 1, 2);
}

struct Lengths {  // int32 or int64 -> int64, checked: 0 to limit, one a row; cu_seqlens (`rising`) from 0 to limit
  std::vector<i64> values;
  // count: how many there must be; -1: at least one
  Lengths(const char* name, const OptTensor& t, i64 count, i64 limit, bool rising = false) {
    if (!t) return;
    GPTFAST_CHECK(on_cpu(*t) && t->dim() == 1 && (count < 0 ? t->numel() >= 1 : t->numel() == count), kOp, ": ", name,
                  rising ? " must be a vector of offsets" : " must be a vector of one entry a row", " on the CPU");
    const Tensor c = torch::stable::contiguous(*t);
    const bool wide = c.scalar_type() == ScalarType::Long;
    GPTFAST_CHECK(wide || c.scalar_type() == ScalarType::Int, kOp, ": lengths must be int32 or int64");
    for (i64 n = 0; n < c.numel(); n++) {
      const i64 x = wide ? static_cast<const int64_t*>(c.const_data_ptr())[n]
                         : static_cast<const int32_t*>(c.const_data_ptr())[n];
      GPTFAST_CHECK(x >= 0 && x <= limit, kOp, ": ", name, "[", n, "] is ", x, "; expected 0 to ", limit);
      GPTFAST_CHECK(!rising || values.empty() || x >= values.back(), kOp, ": cu_seqlens[", n, "] is ", x,
                    ", less than the entry before it; expected rising offsets");
      values.push_back(x);
    }
    GPTFAST_CHECK(!rising || (!values.empty() && values[0] == 0 && values.back() == limit), kOp,
                  ": cu_seqlens must rise from 0 to ", limit);
  }
  const i64* data() const { return values.empty() ? nullptr : values.data(); }
};

struct Options {
  bool causal;
  double scale, dropout_p;
  i64 seed, offset, window;
  double softcap;
};
// Who sees whom, by row or by document.
struct Bounds {
  Lengths left_pad, seq_lens, cu_seqlens;
  Bounds(const Tensor& q, const Tensor& k, const OptTensor& left, const OptTensor& lens, const OptTensor& cu)
      : left_pad("left_pad", left, q.size(0), k.size(2)), seq_lens("seq_lens", lens, q.size(0), k.size(2)),
        cu_seqlens("cu_seqlens", cu, -1, q.size(2), true) {}
};

// sinks_owner keeps the sinks alive.
cpu::AttentionParams params_of(const Tensor& q, const Tensor& k, const Options& o, const Bounds& bounds,
                               const OptTensor& sinks, Tensor* sinks_owner) {
  cpu::AttentionParams p{};
  p.B = q.size(0), p.H = q.size(1), p.T = q.size(2), p.D = q.size(3), p.S = k.size(2);
  p.group = heads_per_key_head(kOp, p.H, k.size(1));
  p.dtype = dtype_of(kOp, q);
  GPTFAST_CHECK(o.window >= 0, kOp, ": window is ", o.window, "; expected 0 or more");
  p.causal = o.causal, p.scale = float(o.scale), p.window = std::min(o.window, p.T + p.S);
  p.dropout = dropout_of_matrices(o.dropout_p, o.seed, o.offset);
  p.left_pad = bounds.left_pad.data(), p.seq_lens = bounds.seq_lens.data();
  p.cu_seqlens = bounds.cu_seqlens.data(), p.documents = i64(bounds.cu_seqlens.values.size()) - 1;
  GPTFAST_CHECK(p.D >= 1 && p.D <= 256 && o.scale >= 0 && std::isfinite(p.scale), kOp,
                ": head_dim must be 1 to 256 and the scale finite, >= 0");
  p.softcap = float(o.softcap);
  GPTFAST_CHECK(o.softcap >= 0 && std::isfinite(p.softcap) && (p.softcap > 0.f || o.softcap == 0.), kOp,
                ": softcap is ", o.softcap, "; expected 0 or a number above it that float32 holds");
  if (sinks) p.sinks = floats_of(kOp, "sinks", *sinks, p.H, sinks_owner);
  GPTFAST_CHECK(bounds.cu_seqlens.values.empty() || (p.B == 1 && p.T == p.S), kOp,
                ": cu_seqlens needs B = 1 and T = S");
  return p;
}

std::tuple<Tensor, Tensor> causal_attention_fwd(const Tensor& q, const Tensor& k, const Tensor& v,
                                                const OptTensor& seq_lens, const OptTensor& cu_seqlens, bool causal,
                                                double scale, double dropout_p, i64 seed, i64 offset, i64 window,
                                                const OptTensor& left_pad, const OptTensor& sinks, double softcap) {
  check_heads("q", q), check_heads("k", k);
  const Bounds bounds(q, k, left_pad, seq_lens, cu_seqlens);
  Tensor q_owner, k_owner, v_owner, sinks_owner;
  cpu::AttentionParams p =
      params_of(q, k, {causal, scale, dropout_p, seed, offset, window, softcap}, bounds, sinks, &sinks_owner);
  p.q = heads_of("q", q, p.H, p.T, q, &q_owner);
  p.k = heads_of("k", k, k.size(1), p.S, q, &k_owner), p.v = heads_of("v", v, k.size(1), p.S, q, &v_owner);
  Tensor out = new_heads(q, &p.y), statistics = new_tensor({2, p.B, p.H, p.T}, ScalarType::Float);
  p.shift = static_cast<float*>(statistics.mutable_data_ptr()), p.level = p.shift + p.B * p.H * p.T;
  // Whole key heads when there are enough of them (k and v then stay in one core's cache), else a few slices of each whose
  // blocks interleave: late blocks see more keys.
  const i64 heads = p.B * k.size(1), blocks = (p.T * p.group + cpu::kAttentionBlock - 1) / cpu::kAttentionBlock;
  if (!heads || !blocks) return {out, statistics};
  const i64 wanted = (4 * i64(torch::stable::get_num_threads()) + heads - 1) / heads;
  const i64 slices = wanted < blocks ? wanted : blocks;
  parallel_items(heads * slices, [&](i64 item) {
    cpu::kernels().causal_attention_fwd(p, item / slices, slices - 1 - item % slices, slices);
  });
  return {out, statistics};
}

// Enough items for many cores where key heads are few. By the shape alone: dk and dv are summed by slices, and must not
// depend on the number of threads.
i64 backward_slices(i64 heads, i64 rows) {
  constexpr i64 kItems = 16, kBlocks = 4;  // at least so many blocks a slice: each packs all keys anew
  const i64 wanted = heads ? (kItems + heads - 1) / heads : 1, most = rows / (kBlocks * cpu::kAttentionBlock);
  return most <= 1 ? 1 : wanted < most ? wanted : most;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> causal_attention_bwd(
    const Tensor& dout, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out, const Tensor& statistics,
    const OptTensor& seq_lens, const OptTensor& cu_seqlens, bool causal, double scale, double dropout_p, i64 seed,
    i64 offset, i64 window, const OptTensor& left_pad, const OptTensor& sinks, double softcap) {
  check_heads("q", q), check_heads("k", k);
  const Bounds bounds(q, k, left_pad, seq_lens, cu_seqlens);
  Tensor owners[7];
  cpu::AttentionParams p =
      params_of(q, k, {causal, scale, dropout_p, seed, offset, window, softcap}, bounds, sinks, &owners[6]);
  p.q = heads_of("q", q, p.H, p.T, q, &owners[0]);
  p.k = heads_of("k", k, k.size(1), p.S, q, &owners[1]), p.v = heads_of("v", v, k.size(1), p.S, q, &owners[2]);
  p.out = heads_of("out", out, p.H, p.T, q, &owners[3]), p.dout = heads_of("dout", dout, p.H, p.T, q, &owners[4]);
  const i64 rows = p.B * p.H * p.T;
  p.shift = const_cast<float*>(floats_of(kOp, "statistics", statistics, 2 * rows, &owners[5])),
  p.level = p.shift + rows;
  Tensor dq = new_heads(q, &p.dq), dk = new_heads(k, &p.dk), dv = new_heads(k, &p.dv);
  const i64 heads = p.B * k.size(1), slices = backward_slices(heads, p.T * p.group);
  Tensor partial;
  if (slices > 1) {
    partial = new_tensor({heads, slices, 2, p.S, (p.D + 15) / 16 * 16}, ScalarType::Float);
    p.partial = static_cast<float*>(partial.mutable_data_ptr());
  }
  const i64 blocks = (p.T * p.group + cpu::kAttentionBlock - 1) / cpu::kAttentionBlock;
  Tensor dsinks = new_tensor({sinks ? p.B * blocks : 0, sinks ? p.H : 0}, ScalarType::Float);
  if (sinks) p.dsinks = static_cast<float*>(dsinks.mutable_data_ptr());
  parallel_items(heads * slices, [&](i64 item) {
    cpu::kernels().causal_attention_bwd(p, item / slices, slices - 1 - item % slices, slices);
  });
  if (slices > 1) parallel_items(heads, [&](i64 bh) { cpu::kernels().causal_attention_bwd_sum(p, bh, slices); });
  return {dq, dk, dv, sum_chunks(kOp, dsinks, ScalarType::Float)};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(gptfast, CPU, m) {
  m.impl("causal_attention_fwd", GPTFAST_BOX(&causal_attention_fwd));
  m.impl("causal_attention_bwd", GPTFAST_BOX(&causal_attention_bwd));
}

}  // namespace gptfast
