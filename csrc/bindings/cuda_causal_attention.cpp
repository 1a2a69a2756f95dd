// causal_attention on CUDA: checks, allocation, launch. The lengths stay on the device, where kernels clamp them: to
// check their values here would mean to wait for the GPU.
#include "../cuda/causal_attention.h"

#include "../cuda/decode_attention.h"
#include "cuda_common.h"

namespace gptfast::cuda {
namespace {

constexpr const char* kOp = "causal_attention";

// x (B, heads, rows, D) with a contiguous last dimension; a copy otherwise, kept alive by *owner.
Heads heads_of(const char* name, const Tensor& x, i64 heads, i64 rows, const Tensor& q, Tensor* owner) {
  check_device(kOp, name, x, q);
  GPTFAST_CHECK(x.dim() == 4 && x.size(0) == q.size(0) && x.size(1) == heads && x.size(2) == rows &&
                    x.size(3) == q.size(3) && x.scalar_type() == q.scalar_type(),
                kOp, ": ", name, " and q differ in shape or dtype");
  *owner = x.stride(3) == 1 || x.size(3) == 1 ? x : contiguous(kOp, x);
  return {owner->const_data_ptr(), owner->stride(0), owner->stride(1), owner->stride(2)};
}
// A fresh (B, H, T, D) stored as (B, T, H, D), the layout that the next projection reads without a copy.
Tensor new_heads(const Tensor& like, MutHeads* view) {
  const i64 B = like.size(0), H = like.size(1), T = like.size(2), D = like.size(3);
  Tensor x = new_tensor(kOp, like, {B, T, H, D}, like.scalar_type());
  *view = {x.mutable_data_ptr(), T * H * D, D, H * D};
  return torch::stable::transpose(x, 1, 2);
}
Lengths lengths_of(const char* name, const OptTensor& t, const Tensor& q, Tensor* owner) {
  if (!t) return {nullptr, false};
  check_device(kOp, name, *t, q);
  const bool wide = t->scalar_type() == ScalarType::Long;
  GPTFAST_CHECK((wide || t->scalar_type() == ScalarType::Int) && t->dim() == 1, kOp, ": ", name,
                " must be a vector of int32 or int64");
  *owner = contiguous(kOp, *t);
  return {owner->const_data_ptr(), wide};
}

// What forward and backward share, and the tensors that must outlive the launch.
struct Call {
  AttentionParams p{};
  Tensor owners[9];

  Call(const Tensor& q, const Tensor& k, const Tensor& v, const OptTensor& seq_lens, const OptTensor& cu_seqlens,
       bool causal, double scale, double dropout_p, i64 seed, i64 offset, i64 window, const OptTensor& left_pad,
       const OptTensor& sinks, double softcap) {
    GPTFAST_CHECK(defined(q).dim() == 4 && defined(k).dim() == 4, kOp, ": expected (B, H, T, D)");
    const i64 B = q.size(0), H = q.size(1), K = k.size(1), T = q.size(2), S = k.size(2), D = q.size(3);
    const i64 most = i64(1) << 29;
    GPTFAST_CHECK(B * H <= most && T <= most && S <= most && B * H * (T + S) <= 16 * most, kOp, ": B * H is ", B * H,
                  ", T ", T, ", S ", S, "; the CUDA kernels take up to ", most, " of each: use backend='eager'");
    GPTFAST_CHECK(D >= 1 && D <= 256 && scale >= 0 && std::isfinite(float(scale)), kOp,
                  ": head_dim must be 1 to 256 and the scale finite, >= 0");
    GPTFAST_CHECK(window >= 0, kOp, ": window is ", window, "; expected 0 or more");
    GPTFAST_CHECK(!seq_lens || seq_lens->numel() == B, kOp, ": seq_lens must have one entry a row");
    GPTFAST_CHECK(!left_pad || left_pad->numel() == B, kOp, ": left_pad must have one entry a row");
    GPTFAST_CHECK(softcap >= 0 && std::isfinite(float(softcap)) && (float(softcap) > 0 || softcap == 0), kOp,
                  ": softcap is ", softcap, "; expected 0 or a number above it that float32 holds");
    GPTFAST_CHECK(!cu_seqlens || (B == 1 && T == S && cu_seqlens->numel() >= 1), kOp,
                  ": cu_seqlens needs B = 1 and T = S");
    p.group = int(heads_per_key_head(kOp, H, K));
    p.B = int(B), p.H = int(H), p.T = int(T), p.S = int(S), p.D = int(D), p.dtype = dtype_of(kOp, q);
    p.causal = causal, p.scale = float(scale), p.window = int(window < T + S ? window : T + S);
    p.dropout = dropout_of_matrices(dropout_p, seed, offset);
    p.q = heads_of("q", q, H, T, q, &owners[0]);
    p.k = heads_of("k", k, K, S, q, &owners[1]), p.v = heads_of("v", v, K, S, q, &owners[2]);
    p.seq_lens = lengths_of("seq_lens", seq_lens, q, &owners[3]);
    p.cu_seqlens = lengths_of("cu_seqlens", cu_seqlens, q, &owners[4]);
    p.left_pad = lengths_of("left_pad", left_pad, q, &owners[7]);
    p.softcap = float(softcap);
    if (sinks) {
      check_device(kOp, "sinks", *sinks, q);
      GPTFAST_CHECK(sinks->scalar_type() == ScalarType::Float && sinks->numel() == H, kOp, ": sinks must be ", H,
                    " float32 values");
      owners[8] = contiguous(kOp, *sinks);
      p.sinks = floats(owners[8]);
    }
    p.documents = cu_seqlens ? int(cu_seqlens->numel()) - 1 : 0;
  }
};

void set_statistics(AttentionParams& p, const Tensor& statistics) {
  p.shift = floats(statistics), p.level = p.shift + i64(p.B) * p.H * p.T;
}

std::tuple<Tensor, Tensor> fwd(const Tensor& q, const Tensor& k, const Tensor& v, const OptTensor& seq_lens,
                               const OptTensor& cu_seqlens, bool causal, double scale, double dropout_p, i64 seed,
                               i64 offset, i64 window, const OptTensor& left_pad, const OptTensor& sinks,
                               double softcap) {
  Call call(q, k, v, seq_lens, cu_seqlens, causal, scale, dropout_p, seed, offset, window, left_pad, sinks, softcap);
  AttentionParams& p = call.p;
  const Launch on(q);
  Tensor out = new_heads(q, &p.y), statistics = new_tensor(kOp, q, {2, p.B, p.H, p.T}, ScalarType::Float);
  Tensor partial = new_tensor(kOp, q, {causal_attention_partial(p)}, ScalarType::Float);
  set_statistics(p, statistics);
  p.partial = floats(partial);
  check(kOp, causal_attention_fwd(p, on.stream));
  return {out, statistics};
}

// A tensor that is written in place, like k or v of the call it stands for.
MutHeads cache_of(const char* name, Tensor& x) {
  GPTFAST_CHECK(defined(x).dim() == 4 && (x.stride(3) == 1 || x.size(3) == 1), kOp, ": ", name,
                " must be (B, H, S, D) with a contiguous last dimension");
  return {x.mutable_data_ptr(), x.stride(0), x.stride(1), x.stride(2)};
}
// k and v, (B, heads, 1, D), become position lengths[b] of the keys and values of row b, and q attends to those up to there.
Tensor append(const Tensor& q, const Tensor& k, const Tensor& v, Tensor keys, Tensor values, const Tensor& lengths,
              Tensor counters, double scale, const OptTensor& sinks, double softcap, bool cache_ready) {
  NewPosition next{};
  next.keys = cache_of("keys", keys), next.values = cache_of("values", values);
  Call call(q, keys, values, lengths, {}, true, scale, 0.0, 0, 0, 0, {}, sinks, softcap);
  AttentionParams& p = call.p;
  GPTFAST_CHECK(p.T == 1, kOp, ": q has ", p.T, " positions a row; expected the one that is appended");
  GPTFAST_CHECK(p.seq_lens.wide, kOp, ": lengths must be int64");
  next.k = heads_of("k", k, p.H / p.group, 1, q, &call.owners[5]);
  next.v = heads_of("v", v, p.H / p.group, 1, q, &call.owners[6]);
  check_device(kOp, "counters", counters, q);
  GPTFAST_CHECK(counters.scalar_type() == ScalarType::Int && counters.dim() == 1 && counters.stride(0) == 1 &&
                    counters.numel() >= split_counters(p),
                kOp, ": counters must be at least ", split_counters(p), " zeros of int32, side by side");
  const bool as_given = p.k.data == keys.const_data_ptr() && p.v.data == values.const_data_ptr() &&
                        p.seq_lens.data == lengths.const_data_ptr();
  next.cache_ready = cache_ready && as_given;  // a copy is made just now
  const Launch on(q);
  Tensor out = new_heads(q, &p.y);
  Tensor partial = new_tensor(kOp, q, {split_partial(p, append_splits(p))}, ScalarType::Float);
  p.partial = floats(partial);
  check(kOp, causal_attention_append(p, next, static_cast<unsigned*>(counters.mutable_data_ptr()), on.stream));
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> bwd(const Tensor& dout, const Tensor& q, const Tensor& k, const Tensor& v,
                                               const Tensor& out, const Tensor& statistics, const OptTensor& seq_lens,
                                               const OptTensor& cu_seqlens, bool causal, double scale, double dropout_p,
                                               i64 seed, i64 offset, i64 window, const OptTensor& left_pad,
                                               const OptTensor& sinks, double softcap) {
  Call call(q, k, v, seq_lens, cu_seqlens, causal, scale, dropout_p, seed, offset, window, left_pad, sinks, softcap);
  AttentionParams& p = call.p;
  p.out = heads_of("out", out, p.H, p.T, q, &call.owners[5]);
  p.dout = heads_of("dout", dout, p.H, p.T, q, &call.owners[6]);
  check_device(kOp, "statistics", statistics, q);
  GPTFAST_CHECK(statistics.scalar_type() == ScalarType::Float && statistics.numel() == 2 * i64(p.B) * p.H * p.T, kOp,
                ": statistics must be float32 (2, B, H, T)");
  const Launch on(q);
  const Tensor rows = contiguous(kOp, statistics);
  Tensor delta = new_tensor(kOp, q, {p.B, p.H, p.T}, ScalarType::Float);
  set_statistics(p, rows);
  p.delta = floats(delta);
  Tensor again, statistics_again;  // of few queries: see causal_attention_fwd_tiles
  if (decode_attention_splits(p)) {
    again = new_heads(q, &p.y), statistics_again = new_tensor(kOp, q, {2, p.B, p.H, p.T}, ScalarType::Float);
    set_statistics(p, statistics_again);
    check(kOp, causal_attention_fwd_tiles(p, on.stream));
    p.out = {p.y.data, p.y.sb, p.y.sh, p.y.st};
  }
  Tensor dq = new_heads(q, &p.dq), dk = new_heads(k, &p.dk), dv = new_heads(k, &p.dv);
  Tensor dsinks = new_tensor(kOp, q, {sinks ? p.H : 0}, ScalarType::Float);
  if (sinks) p.dsinks = floats(dsinks);
  check(kOp, causal_attention_bwd(p, on.stream));
  return {dq, dk, dv, dsinks};
}

}  // namespace

GPTFAST_CUDA_IMPL(m) {
  m.impl("causal_attention_fwd", GPTFAST_BOX(&fwd));
  m.impl("causal_attention_bwd", GPTFAST_BOX(&bwd));
  m.impl("causal_attention_append", GPTFAST_BOX(&append));
}

}  // namespace gptfast::cuda
