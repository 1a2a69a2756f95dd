// causal_attention, forward and backward.
#include "check.h"

namespace gptfast::checks {
namespace {

const cpu::Kernels& k() { return cpu::kernels(); }
i64 ceil_div(i64 a, i64 b) { return (a + b - 1) / b; }

struct Case {
  i64 B = 1, H = 2, T = 5, S = 5, D = 8, group = 1, window = 0;
  bool causal = true, dropout = false, hostile = false;  // hostile: keys that nobody sees are nan
  std::vector<i64> seq_lens = {}, cu_seqlens = {}, left_pad = {};
  i64 slices = 1;
  bool sinks = false;
  double softcap = 0;
};

struct Attention {
  static constexpr uint64_t kSeed = 99;
  static constexpr uint32_t kThreshold = 13107;
  const Case c;
  const DType type;
  const i64 key_heads = c.H / c.group, q_size = c.B * c.H * c.T * c.D, k_size = c.B * key_heads * c.S * c.D;
  Array q{type, q_size}, key{type, k_size}, value{type, k_size}, dout{type, q_size}, out{type, q_size};
  Array dq{type, q_size}, dk{type, k_size}, dv{type, k_size};
  Array shift{DType::f32, c.B * c.H * c.T}, level{DType::f32, c.B * c.H * c.T};
  const i64 blocks = ceil_div(c.T * c.group, cpu::kAttentionBlock);
  Array sinks{DType::f32, c.H}, dsinks{DType::f32, c.B * blocks * c.H};
  cpu::AttentionParams p{};

  Attention(const Case& shape, DType t) : c(shape), type(t) {
    Random random(uint64_t(c.T * 100 + c.S * 10 + c.D));
    q.fill(random, 1), key.fill(random, 1), value.fill(random, 1), dout.fill(random, 1);
    for (i64 b = 0; c.hostile && b < c.B; b++)
      for (i64 h = 0; h < key_heads; h++)
        for (i64 j = c.seq_lens[size_t(b)]; j < c.S; j++)
          for (i64 d = 0; d < c.D; d++) key.set(k_at(b, h, j) + d, NAN), value.set(k_at(b, h, j) + d, NAN);
    const i64 sh = c.T * c.D, kh = c.S * c.D;  // (B, H, T, D)
    p.B = c.B, p.H = c.H, p.T = c.T, p.S = c.S, p.D = c.D, p.group = c.group, p.dtype = type, p.window = c.window;
    p.q = {q.data(), c.H * sh, sh, c.D}, p.k = {key.data(), key_heads * kh, kh, c.D};
    p.v = {value.data(), key_heads * kh, kh, c.D}, p.out = {out.data(), c.H * sh, sh, c.D};
    p.dout = {dout.data(), c.H * sh, sh, c.D}, p.y = {out.data(), c.H * sh, sh, c.D};
    p.dq = {dq.data(), c.H * sh, sh, c.D}, p.dk = {dk.data(), key_heads * kh, kh, c.D};
    p.dv = {dv.data(), key_heads * kh, kh, c.D};
    p.shift = shift.floats(), p.level = level.floats(), p.causal = c.causal,
    p.scale = float(1 / std::sqrt(double(c.D)));
    if (!c.seq_lens.empty()) p.seq_lens = c.seq_lens.data();
    if (!c.left_pad.empty()) p.left_pad = c.left_pad.data();
    if (c.sinks) sinks.fill(random, 2), p.sinks = sinks.floats(), p.dsinks = dsinks.floats();
    p.softcap = float(c.softcap);
    if (!c.cu_seqlens.empty()) p.cu_seqlens = c.cu_seqlens.data(), p.documents = i64(c.cu_seqlens.size()) - 1;
    if (c.dropout) p.dropout = {kSeed, 4, kThreshold, 0, 0};
  }
  i64 q_at(i64 b, i64 h, i64 i) const { return ((b * c.H + h) * c.T + i) * c.D; }
  i64 k_at(i64 b, i64 h, i64 j) const { return ((b * key_heads + h) * c.S + j) * c.D; }
  bool sees(i64 b, i64 i, i64 j) const {
    const i64 last = i + c.S - c.T;
    if ((c.causal && j > last) || (c.window && j < last - c.window + 1)) return false;
    if (!c.seq_lens.empty() && j >= c.seq_lens[size_t(b)]) return false;
    if (!c.left_pad.empty() && j < c.left_pad[size_t(b)]) return false;
    for (size_t n = 0; n + 1 < c.cu_seqlens.size(); n++)
      if ((c.cu_seqlens[n] <= i) != (c.cu_seqlens[n] <= j)) return false;
    return true;
  }
  double keeps(i64 b, i64 h, i64 i, i64 j) const {
    return !c.dropout ? 1 : kept(kSeed, 4, kThreshold, b * c.H + h, i, j) ? kept_scale(kThreshold) : 0;
  }
  double dot(const Array& x, i64 at, const Array& y, i64 to) const {
    double sum = 0;
    for (i64 d = 0; d < c.D; d++) sum += x[at + d] * y[to + d];
    return sum;
  }
  // What the soft cap leaves of 1 between a score and -1 or 1, in units of the cap.
  double capped(i64 b, i64 h, i64 i, i64 j) const {
    return std::tanh(dot(q, q_at(b, h, i), key, k_at(b, h / c.group, j)) * double(p.scale) / c.softcap);
  }
  double score(i64 b, i64 h, i64 i, i64 j) const {
    if (c.softcap > 0) return c.softcap * capped(b, h, i, j);
    return dot(q, q_at(b, h, i), key, k_at(b, h / c.group, j)) * double(p.scale);
  }
  // Probabilities of query i, by key, then that of the sink; all 0 where it sees none and has no sink.
  std::vector<double> probabilities(i64 b, i64 h, i64 i) const {
    std::vector<double> w(size_t(c.S) + 1, 0.);
    double top = c.sinks ? sinks[h] : -INFINITY, sum = 0;
    for (i64 j = 0; j < c.S; j++)
      if (sees(b, i, j)) top = std::max(top, w[size_t(j)] = score(b, h, i, j));
    for (i64 j = 0; j < c.S; j++) sum += w[size_t(j)] = sees(b, i, j) ? std::exp(w[size_t(j)] - top) : 0;
    if (c.sinks) sum += w.back() = std::exp(sinks[h] - top);
    for (double& x : w) x = sum > 0 ? x / sum : 0;
    return w;
  }
  std::string what(const char* pass) const {
    std::string text(pass);
    for (const auto& [name, n] :
         {std::pair<const char*, i64>{" T", c.T}, {" S", c.S}, {" D", c.D}, {" group", c.group}, {" window", c.window}})
      text += name + std::to_string(n);
    return text + (c.dropout ? " dropout" : "") + (c.hostile ? " nan" : "") + (c.causal ? "" : " full");
  }

  void forward() {
    const i64 blocks = ceil_div(c.T * c.group, cpu::kAttentionBlock);
    for (i64 bh = 0; bh < c.B * key_heads; bh++)
      for (i64 first = 0; first < std::min<i64>(2, blocks); first++)
        k().causal_attention_fwd(p, bh, first, std::min<i64>(2, blocks));
    Check check(what("attention_fwd"), type);
    for (i64 b = 0; b < c.B; b++)
      for (i64 h = 0; h < c.H; h++)
        for (i64 i = 0; i < c.T; i++) {
          const std::vector<double> w = probabilities(b, h, i);
          for (i64 d = 0; d < c.D; d++) {
            double sum = 0;
            for (i64 j = 0; j < c.S; j++)
              if (sees(b, i, j)) sum += w[size_t(j)] * keeps(b, h, i, j) * value[k_at(b, h / c.group, j) + d];
            check.stored(type, out[q_at(b, h, i) + d], sum, type == DType::bf16 ? 1.5e-2 : 5e-6, 1e-5);
          }
        }
    check.holds(out.intact() && shift.intact() && level.intact(), "wrote beside its rows");
  }

  void backward() {
    Array partial(DType::f32, c.B * key_heads * c.slices * 2 * c.S * ceil_div(c.D, 16) * 16, true);
    if (c.slices > 1) p.partial = partial.floats();
    for (i64 bh = 0; bh < c.B * key_heads; bh++)
      for (i64 slice = 0; slice < c.slices; slice++) k().causal_attention_bwd(p, bh, slice, c.slices);
    for (i64 bh = 0; c.slices > 1 && bh < c.B * key_heads; bh++) k().causal_attention_bwd_sum(p, bh, c.slices);
    std::vector<double> want_q(static_cast<size_t>(q_size)), want_k(static_cast<size_t>(k_size)), want_v = want_k;
    std::vector<double> want_sinks(static_cast<size_t>(c.H));
    for (i64 b = 0; b < c.B; b++)
      for (i64 h = 0; h < c.H; h++)
        for (i64 i = 0; i < c.T; i++) gradients(b, h, i, want_q, want_k, want_v, want_sinks);
    Check check(what("attention_bwd"), type);
    const double room = type == DType::bf16 ? 6e-2 : type == DType::f16 ? 4e-3 : 2e-5;
    for (i64 i = 0; i < q_size; i++) check.stored(type, dq[i], want_q[size_t(i)], room, 1e-4);
    for (i64 i = 0; i < k_size; i++) {
      check.stored(type, dk[i], want_k[size_t(i)], room, 1e-4);
      check.stored(type, dv[i], want_v[size_t(i)], room, 1e-4);
    }
    for (i64 h = 0; c.sinks && h < c.H; h++) {
      double sum = 0;
      for (i64 n = 0; n < c.B * blocks; n++) sum += dsinks[n * c.H + h];
      check.stored(DType::f32, sum, want_sinks[size_t(h)], room, 1e-3);
    }
    check.holds(dq.intact() && dk.intact() && dv.intact() && partial.intact() && dsinks.intact(),
                "wrote beside its rows");
  }
  // Those of one query; delta is of the output as the forward stored it.
  void gradients(i64 b, i64 h, i64 i, std::vector<double>& want_q, std::vector<double>& want_k,
                 std::vector<double>& want_v, std::vector<double>& want_sinks) const {
    const std::vector<double> w = probabilities(b, h, i);
    const i64 at = q_at(b, h, i);
    const double delta = dot(out, at, dout, at);
    want_sinks[size_t(h)] -= w.back() * delta;
    for (i64 j = 0; j < c.S; j++) {
      if (!sees(b, i, j)) continue;
      const i64 to = k_at(b, h / c.group, j);
      const double keep = keeps(b, h, i, j), cap = c.softcap > 0 ? 1 - capped(b, h, i, j) * capped(b, h, i, j) : 1,
                   slope = w[size_t(j)] * (keep * dot(dout, at, value, to) - delta) * double(p.scale) * cap;
      for (i64 d = 0; d < c.D; d++) {
        want_v[size_t(to + d)] += w[size_t(j)] * keep * dout[at + d];
        want_q[size_t(at + d)] += slope * key[to + d];
        want_k[size_t(to + d)] += slope * q[at + d];
      }
    }
  }
};

}  // namespace

void check_attention() {
  std::vector<Case> cases = {
      {.T = 1, .S = 1, .D = 1},
      {.T = 3, .S = 67, .D = 7},
      {.T = 70, .S = 70, .D = 17},
      {.T = 1, .S = 131, .D = 64},
      {.T = 66, .S = 66, .D = 33, .dropout = true},
      {.B = 2, .H = 4, .T = 19, .S = 21, .D = 12, .group = 2, .dropout = true},
      {.H = 1, .T = 40, .S = 40, .D = 16, .window = 9},
      {.B = 2, .T = 20, .S = 30, .D = 9, .causal = false, .hostile = true, .seq_lens = {0, 13}},
      {.H = 1, .T = 37, .S = 37, .D = 11, .cu_seqlens = {0, 5, 5, 30, 37}},
      {.H = 1, .T = 8, .S = 3, .D = 5},  // queries before the first key
      {.H = 1, .T = 150, .S = 150, .D = 6, .slices = 3},
      {.B = 2, .H = 4, .T = 37, .S = 45, .D = 16, .group = 2, .window = 20, .dropout = true, .sinks = true},
      {.B = 2, .T = 30, .S = 30, .D = 8, .causal = false, .seq_lens = {30, 21}, .left_pad = {30, 4}, .sinks = true},
      {.H = 1, .T = 70, .S = 131, .D = 12, .softcap = 0.8},
      {.H = 2, .T = 90, .S = 90, .D = 7, .group = 2, .dropout = true, .slices = 2, .sinks = true, .softcap = 2},
  };
  for (const Case& c : cases)
    for (DType type : kTypes) {
      Attention attention(c, type);
      attention.forward();
      attention.backward();
    }
}

}  // namespace gptfast::checks
