// What the kernels of AMX do with its registers: the bits of their sums, how many instructions a product takes, and how many are
// loaded. The values, and that no thread is left with tiles in use, are checked with every instruction set's.
#include "check.h"

namespace gptfast::checks {
namespace {

const cpu::Kernels& k() { return cpu::kernels(); }
i64 ceil_div(i64 a, i64 b) { return (a + b - 1) / b; }

float flushed(float x) { return std::fabs(x) < 0x1p-126f ? std::copysign(0.f, x) : x; }
// The sum over k of a tile's row and column, by definition, 16 pairs at a time.
float in_steps(const Array& a, i64 first, const Array& b, i64 column, i64 ldb, i64 K, float sum) {
  for (i64 begin = 0; begin < K; begin += 32) {
    float parts[2] = {};
    for (i64 i = begin; i < std::min(K, begin + 32); i++)
      parts[i % 2] = flushed(std::fma(flushed(float(a[first + i])), flushed(float(b[i * ldb + column])), parts[i % 2]));
    sum = flushed(flushed(sum) + flushed(parts[0] + parts[1]));
  }
  return sum;
}

// C = A B of bf16 with fp32 sums as they are; `scale` makes products that are too small for normal numbers.
void gemm(i64 M, i64 N, i64 K, double scale, const emulated::Counts* want) {
  Random random(uint64_t(M * 1000 + N + K));
  Array a(DType::bf16, M * (K + K % 2)), b(DType::bf16, K * N), c(DType::f32, M * N);
  a.fill(random, scale), b.fill(random, scale);
  const i64 lda = K + K % 2, width = ceil_div(N, cpu::kGemmPanel) * cpu::kGemmPanel;
  Array packed(DType::f32, ceil_div((K + 1) / 2, cpu::kGemmDepth) * cpu::kGemmDepth * width, true);
  cpu::GemmParams p{};
  p.a = {a.data(), lda, DType::bf16, false}, p.b = {b.data(), N, DType::bf16, false}, p.c = rows(c, N);
  p.M = M, p.N = N, p.K = K, p.pairs = true, p.packed = static_cast<uint32_t*>(packed.data());
  p.n1 = N, p.k1 = (K + 1) / 2, p.columns = width;
  k().gemm_pack(p, 0, ceil_div(N, cpu::kGemmPanel * cpu::kPackPanels) * ceil_div(p.k1, cpu::kGemmDepth));
  const emulated::Counts before = emulated::counts();
  for (i64 i = 0; i < ceil_div(M, cpu::kGemmRows); i++) k().gemm(p, i);
  Check check("the bits of gemm on tiles M", M, "N", N, "K", K);
  if (want) counted(check, before, *want);
  i64 some = 0;
  for (i64 m = 0; m < M; m++)
    for (i64 n = 0; n < N; n++) {
      check.near(c[m * N + n], in_steps(a, m * lda, b, n, N, K, 0.f), 0);
      some += c[m * N + n] != 0;
    }
  check.holds(some > M * N / 4, "all sums are 0");
}

// One head of 64 queries and S keys of 64 channels, which all are seen: all in tiles of 2 x 2.
void attention(i64 S) {
  constexpr i64 T = 64, D = 64;
  Random random{uint64_t(S)};
  Array q(DType::bf16, T * D), kv(DType::bf16, S * D), out(DType::bf16, T * D), grads(DType::bf16, (T + 2 * S) * D);
  Array shift(DType::f32, T), level(DType::f32, T);
  q.fill(random, 1), kv.fill(random, 1);
  cpu::AttentionParams p{};
  p.B = p.H = p.group = 1, p.T = T, p.S = S, p.D = D, p.dtype = DType::bf16, p.scale = 0.125f;
  p.q = p.dout = {q.data(), T * D, T * D, D}, p.k = p.v = {kv.data(), S * D, S * D, D};
  p.y = {out.data(), T * D, T * D, D}, p.out = {out.data(), T * D, T * D, D};
  char* gradient = static_cast<char*>(grads.data());
  p.dq = {gradient, T * D, T * D, D}, p.dk = {gradient + 2 * T * D, S * D, S * D, D};
  p.dv = {gradient + 2 * (T + S) * D, S * D, S * D, D};
  p.shift = shift.floats(), p.level = level.floats();
  Check check("tiles of attention S", S);
  const i64 tiles = S / 64, products = 32, sums = 16;  // of 64 x 64 x 64, and tiles of its result
  emulated::Counts before = emulated::counts();
  k().causal_attention_fwd(p, 0, 0, 1);
  counted(check, before, {1, tiles * 2 * products + (tiles - 1) * sums, tiles * 2 * sums, tiles * 2 * products});
  before = emulated::counts();
  k().causal_attention_bwd(p, 0, 0, 1);
  counted(check, before, {1, tiles * (5 * products + 3 * sums), tiles * 5 * sums, tiles * 5 * products});
}

}  // namespace

void check_tiles() {
  if (std::strcmp(k().isa, "amx")) return;
  // 96 rows, 32 columns: three blocks of four tiles, for each 16 words of k four products and as many loads.
  const emulated::Counts block{1, 3 * 16 * 4, 3 * 4, 3 * 16 * 4};
  gemm(96, 32, 512, 1, &block);
  const emulated::Counts deep{1, 2 * 3 * 16 * 4 + 3 * 4, 2 * 3 * 4, 2 * 3 * 16 * 4};  // the second half adds to C
  gemm(96, 32, 1024, 1, &deep);
  for (i64 K : {1, 2, 31, 33, 70, 513}) gemm(19, 33, K, 1, nullptr);
  for (i64 M : {1, 15, 16, 17, 31, 33, 97}) gemm(M, 48, 40, 1, nullptr);
  attention(64), attention(128);
  gemm(17, 32, 64, 0x1p-62, nullptr);  // products around the smallest normal number
}

}  // namespace gptfast::checks
