// Forward of causal_attention on Hopper: which calls the kernel of causal_attention_fwd_sm90.cuh takes, and its launch.
#include "causal_attention_fwd_sm90.cuh"

namespace gptfast::cuda {
namespace {

template <class C, bool DROPOUT> cudaError_t launch(const AttentionParams& p, cudaStream_t stream) {
  auto kernel = attention_forward_sm90<C, DROPOUT>;
  if (const cudaError_t error = allow_smem(kernel, C::SMEM)) return error;  // makes a context current, which maps need
  HopperMaps maps;
  const int key_heads = p.H / p.group;
  if (!map_of(&maps.q, p, p.q, p.H, p.T, C::BM) || !map_of(&maps.k, p, p.k, key_heads, p.S, C::BN) ||
      !map_of(&maps.v, p, p.v, key_heads, p.S, C::BN) || !map_of(&maps.y, p, p.y, p.H, p.T, 16))
    return kMapRefused;
  Schedule schedule;
  if (const cudaError_t error = schedule_of(&schedule, p, p.T, C::BM, p.B * p.H, p.group, 4 * i64(p.S) * p.D))
    return error;
  LAUNCH(kernel, dim3(schedule.grid), dim3(C::THREADS), C::SMEM, stream, p, maps, hopper_dropout(p.dropout), schedule);
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
