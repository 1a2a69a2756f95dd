// Backward of causal_attention on Hopper: which calls the kernels of causal_attention_bwd_sm90.cuh take, and their launches.
#include "causal_attention_bwd_sm90.cuh"

namespace gptfast::cuda {
namespace {

template <class C, bool DROPOUT> cudaError_t launch(const AttentionParams& p, cudaStream_t stream) {
  const Heads &a0 = C::KEYS ? p.k : p.q, &a1 = C::KEYS ? p.v : p.dout;
  const Heads &b0 = C::KEYS ? p.q : p.k, &b1 = C::KEYS ? p.dout : p.v;
  const int rows = C::KEYS ? p.S : p.T, others = C::KEYS ? p.T : p.S, key_heads = p.H / p.group;
  const int heads = C::KEYS ? key_heads : p.H, other_heads = C::KEYS ? p.H : key_heads;
  auto kernel = attention_backward_sm90<C, DROPOUT>;
  if (const cudaError_t error = allow_smem(kernel, C::SMEM)) return error;  // makes a context current, which maps need
  BackwardMaps maps;
  if (!map_of(&maps.a0, p, a0, heads, rows, C::BM) || !map_of(&maps.a1, p, a1, heads, rows, C::BM) ||
      !map_of(&maps.b0, p, b0, other_heads, others, C::BN) || !map_of(&maps.b1, p, b1, other_heads, others, C::BN))
    return kMapRefused;
  LAUNCH(kernel, dim3(unsigned(ceil_div(rows, C::BM) * p.B * heads)), dim3(C::THREADS), C::SMEM, stream, p, maps,
         hopper_dropout(p.dropout));
  return cudaGetLastError();
}
template <class E, int D, bool DROPOUT> cudaError_t launch_both(const AttentionParams& p, cudaStream_t stream) {
  const cudaError_t error = launch<BackwardShape90<E, D, false>, DROPOUT>(p, stream);
  return error ? error : launch<BackwardShape90<E, D, true>, DROPOUT>(p, stream);
}
template <class E> cudaError_t launch_shape(const AttentionParams& p, cudaStream_t stream) {
  if (p.D > 64)
    return p.dropout.threshold ? launch_both<E, 128, true>(p, stream) : launch_both<E, 128, false>(p, stream);
  return p.dropout.threshold ? launch_both<E, 64, true>(p, stream) : launch_both<E, 64, false>(p, stream);
}

}  // namespace

bool causal_attention_bwd_sm90_takes(const AttentionParams& p) {
  using C = BackwardShape90<bf16, 128, true>;
  static HopperGpus gpus(attention_backward_sm90<C, false>, C::THREADS, C::SMEM);
  const int key_heads = has_hopper_shape(p) && (p.group == 1 || p.D <= 64) ? p.H / p.group : 0;
  return key_heads && has_map(p, p.q, p.H, p.T) && has_map(p, p.k, key_heads, p.S) && has_map(p, p.v, key_heads, p.S) &&
         has_map(p, p.dout, p.H, p.T) && gpus.has_current();
}

cudaError_t causal_attention_bwd_sm90(const AttentionParams& p, cudaStream_t stream) {
  return p.dtype == DType::f16 ? launch_shape<__half>(p, stream) : launch_shape<bf16>(p, stream);
}

}  // namespace gptfast::cuda
