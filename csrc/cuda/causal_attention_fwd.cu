// Forward of causal_attention: out = softmax(scale q k^T + mask) v by tiles of queries and keys with a running maximum
// and sum per query (Milakov and Gimelshein, arXiv 1805.02867; FlashAttention-2, arXiv 2307.08691).
//
// One block has BM queries of one head; a warp has 16 MT of them and all keys of a tile, so a row of scores lies in the
// four lanes of a quad. k is loaded while the tile before is weighed, v while q k^T is formed.
//
// Floor: 4 T S D flops a query head on tensor cores, half of them under a causal mask. The blocks of the query heads that
// share a key head follow one another, so memory is asked for k and v once a group, and L2 for the rest.
#include "causal_attention_finite.cuh"
#include "causal_attention_softmax.cuh"
#include "causal_attention_tile.cuh"

namespace gptfast::cuda {
namespace {

template <class E_, int D_, int MT_, int WARPS_, int BN_> struct ForwardShape {
  using E = E_;
  static constexpr int D = D_, MT = MT_, BN = BN_, BM = 16 * MT * WARPS_, NT = BN / 8, THREADS = 32 * WARPS_;
  static constexpr int SMEM = (BM + 2 * BN) * Tile<E, D>::kRow + BM * int(sizeof(Range)) + 4 * WARPS_;
};

template <class C>
__global__ void __launch_bounds__(C::THREADS, 1) attention_forward(const __grid_constant__ AttentionParams p) {
  using E = typename C::E;
  using T = Tile<E, C::D>;
  constexpr int MT = C::MT, BN = C::BN;
  DYN_SMEM(smem);
  const T q{smem}, k{q.data + C::BM * T::kRow}, v{k.data + BN * T::kRow};
  Range* seen = reinterpret_cast<Range*>(v.data + BN * T::kRow);
  int* flags = reinterpret_cast<int*>(seen + C::BM);

  // late queries, which see the most keys, first
  const int blocks = (p.T + C::BM - 1) / C::BM, bh = blockIdx.x / blocks, b = bh / p.H, h = bh % p.H;
  const int key_head = h / p.group;
  const int i0 = (blocks - 1 - int(blockIdx.x) % blocks) * C::BM;
  const int lane = threadIdx.x % 32, warp_row = int(threadIdx.x) / 32 * 16 * MT, row = i0 + warp_row + lane / 4;
  load_tile<C::BM, C::THREADS>(q, p, p.q, b, h, i0, p.T);
  for (int r = threadIdx.x; r < C::BM; r += C::THREADS) seen[r] = visible_keys(p, b, i0 + r);
  __syncthreads();
  const Range first = seen[0], last = seen[min(C::BM, p.T - i0) - 1];
  const Range warp_first = seen[warp_row], warp_last = seen[warp_row + 16 * MT - 1];

  const int j_begin = first.lo / BN * BN, j_end = last.hi;
  const float scale_log2 = scale_log2_of(p);
  float o[MT][C::D / 8][4] = {}, l[MT][2] = {}, m[MT][2];
#pragma unroll
  for (int n = 0; n < 2 * MT; n++) m[n / 2][n % 2] = -INFINITY;

  bool nonfinite = false;  // in tiles with masked elements
  int j0 = j_end <= j_begin ? j_begin - BN : (j_end - 1) / BN * BN;
  if (j0 >= j_begin) load_tile<BN, C::THREADS>(k, p, p.k, b, key_head, j0, p.S);
  cp_async_commit();
  for (; j0 >= j_begin; j0 -= BN) {
    cp_async_wait<0>();
    __syncthreads();  // k has landed, v has been used
    load_tile<BN, C::THREADS>(v, p, p.v, b, key_head, j0, p.S);
    cp_async_commit();
    const bool edge = j0 < last.lo || j0 + BN > first.hi;
    const bool active = j0 < warp_last.hi && j0 + BN > warp_first.lo;
    float s[MT][C::NT][4] = {};
    if (active) multiply_rows<E, C::D>(s, q, warp_row, k, 0);
    cp_async_wait<0>();
    __syncthreads();  // v has landed, k has been used
    if (j0 > j_begin) load_tile<BN, C::THREADS>(k, p, p.k, b, key_head, j0 - BN, p.S);
    cp_async_commit();
    if (edge) {
      const bool found = remove_nonfinite<BN, C::THREADS>(v, threadIdx.x);
      nonfinite |= any_found<C::THREADS / 32>(found, threadIdx.x / 32, flags, [] { __syncthreads(); });
    }
    if (!active) continue;
    if (p.softcap > 0.f) each_element<MT, C::NT>([&](int i, int n, int e) { s[i][n][e] = capped(p, s[i][n][e]); });
    if (edge) mask(s, seen + warp_row, j0, -INFINITY);
    float rescale[MT][2];
    softmax(s, m, l, rescale, scale_log2);
    each_element<MT, C::D / 8>([&](int i, int n, int e) { o[i][n][e] *= rescale[i][e / 2]; });
    if (p.dropout.threshold)
      each_decision<MT, C::NT>(p.dropout, bh, row, j0, [&](int i, int n, int e, bool keep) {
        if (!keep) s[i][n][e] = 0.f;
      });
    add_weighted<E>(o, s, v, 0, 0);
  }
  cp_async_wait<0>();
  __syncthreads();  // q has been used, also where there was no key

  float factor[MT][2];
  finish_softmax(m, l, factor, p, p.dropout.threshold ? dropout_scale(p.dropout) : 1.f, bh, row);
  result_to_tile<E>(o, factor, q, warp_row);
  if (nonfinite) spread_nonfinite<16 * MT>(q, warp_row, seen + warp_row, p, p.v, b, key_head, 0);
  store_rows<16 * MT>(q, warp_row, p, p.y, b, h, i0 + warp_row, p.T, 0);
}

template <class C> cudaError_t launch(const AttentionParams& p, cudaStream_t stream) {
  auto kernel = attention_forward<C>;
  if (const cudaError_t error = allow_smem(kernel, C::SMEM)) return error;
  LAUNCH(kernel, dim3(unsigned(ceil_div(p.T, C::BM) * p.B * p.H)), dim3(C::THREADS), C::SMEM, stream, p);
  return cudaGetLastError();
}

}  // namespace

cudaError_t causal_attention_fwd_sm80(const AttentionParams& p, cudaStream_t stream) {
  return with_dtype(p.dtype, [&](auto element) {
    using E = decltype(element);
    if constexpr (sizeof(E) == 4) {  //                 D  MT warps BN
      if (p.D <= 32) return launch<ForwardShape<E, 32, 1, 4, 32>>(p, stream);
      if (p.D <= 64) return launch<ForwardShape<E, 64, 1, 4, 32>>(p, stream);
      if (p.D <= 128) return launch<ForwardShape<E, 128, 1, 4, 32>>(p, stream);
      return launch<ForwardShape<E, 256, 1, 2, 16>>(p, stream);
    } else {
      if (p.D <= 32) return launch<ForwardShape<E, 32, 2, 4, 64>>(p, stream);
      if (p.D <= 64) return launch<ForwardShape<E, 64, 2, 4, 64>>(p, stream);
      if (p.D <= 128) return launch<ForwardShape<E, 128, 2, 4, 32>>(p, stream);
      return launch<ForwardShape<E, 256, 1, 4, 64>>(p, stream);
    }
  });
}

}  // namespace gptfast::cuda
