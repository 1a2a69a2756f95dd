// Forward of causal_attention on Hopper, head dims up to 128 in 16 bits: the sums of causal_attention_fwd.cu by TMA
// and wgmma (FlashAttention-3, arXiv 2407.08608). Warpgroup 0 loads tiles of k and v into rings of STAGES buffers; every
// other warpgroup has 64 queries of one head. Within one of these the product of the weights of tile i with v runs
// under the softmax of tile i + 1.
//
// Barriers in shared memory: q has landed; of each stage, k (v) has landed and k (v) has been used.
#include "causal_attention_sm90.cuh"

namespace gptfast::cuda {
namespace {

template <class E_, int D_, int CONSUMERS_> struct HopperShape {
  using E = E_;
  static constexpr int D = D_, CONSUMERS = CONSUMERS_, BM = 64 * CONSUMERS, BN = 128, STAGES = 2;
  static constexpr int Q_BYTES = BM * D * 2, K_BYTES = BN * D * 2, THREADS = 128 * (CONSUMERS + 1);
  static constexpr int BARRIERS = 1 + 4 * STAGES, WARPS = 4 * CONSUMERS;
  static constexpr int SMEM = Q_BYTES + 2 * STAGES * K_BYTES + BARRIERS * 8 + BM * int(sizeof(Range)) +
                              2 * WARPS * int(sizeof(int)) + 32 * WARPS * int(sizeof(float));
};
struct HopperMaps {
  CUtensorMap q, k, v, y;
};

template <class C, bool DROPOUT>
__global__ void HOPPER_BOUNDS(C::THREADS)
    attention_forward_sm90(const __grid_constant__ AttentionParams p, const __grid_constant__ HopperMaps maps,
                           int together) {
#if defined(GPTFAST_HOPPER)
  using E = typename C::E;
  constexpr int D = C::D, BM = C::BM, BN = C::BN, STAGES = C::STAGES, CONSUMERS = C::CONSUMERS, PANELS = D / 64;
  DYN_SMEM(smem);
  char* const k_data = smem + C::Q_BYTES;
  char* const v_data = k_data + STAGES * C::K_BYTES;
  const uint32_t q_at = smem_u32(smem), k_at = smem_u32(k_data), v_at = smem_u32(v_data);
  const uint32_t q_full = v_at + STAGES * C::K_BYTES;
  auto k_full = [&](int stage) { return q_full + 8 + stage * 8; };
  auto v_full = [&](int stage) { return q_full + 8 + (STAGES + stage) * 8; };
  auto k_free = [&](int stage) { return q_full + 8 + (2 * STAGES + stage) * 8; };
  auto v_free = [&](int stage) { return q_full + 8 + (3 * STAGES + stage) * 8; };
  Range* seen = reinterpret_cast<Range*>(v_data + STAGES * C::K_BYTES + C::BARRIERS * 8);
  int* flags = reinterpret_cast<int*>(seen + BM);

  // late queries, which see the most keys, first
  const int blocks = (p.T + BM - 1) / BM;
  const Place place = place_of(int(blockIdx.x), blocks, p.B * p.H, together);
  const int bh = place.matrix, b = bh / p.H, h = bh % p.H, key_head = h / p.group;
  const int i0 = (blocks - 1 - place.block) * BM;
  const Range first = visible_keys(p, b, i0), last = visible_keys(p, b, min(i0 + BM, p.T) - 1);
  const int j_first = first.lo / BN, tiles = last.hi > j_first * BN ? (last.hi + BN - 1) / BN - j_first : 0;
  auto column = [&](int i) { return (j_first + tiles - 1 - i) * BN; };  // tiles from right to left: masked ones first
  auto load = [&](uint32_t to, const CUtensorMap& map, uint32_t barrier, int head, int row, int rows) {
    mbarrier_expect(barrier, rows * D * 2);
    for (int panel = 0; panel < PANELS; panel++)
      tma_load(to + panel * rows * 128, &map, barrier, panel * 64, row, head, b);
  };
  auto load_keys = [&](int i) {
    load(k_at + i % STAGES * C::K_BYTES, maps.k, k_full(i % STAGES), key_head, column(i), BN);
  };
  auto load_values = [&](int i) {
    load(v_at + i % STAGES * C::K_BYTES, maps.v, v_full(i % STAGES), key_head, column(i), BN);
  };
  if (threadIdx.x == 0) {
    mbarrier_init(q_full, 1);
    for (int s = 0; s < STAGES; s++) {
      mbarrier_init(k_full(s), 1), mbarrier_init(v_full(s), 1);
      mbarrier_init(k_free(s), CONSUMERS), mbarrier_init(v_free(s), CONSUMERS);
    }
    mbarrier_init_fence();
    if (tiles) load(q_at, maps.q, q_full, h, i0, BM);  // under way while the others look at the masks
    for (int i = 0; i < min(tiles, STAGES); i++) load_keys(i), load_values(i);
  }
  for (int r = threadIdx.x; r < BM; r += C::THREADS) seen[r] = visible_keys(p, b, i0 + r);
  __syncthreads();

  if (threadIdx.x < 128) {  // ---- loads
    setmaxnreg_dec<CONSUMERS == 2 ? 24 : 32>();
    if (threadIdx.x != 0) return;
    for (int i = STAGES; i < tiles; i++) {
      const int stage = i % STAGES, parity = (i / STAGES - 1) & 1;
      mbarrier_wait(k_free(stage), parity);
      load_keys(i);
      mbarrier_wait(v_free(stage), parity);
      load_values(i);
    }
    return;
  }

  // ---- 64 queries
  setmaxnreg_inc<CONSUMERS == 2 ? 240 : 160>();
  const int warp = warp_number() - 4, w = warp / 4, lane = threadIdx.x % 32;
  const int warp_row = warp * 16, row = i0 + warp_row + lane / 4;
  const bool leader = threadIdx.x % 128 == 0;
  // of the tiles those from `begin` on, before `end`, hold keys that a query of this warpgroup sees; past T it has none
  int begin = tiles, end = tiles;
  if (i0 + w * 64 < p.T) {
    const int from = seen[w * 64].lo, to = seen[min(w * 64 + 63, p.T - i0 - 1)].hi;
    if (to > from) begin = j_first + tiles - (to + BN - 1) / BN, end = j_first + tiles - from / BN;
  }
  const float scale_log2 = scale_log2_of(p);
  float o[1][D / 8][4] = {}, s[1][BN / 8][4], l[1][2] = {}, m[1][2] = {{-INFINITY, -INFINITY}}, rescale[1][2];
  uint32_t weights[BN / 16][4];

  auto multiply_keys = [&](int stage) {  // s = q k^T
    const uint64_t q = smem_descriptor(q_at + w * 64 * 128, 16, 1024);
    const uint64_t keys = smem_descriptor(k_at + stage * C::K_BYTES, 16, 1024);
#pragma unroll
    for (int k = 0; k < D / 16; k++) {
      const int at = k % 4 * 32, panel = k / 4;
      wgmma<E, 0, 0>(s[0], moved(q, panel * BM * 128 + at), moved(keys, panel * BN * 128 + at), k != 0);
    }
    wgmma_commit();
  };
  auto add_values = [&](int stage) {  // o += weights v
    const uint64_t values = smem_descriptor(v_at + stage * C::K_BYTES, BN * 128, 1024);
#pragma unroll
    for (int k = 0; k < BN / 16; k++) wgmma<E, 1>(o[0], weights[k], moved(values, k * 16 * 128), 1);
    wgmma_commit();
  };
  auto is_edge = [&](int j0) { return j0 < last.lo || j0 + BN > first.hi; };
  auto weigh = [&](int j0) {  // s -> weights
    if (is_edge(j0)) mask(s, seen + warp_row, j0, -INFINITY);
    softmax(s, m, l, rescale, scale_log2);
    if constexpr (DROPOUT)
      each_decision<1, BN / 8>(p.dropout, bh, row, j0, [&](int, int n, int e, bool keep) {
        if (!keep) s[0][n][e] = 0.f;
      });
  };
  auto pack = [&] {
#pragma unroll
    for (int k = 0; k < BN / 16; k++) result_as_a<E>(weights[k], s[0][2 * k], s[0][2 * k + 1]);
  };
  const uint32_t scratch = smem_u32(flags + 2 * C::WARPS) + (threadIdx.x - 128) * 4;
  bool nonfinite = false;  // values in tiles with masked elements
  int edges = 0;           // of them so far: flags alternate, as a warp may be one tile ahead of another
  auto wait_for_values = [&](int i) {
    const int stage = i % STAGES;
    mbarrier_wait(v_full(stage), (i / STAGES) & 1);
    if (!is_edge(column(i))) return;
    bool found = false;
    for (int panel = 0; panel < PANELS; panel++) {
      const Tile<E, 64> v{v_data + stage * C::K_BYTES + panel * BN * 128};
      found |= remove_nonfinite<BN, 128 * CONSUMERS>(v, int(threadIdx.x) - 128);
    }
    if (found) fence_proxy_async();  // before wgmma reads what was written here
    nonfinite |=
        any_found<C::WARPS>(found, warp, flags + edges++ % 2 * C::WARPS, [] { named_barrier(1, 128 * C::CONSUMERS); });
  };

  auto pass = [&](int i) {  // a tile that others of the block need; no product keeps the warps together here
    mbarrier_wait(k_full(i % STAGES), (i / STAGES) & 1);
    wait_for_values(i);
    named_barrier(2 + w, 128);
    if (leader) mbarrier_arrive(k_free(i % STAGES)), mbarrier_arrive(v_free(i % STAGES));
  };

  if (tiles) mbarrier_wait(q_full, 0);
  for (int i = 0; i < begin; i++) pass(i);
  if (begin < end) {
    mbarrier_wait(k_full(begin % STAGES), (begin / STAGES) & 1);
    wgmma_fence();
    multiply_keys(begin % STAGES);
    wgmma_wait<0>();
    if (leader) mbarrier_arrive(k_free(begin % STAGES));
    weigh(column(begin));
    pack();
    wait_for_values(begin);
    for (int i = begin + 1; i < end; i++) {
      const int stage = i % STAGES, before = (i - 1) % STAGES;
      mbarrier_wait(k_full(stage), (i / STAGES) & 1);
      wgmma_fence();
      multiply_keys(stage);
      add_values(before);
      wgmma_wait<1>();
      if (leader) mbarrier_arrive(k_free(stage));
      weigh(column(i));
      finish_before_wait(scratch, l[0][0] + l[0][1]);
      wgmma_wait<0>();
      if (leader) mbarrier_arrive(v_free(before));
      each_element<1, D / 8>([&](int, int n, int e) { o[0][n][e] *= rescale[0][e / 2]; });
      pack();
      wait_for_values(i);
    }
    wgmma_fence();
    add_values((end - 1) % STAGES);
    wgmma_wait<0>();
    if (leader) mbarrier_arrive(v_free((end - 1) % STAGES));
  }
  for (int i = end; i < tiles; i++) pass(i);

  // through this warp's own rows of q, which only its warpgroup has read
  float factor[1][2];
  finish_softmax(m, l, factor, p, bh, row);
#pragma unroll
  for (int panel = 0; panel < PANELS; panel++) {
    float part[1][8][4];
    each_element<1, 8>([&](int, int n, int e) { part[0][n][e] = o[0][panel * 8 + n][e]; });
    const Tile<E, 64> tile{smem + panel * BM * 128};
    result_to_tile<E>(part, factor, tile, warp_row);
    if (nonfinite) spread_nonfinite<16>(tile, warp_row, seen + warp_row, p, p.v, b, key_head, panel * 64);
  }
  fence_proxy_async();
  __syncwarp();
  if (lane == 0) {  // rows past T are left out
    for (int panel = 0; panel < PANELS; panel++)
      tma_store(&maps.y, q_at + (panel * BM + warp_row) * 128, panel * 64, i0 + warp_row, h, b);
    tma_commit();
    tma_wait_read<0>();
  }
#else
  __trap();
#endif
}

template <class C, bool DROPOUT> cudaError_t launch(const AttentionParams& p, cudaStream_t stream) {
  auto kernel = attention_forward_sm90<C, DROPOUT>;
  if (const cudaError_t error = allow_smem(kernel, C::SMEM)) return error;  // makes a context current, which maps need
  HopperMaps maps;
  const int key_heads = p.H / p.group;
  if (!map_of(&maps.q, p, p.q, p.H, p.T, C::BM) || !map_of(&maps.k, p, p.k, key_heads, p.S, C::BN) ||
      !map_of(&maps.v, p, p.v, key_heads, p.S, C::BN) || !map_of(&maps.y, p, p.y, p.H, p.T, 16))
    return kMapRefused;
  const int together = matrices_together(p.B * p.H, p.group, 4 * i64(p.S) * p.D);
  LAUNCH(kernel, dim3(unsigned(ceil_div(p.T, C::BM) * p.B * p.H)), dim3(C::THREADS), C::SMEM, stream, p, maps,
         together);
  return cudaGetLastError();
}
template <class E> cudaError_t launch_shape(const AttentionParams& p, cudaStream_t stream) {
  if (p.D > 64)
    return p.dropout.threshold ? launch<HopperShape<E, 128, 2>, true>(p, stream)
                               : launch<HopperShape<E, 128, 2>, false>(p, stream);
  // three warpgroups have 160 registers a thread, too few for the dropout bits
  return p.dropout.threshold ? launch<HopperShape<E, 64, 2>, true>(p, stream)
                             : launch<HopperShape<E, 64, 3>, false>(p, stream);
}

}  // namespace

bool causal_attention_fwd_sm90_takes(const AttentionParams& p) {
  using C = HopperShape<bf16, 128, 2>;
  static HopperGpus gpus(attention_forward_sm90<C, false>, C::THREADS, C::SMEM);
  const int key_heads = has_hopper_shape(p) ? p.H / p.group : 0;
  return key_heads && has_map(p, p.q, p.H, p.T) && has_map(p, p.k, key_heads, p.S) && has_map(p, p.v, key_heads, p.S) &&
         gpus.has_current();
}

cudaError_t causal_attention_fwd_sm90(const AttentionParams& p, cudaStream_t stream) {
  return p.dtype == DType::f16 ? launch_shape<__half>(p, stream) : launch_shape<bf16>(p, stream);
}

}  // namespace gptfast::cuda
