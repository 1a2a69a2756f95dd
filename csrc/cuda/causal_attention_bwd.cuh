// Backward of causal_attention (FlashAttention-2, arXiv 2307.08691, section 3.1.2) by two kernels that sum in one fixed
// order and need no atomics, so gradients repeat bit for bit. With delta_i = sum_d out[i][d] dout[i][d], and P' after
// dropout:
//
//   P = exp2(c (q k^T - shift) - level)     dP = dout v^T     dS = P (keep dP / (1 - p) - delta)
//   query_gradient: a block has BM queries and meets all their keys      dq = scale dS k
//   key_gradients:  a block has BM keys and meets all their queries,
//                   of one query head of the group after another         dv = P'^T dout / (1 - p)     dk = scale dS^T q
//
// key_gradients forms S^T and dP^T, whose rows are keys: packed, they are the first operands of dv and dk.
//
// With a soft cap S = tanh(inner q k^T), c that of the cap, and dS has the factor 1 - S^2. The sink of a head has the weight
// p_i = exp2(sink log2(e) - c shift - level) in row i and the value 0: dsink = -sum_i p_i delta_i.
//
// Floor: 10 T S D flops a query head, half of them under a causal mask; this takes 14, as both kernels form S and dP.
#pragma once
#include "causal_attention_finite.cuh"
#include "causal_attention_softmax.cuh"
#include "causal_attention_tile.cuh"

namespace gptfast::cuda {
namespace {

// BM rows that a block keeps, BN rows of the other side that it loads at a time, in STAGES buffers, and meets NEAR at a
// time. OUT columns of results are summed at once. Scores and results of a warp must fit into registers.
template <class E_, int D_, int MT_, int WARPS_, int BN_, int STAGES_, int NEAR = BN_, int OUT_ = D_>
struct BackwardShape {
  using E = E_;
  static constexpr int D = D_, MT = MT_, BN = BN_, STAGES = STAGES_, OUT = OUT_;
  static constexpr int BM = 16 * MT * WARPS_, NT = NEAR / 8, THREADS = 32 * WARPS_;
  static constexpr int SMEM =
      2 * (BM + STAGES * BN) * Tile<E, D>::kRow + BM * int(sizeof(Range)) + 4 * WARPS_ + 12 * STAGES * BN;
};

// ---- dq -------------------------------------------------------------------------------------------------------------

template <class C>
__global__ void __launch_bounds__(C::THREADS, 1) query_gradient(const __grid_constant__ AttentionParams p) {
  using E = typename C::E;
  using T = Tile<E, C::D>;
  constexpr int MT = C::MT, BN = C::BN, NT = C::NT, STAGE = 2 * BN * T::kRow;
  static_assert(C::OUT == C::D && C::NT * 8 == BN);
  DYN_SMEM(smem);
  const T q{smem}, dout{q.data + C::BM * T::kRow};
  char* stages = dout.data + C::BM * T::kRow;  // k, then v
  Range* seen = reinterpret_cast<Range*>(stages + C::STAGES * STAGE);
  int* flags = reinterpret_cast<int*>(seen + C::BM);

  const int blocks = (p.T + C::BM - 1) / C::BM, bh = blockIdx.x / blocks, b = bh / p.H, h = bh % p.H;
  const int key_head = h / p.group;
  const int i0 = (blocks - 1 - int(blockIdx.x) % blocks) * C::BM;
  const int lane = threadIdx.x % 32, warp_row = int(threadIdx.x) / 32 * 16 * MT, row = i0 + warp_row + lane / 4;
  for (int r = threadIdx.x; r < C::BM; r += C::THREADS) seen[r] = visible_keys(p, b, i0 + r);
  __syncthreads();
  const Range first = seen[0], last = seen[min(C::BM, p.T - i0) - 1];
  const Range warp_first = seen[warp_row], warp_last = seen[warp_row + 16 * MT - 1];

  float shift[MT][2], level[MT][2], delta[MT][2], dq[MT][C::D / 8][4] = {};
  bool far = false;  // is any of the lane's shifts not 0?
#pragma unroll
  for (int n = 0; n < 2 * MT; n++) {
    const bool inside = row + 8 * n < p.T;
    const i64 query = i64(bh) * p.T + row + 8 * n;
    shift[n / 2][n % 2] = inside ? p.shift[query] : 0.f;
    level[n / 2][n % 2] = inside ? p.level[query] : 0.f;
    delta[n / 2][n % 2] = inside ? p.delta[query] : 0.f;
    far |= shift[n / 2][n % 2] != 0.f;
  }
  const float scale_log2 = score_scale_of(p) * kLog2e, kept = dropout_scale(p.dropout);

  auto load = [&](int j0, int stage) {
    const T k{stages + stage * STAGE}, v{k.data + BN * T::kRow};
    load_tile<BN, C::THREADS>(k, p, p.k, b, key_head, j0, p.S);
    load_tile<BN, C::THREADS>(v, p, p.v, b, key_head, j0, p.S);
  };
  const int j_begin = first.lo / BN * BN, j_end = last.hi;
  bool nonfinite = false;  // keys in tiles with masked elements
  load_tile<C::BM, C::THREADS>(q, p, p.q, b, h, i0, p.T);
  load_tile<C::BM, C::THREADS>(dout, p, p.dout, b, h, i0, p.T);
  if (C::STAGES == 2 && j_begin < j_end) load(j_begin, 0);
  cp_async_commit();
  for (int j0 = j_begin, stage = 0; j0 < j_end; j0 += BN, stage ^= C::STAGES - 1) {
    if (C::STAGES == 1) load(j0, 0);
    else if (j0 + BN < j_end) load(j0 + BN, stage ^ 1);
    cp_async_commit();
    cp_async_wait<C::STAGES - 1>();
    __syncthreads();
    const T k{stages + stage * STAGE}, v{k.data + BN * T::kRow};
    const bool edge = j0 < last.lo || j0 + BN > first.hi;
    const bool active = j0 < warp_last.hi && j0 + BN > warp_first.lo;
    float s[MT][NT][4] = {}, dp[MT][NT][4] = {};
    if (active) {
      multiply_rows<E, C::D>(s, q, warp_row, k, 0);
      multiply_rows<E, C::D>(dp, dout, warp_row, v, 0);
      if (p.dropout.threshold)
        each_decision<MT, NT>(p.dropout, bh, row, j0,
                              [&](int m, int n, int e, bool keep) { dp[m][n][e] = keep ? dp[m][n][e] * kept : 0.f; });
    }
    if (edge) {
      __syncthreads();  // all scores are formed
      const bool found = remove_nonfinite<BN, C::THREADS>(k, threadIdx.x);
      nonfinite |= any_found<C::THREADS / 32>(found, threadIdx.x / 32, flags, [] { __syncthreads(); });
    }
    if (active) {
      if (C::D > 128) {  // read for every tile, without a branch: there is no register left to keep them in
#pragma unroll
        for (int n = 0; n < 2 * MT; n++) {
          const i64 query = i64(bh) * p.T + row + 8 * n;
          shift[n / 2][n % 2] = row + 8 * n < p.T ? p.shift[query] : 0.f;
          level[n / 2][n % 2] = row + 8 * n < p.T ? p.level[query] : 0.f;
        }
      }
      if (p.softcap > 0.f) {
        each_element<MT, NT>([&](int m, int n, int e) {
          const float score = capped(p, s[m][n][e]);
          const float weight = fast_exp2(fmaf(score - shift[m][e / 2], scale_log2, -level[m][e / 2]));
          s[m][n][e] = weight * (dp[m][n][e] - delta[m][e / 2]) * fmaf(-score, score, 1.f);
        });
      } else {
        if (C::D > 128 || far) each_element<MT, NT>([&](int m, int n, int e) { s[m][n][e] -= shift[m][e / 2]; });
        each_element<MT, NT>([&](int m, int n, int e) {
          const float weight = fast_exp2(fmaf(s[m][n][e], scale_log2, -level[m][e / 2]));
          s[m][n][e] = weight * (dp[m][n][e] - delta[m][e / 2]);
        });
      }
      if (edge) mask(s, seen + warp_row, j0, 0.f);
      add_weighted<E>(dq, s, k, 0, 0);
    }
    __syncthreads();  // this stage has been used
  }
  cp_async_wait<0>();
  __syncthreads();

  float factor[MT][2];
#pragma unroll
  for (int n = 0; n < 2 * MT; n++) factor[n / 2][n % 2] = p.scale;
  result_to_tile<E>(dq, factor, q, warp_row);
  if (nonfinite) spread_nonfinite<16 * MT>(q, warp_row, seen + warp_row, p, p.k, b, key_head, 0);
  store_rows<16 * MT>(q, warp_row, p, p.dq, b, h, i0 + warp_row, p.T, 0);
}

// ---- dk and dv ------------------------------------------------------------------------------------------------------

template <class C>
__global__ void __launch_bounds__(C::THREADS, 1) key_gradients(const __grid_constant__ AttentionParams p) {
  using E = typename C::E;
  using T = Tile<E, C::D>;
  constexpr int MT = C::MT, BN = C::BN, NT = C::NT, STAGE = 2 * BN * T::kRow;
  DYN_SMEM(smem);
  const T k{smem}, v{k.data + C::BM * T::kRow};
  char* stages = v.data + C::BM * T::kRow;  // q, then dout
  Range* seen = reinterpret_cast<Range*>(stages + C::STAGES * STAGE);
  float* statistics = reinterpret_cast<float*>(seen + C::BM);  // of each stage: level, delta, shift

  constexpr int PARTS = C::D / C::OUT;  // blocks that share the columns of dk and dv
  const int blocks = (p.S + C::BM - 1) / C::BM, key_heads = p.H / p.group;
  const int b = int(blockIdx.x) / (blocks * PARTS) / key_heads,
            key_head = int(blockIdx.x) / (blocks * PARTS) % key_heads;
  const int j0 = int(blockIdx.x) / PARTS % blocks * C::BM, column0 = int(blockIdx.x) % PARTS * C::OUT;
  const int lane = threadIdx.x % 32, warp_row = int(threadIdx.x) / 32 * 16 * MT;
  for (int r = threadIdx.x; r < C::BM; r += C::THREADS) seen[r] = visible_queries(p, b, j0 + r);
  __syncthreads();
  const Range *first = seen, *last = seen + min(C::BM, p.S - j0) - 1;

  float dk[MT][C::OUT / 8][4] = {}, dv[MT][C::OUT / 8][4] = {};
  const float scale_log2 = score_scale_of(p) * kLog2e, kept = dropout_scale(p.dropout);
  const float kept_or_1 = p.dropout.threshold ? kept : 1.f;

  auto load = [&](int h, int i0, int stage) {
    const T q{stages + stage * STAGE}, dout{q.data + BN * T::kRow};
    load_tile<BN, C::THREADS>(q, p, p.q, b, h, i0, p.T);
    load_tile<BN, C::THREADS>(dout, p, p.dout, b, h, i0, p.T);
    for (int n = threadIdx.x; n < 3 * BN; n += C::THREADS) {
      const float* from = n < BN ? p.level : n < 2 * BN ? p.delta : p.shift;
      const int i = i0 + n % BN;
      cp_async<4>(smem_u32(statistics + stage * 3 * BN + n), from + (i < p.T ? i64(b * p.H + h) * p.T + i : 0),
                  i < p.T);
    }
  };
  const int i_begin = first->lo / BN * BN, end = (key_head + 1) * p.group;
  int h = i_begin < last->hi ? end - p.group : end;  // the query head whose tiles are met
  load_tile<C::BM, C::THREADS>(k, p, p.k, b, key_head, j0, p.S);
  load_tile<C::BM, C::THREADS>(v, p, p.v, b, key_head, j0, p.S);
  if (C::STAGES == 2 && h < end) load(h, i_begin, 0);
  cp_async_commit();
  for (int i0 = i_begin, next, next_h, stage = 0; h < end; i0 = next, h = next_h, stage ^= C::STAGES - 1) {
    next = i0 + BN, next_h = h;
    if (next >= last->hi) next = i_begin, next_h++;
    if (C::STAGES == 1) load(h, i0, 0);
    else if (next_h < end) load(next_h, next, stage ^ 1);
    cp_async_commit();
    cp_async_wait<C::STAGES - 1>();
    __syncthreads();
    const T q{stages + stage * STAGE}, dout{q.data + BN * T::kRow};
#pragma unroll 1
    for (int n0 = 0; n0 < BN; n0 += 8 * NT) {
      if (i0 + n0 >= seen[warp_row + 16 * MT - 1].hi || i0 + n0 + 8 * NT <= seen[warp_row].lo) continue;
      const float* tile = statistics + stage * 3 * BN + n0;
      const float *level = tile + lane % 4 * 2, *delta = level + BN, *shift = delta + BN;
      const bool edge = i0 + n0 < last->lo || i0 + n0 + 8 * NT > first->hi;
      float s[MT][NT][4] = {}, dp[MT][NT][4] = {};
      multiply_rows<E, C::D, true>(s, k, warp_row, q, n0);  // the scores whose maximum forward took
      multiply_rows<E, C::D, true>(dp, v, warp_row, dout, n0);
      if (any_far<8 * NT>(tile + 2 * BN) && !(p.softcap > 0.f))
        each_element<MT, NT>([&](int m, int n, int e) { s[m][n][e] -= shift[n * 8 + e % 2]; });
      if (!(p.softcap > 0.f))
        each_element<MT, NT>(
            [&](int m, int n, int e) { s[m][n][e] = fast_exp2(fmaf(s[m][n][e], scale_log2, -level[n * 8 + e % 2])); });
      auto slope = [&](int m, int n, int e, float d) { return s[m][n][e] * (d - delta[n * 8 + e % 2]); };
      // score -> weight and slope in one pass, as the slope needs both
      auto capped_slope = [&](int m, int n, int e, bool keep) {
        const float score = capped(p, s[m][n][e]), d = keep ? dp[m][n][e] * kept_or_1 : 0.f;
        const float weight = fast_exp2(fmaf(score - shift[n * 8 + e % 2], scale_log2, -level[n * 8 + e % 2]));
        dp[m][n][e] = weight * (d - delta[n * 8 + e % 2]) * fmaf(-score, score, 1.f);
        s[m][n][e] = keep ? weight : 0.f;
      };
      if (p.softcap > 0.f && p.dropout.threshold) {
        each_decision_transposed<MT, NT>(p.dropout, b * p.H + h, j0 + warp_row, i0 + n0, capped_slope);
      } else if (p.softcap > 0.f) {
        each_element<MT, NT>([&](int m, int n, int e) { capped_slope(m, n, e, true); });
      } else if (p.dropout.threshold) {
        each_decision_transposed<MT, NT>(p.dropout, b * p.H + h, j0 + warp_row, i0 + n0,
                                         [&](int m, int n, int e, bool keep) {
                                           dp[m][n][e] = slope(m, n, e, keep ? dp[m][n][e] * kept : 0.f);
                                           if (!keep) s[m][n][e] = 0.f;
                                         });
      } else {
        each_element<MT, NT>([&](int m, int n, int e) { dp[m][n][e] = slope(m, n, e, dp[m][n][e]); });
      }
      if (edge) mask(s, seen + warp_row, i0 + n0, 0.f), mask(dp, seen + warp_row, i0 + n0, 0.f);
      add_weighted<E>(dv, s, dout, n0, column0);
      add_weighted<E>(dk, dp, q, n0, column0);
    }
    __syncthreads();  // this stage has been used
  }
  cp_async_wait<0>();
  __syncthreads();

  float to_dk[MT][2], to_dv[MT][2];
#pragma unroll
  for (int n = 0; n < 2 * MT; n++) {
    to_dk[n / 2][n % 2] = p.scale;
    to_dv[n / 2][n % 2] = p.dropout.threshold ? kept : 1.f;
  }
  const Tile<E, C::OUT> dk_tile{k.data}, dv_tile{v.data};
  result_to_tile<E>(dk, to_dk, dk_tile, warp_row);
  result_to_tile<E>(dv, to_dv, dv_tile, warp_row);
  store_rows<16 * MT>(dk_tile, warp_row, p, p.dk, b, key_head, j0 + warp_row, p.S, column0);
  store_rows<16 * MT>(dv_tile, warp_row, p, p.dv, b, key_head, j0 + warp_row, p.S, column0);
}

}  // namespace
}  // namespace gptfast::cuda
