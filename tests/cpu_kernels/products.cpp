// gemm in every layout, by stretches; and the product that reads its second factor once.
#include "check.h"

namespace gptfast::checks {
namespace {

const cpu::Kernels& k() { return cpu::kernels(); }
i64 ceil_div(i64 a, i64 b) { return (a + b - 1) / b; }

struct Shape {
  i64 M, N, K;
};
struct Product {
  DType type;
  Shape s;
  bool a_by_columns, b_by_columns, pairs, rest;  // rest: bias, accumulate, sums of A
  i64 a_stride = (a_by_columns ? s.M : s.K) + 3, b_stride = (b_by_columns ? s.K : s.N) + 1, c_stride = s.N + 2;
  Array a{type, (a_by_columns ? s.K : s.M) * a_stride}, b{DType::f32, (b_by_columns ? s.N : s.K) * b_stride};
  Array c{type, s.M * c_stride}, bias{DType::f32, s.N}, sums{DType::f32, s.M};

  double a_at(i64 m, i64 i) const { return factor(a[a_by_columns ? i * a_stride + m : m * a_stride + i]); }
  double b_at(i64 i, i64 n) const { return factor(b[b_by_columns ? n * b_stride + i : i * b_stride + n]); }
  double factor(double x) const { return pairs ? widened(DType::bf16, narrowed(DType::bf16, float(x))) : x; }

  void run(i64 stretch) {  // of words of k
    const i64 words = pairs ? ceil_div(s.K, 2) : s.K, width = ceil_div(s.N, cpu::kGemmPanel) * cpu::kGemmPanel;
    const i64 depth = ceil_div(std::max<i64>(1, std::min(words, stretch)), cpu::kGemmDepth) * cpu::kGemmDepth;
    Array packed(DType::f32, depth * width, true), carry(DType::f32, s.M * s.N);
    cpu::GemmParams p{};
    p.a = {a.data(), a_stride, a.type(), a_by_columns}, p.b = {b.data(), b_stride, b.type(), b_by_columns};
    p.c = rows(c, c_stride), p.M = s.M, p.N = s.N, p.K = s.K;
    if (rest) p.bias = vector(bias), p.accumulate = true;
    if (rest && a_by_columns) p.a_sums = sums.floats();
    p.pairs = pairs, p.packed = static_cast<uint32_t*>(packed.data()),
    p.carry = words > stretch ? carry.floats() : nullptr;
    p.n1 = s.N, p.columns = 96;
    for (p.k0 = 0; p.k0 == 0 || p.k0 < words; p.k0 += stretch) {
      p.k1 = std::min(p.k0 + stretch, words);
      const i64 groups = ceil_div(s.N, cpu::kGemmPanel * cpu::kPackPanels);
      k().gemm_pack(p, 0, groups * ceil_div(p.k1 - p.k0, cpu::kGemmDepth));
      for (i64 i = 0; i < ceil_div(s.M, cpu::kGemmRows) * ceil_div(s.N, p.columns); i++) k().gemm(p, i);
    }
    Check guards("gemm");
    guards.holds(packed.intact() && carry.intact(), "wrote beside its workspace");
  }
};

void gemm(DType type, const Shape& s, int layout, bool pairs, bool rest, i64 stretch) {
  Product g{type, s, (layout & 1) != 0, (layout & 2) != 0, pairs, rest};
  Random random(uint64_t(s.M * 10000 + s.N * 100 + s.K));
  g.a.fill(random, 1, g.a_by_columns ? s.M : s.K, g.a_stride);
  g.b.fill(random, 1, g.b_by_columns ? s.K : s.N, g.b_stride);
  g.bias.fill(random, 1);
  std::vector<double> before;
  if (rest) g.c.fill(random, 1, s.N, g.c_stride);
  for (i64 i = 0; i < g.c.size(); i++) before.push_back(g.c[i]);
  g.run(stretch);
  Check check("gemm", type, pairs ? "pairs" : "words", "M", s.M, "N", s.N, "K", s.K, "layout", layout);
  const double root = std::sqrt(double(s.K)) + 1;
  for (i64 m = 0; m < s.M; m++) {
    double sum_of_a = 0;
    for (i64 i = 0; i < s.K; i++) sum_of_a += g.a[g.a_by_columns ? i * g.a_stride + m : m * g.a_stride + i];
    if (rest && g.a_by_columns) check.near(g.sums[m], sum_of_a, 2e-5 * root);
    for (i64 n = 0; n < s.N; n++) {
      double sum = rest ? g.bias[n] + before[size_t(m * g.c_stride + n)] : 0;
      for (i64 i = 0; i < s.K; i++) sum += g.a_at(m, i) * g.b_at(i, n);
      check.stored(type, g.c[m * g.c_stride + n], sum, 3e-6 * root, 1e-6);
    }
  }
  check.holds(g.c.intact(s.N, g.c_stride) && g.sums.intact(), "wrote beside its rows");
}

// A row alone, and among others: the same bits, whatever tile it is in.
void rows_do_not_depend(bool pairs) {
  const DType type = pairs ? DType::bf16 : DType::f32;
  Product all{type, {23, 40, 37}, false, true, pairs, false};
  Random random(3);
  all.a.fill(random, 1, 37, all.a_stride);
  all.b.fill(random, 1, 37, all.b_stride);
  all.run(4096);
  Check check("a row of gemm alone", pairs ? "pairs" : "words");
  for (i64 m = 0; m < 23; m++) {
    Product one{type, {1, 40, 37}, false, true, pairs, false};
    for (i64 i = 0; i < 37; i++) one.a.set(i, all.a[m * all.a_stride + i]);
    for (i64 i = 0; i < all.b.size(); i++)
      if (!std::isnan(all.b[i])) one.b.set(i, all.b[i]);
    one.run(4096);
    for (i64 n = 0; n < 40; n++) check.near(one.c[n], all.c[m * all.c_stride + n], 0);
  }
}

// Few rows by a B that is read where it lies.
void gemm_rows(DType type, const Shape& s, bool pairs) {
  Product g{type, s, false, true, pairs, true};
  Random random(uint64_t(s.M * 10000 + s.N * 100 + s.K));
  g.a.fill(random, 1, s.K, g.a_stride);
  g.b.fill(random, 1, s.K, g.b_stride);
  g.bias.fill(random, 1);
  cpu::GemmParams p{};
  p.a = {g.a.data(), g.a_stride, type, false}, p.b = {g.b.data(), g.b_stride, g.b.type(), true};
  p.c = rows(g.c, g.c_stride), p.M = s.M, p.N = s.N, p.K = s.K, p.bias = vector(g.bias), p.pairs = pairs;
  p.k1 = pairs ? ceil_div(s.K, 2) : s.K, p.n1 = s.N, p.columns = cpu::kGemmPanel;
  for (i64 i = 0; i < ceil_div(s.N, p.columns); i++) k().gemm(p, i);
  Check check("gemm of few rows", type, pairs ? "pairs" : "words", "M", s.M, "N", s.N, "K", s.K);
  for (i64 m = 0; m < s.M; m++)
    for (i64 n = 0; n < s.N; n++) {
      double sum = g.bias[n];
      for (i64 i = 0; i < s.K; i++) sum += g.a_at(m, i) * g.b_at(i, n);
      check.stored(type, g.c[m * g.c_stride + n], sum, 3e-6 * (std::sqrt(double(s.K)) + 1), 1e-6);
    }
  check.holds(g.c.intact(s.N, g.c_stride), "wrote beside its rows");
}

void gemm_few(DType type, const Shape& s) {
  if (!k().gemm_few) return;
  Random random(uint64_t(s.M * 10000 + s.N * 100 + s.K));
  const i64 ldb = s.N + 3, ldc = s.N + 1;
  Array a(type, s.K * s.M), b(DType::bf16, s.K * ldb), c(type, s.M * ldc);
  Array packed(DType::f32, ceil_div(s.K, 2) * cpu::kMostFew, true);
  a.fill(random, 1);
  b.fill(random, 1, s.N, ldb);
  cpu::GemmFewParams p{rows(a, s.M), rows(b, ldb), rows(c, ldc), s.M, s.N, s.K, static_cast<uint32_t*>(packed.data())};
  k().gemm_few_pack(p);
  for (i64 i = 0; i < ceil_div(s.N, cpu::kFewColumns); i++) k().gemm_few(p, i);
  Check check("gemm_few", type, "M", s.M, "N", s.N, "K", s.K);
  for (i64 m = 0; m < s.M; m++)
    for (i64 n = 0; n < s.N; n++) {
      double sum = 0;
      for (i64 i = 0; i < s.K; i++)
        sum += widened(DType::bf16, narrowed(DType::bf16, float(a[i * s.M + m]))) * b[i * ldb + n];
      check.stored(type, c[m * ldc + n], sum, 3e-6 * (std::sqrt(double(s.K)) + 1), 1e-6);
    }
  check.holds(c.intact(s.N, ldc) && packed.intact(), "wrote beside its rows");
}

void gemm_narrow(DType type, bool by_columns, const Shape& s) {
  if (!k().gemm_narrow) return;
  Random random(uint64_t(s.M * 10000 + s.N * 100 + s.K));
  const i64 lda = s.K + 3, ldb = (by_columns ? s.K : s.N) + 2, ldc = s.N + 1;
  Array a(DType::bf16, s.M * lda), b(type, (by_columns ? s.N : s.K) * ldb), c(DType::f32, s.M * ldc);
  Array packed(DType::bf16, cpu::narrow_values(s.N, s.K), true);
  a.fill(random, 1, s.K, lda);
  b.fill(random, 1, by_columns ? s.K : s.N, ldb);
  const cpu::Matrix factor{b.data(), ldb, type, by_columns};
  cpu::GemmNarrowParams p{rows(a, lda), factor, c.floats(), ldc, s.N, s.K, static_cast<uint16_t*>(packed.data())};
  k().gemm_narrow_pack(p);
  k().gemm_narrow(p, 0, s.M);
  Check check("gemm_narrow", type, "M", s.M, "N", s.N, "K", s.K, "by columns", by_columns);
  for (i64 m = 0; m < s.M; m++)
    for (i64 n = 0; n < s.N; n++) {
      double sum = 0;
      for (i64 i = 0; i < s.K; i++)
        sum += a[m * lda + i] *
               widened(DType::bf16, narrowed(DType::bf16, float(b[by_columns ? n * ldb + i : i * ldb + n])));
      check.stored(DType::f32, c[m * ldc + n], sum, 3e-6 * (std::sqrt(double(s.K)) + 1), 1e-6);
    }
  check.holds(c.intact(s.N, ldc) && packed.intact(), "wrote beside its rows");
  Array again(DType::f32, ldc);  // the bits of a row alone
  p.a.data = static_cast<const uint16_t*>(a.data()) + (s.M - 1) * lda, p.c = again.floats();
  k().gemm_narrow(p, 0, 1);
  for (i64 n = 0; n < s.N; n++) check.holds(again[n] == c[(s.M - 1) * ldc + n], "a row depends on others");
}

}  // namespace

void check_products() {
  for (int pairs = 0; pairs <= int(k().multiplies_pairs); pairs++) {
    for (int layout = 0; layout < 4; layout++)
      for (const Shape& s : {Shape{1, 1, 1}, Shape{7, 33, 5}, Shape{13, 40, 63}, Shape{3, 5, 2}})
        for (DType type : kTypes) gemm(type, s, layout, pairs, s.M == 7, 4096);
    for (int layout = 0; layout < 4; layout++) gemm(DType::f32, {98, 9, 300}, layout, pairs, true, 4096);
    gemm(DType::bf16, {98, 9, 300}, 0, pairs, false, 4096);
    for (i64 K : {2, 8, 31}) gemm(DType::bf16, {19, 75, K}, 2, pairs, false, 4096);  // few k
    gemm(DType::bf16, {5, 35, 1100}, 2, pairs, true, cpu::kGemmDepth);  // sums carried over three stretches of k
    for (DType type : kTypes)
      for (const Shape& s : {Shape{1, 1, 1}, Shape{15, 37, 67}, Shape{6, 33, 64}}) gemm_rows(type, s, pairs);
    rows_do_not_depend(pairs);
  }
  for (DType type : kTypes)
    for (const Shape& s : {Shape{1, 1, 1}, Shape{4, 33, 7}, Shape{13, 263, 65}, Shape{32, 40, 66}}) gemm_few(type, s);
  for (DType type : kTypes)
    for (const Shape& s : {Shape{1, 1, 1}, Shape{3, 8, 32}, Shape{8, 5, 63}, Shape{7, 17, 130}, Shape{4, 32, 33}})
      for (bool by_columns : {false, true}) gemm_narrow(type, by_columns, s);
  float sink = 0;
  Check peak("peak_flops");
  for (bool pairs : {false, true}) peak.holds(k().peak_flops(8, pairs, &sink) >= 8 * 2 * k().lanes, "did nothing");
}

}  // namespace gptfast::checks
