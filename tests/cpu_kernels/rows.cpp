// Conversions, dropout, GELU, embedding, sums over chunks.
#include "check.h"

namespace gptfast::checks {
namespace {

const cpu::Kernels& k() { return cpu::kernels(); }

DropoutRowsParams copy_of(const Array& x, Array& y) {
  return {rows(x, x.size()), rows(y, y.size()), 1, x.size(), {}};  // dropout of nothing: x times 1
}

// Every 16-bit value to fp32; every value, every tie and its neighbours back, bit for bit.
void conversions(DType type) {
  const bool flushes =
      type == DType::bf16 && k().lanes == 16 && k().multiplies_pairs;  // takes numbers below 2^-126 for 0
  const bool payload = type == DType::f16 || flushes;  // of a nan stays, by the instruction; else nan is 0x7fc0
  Array halves(type, 65536), wide(DType::f32, 65536);
  for (i64 h = 0; h < 65536; h++) {
    const uint16_t half = uint16_t(h);
    std::memcpy(static_cast<char*>(halves.data()) + 2 * h, &half, 2);
  }
  k().dropout(copy_of(halves, wide), 0, 1);
  Check widens("widen", type);
  for (i64 h = 0; h < 65536; h++) {
    widens.near(wide[h], widened(type, uint16_t(h)), 0);
    widens.equal(std::signbit(wide[h]) || std::isnan(wide[h]), (h & 0x8000) != 0 || std::isnan(wide[h]));
  }
  std::vector<float> from;
  for (i64 h = 0; h < 0x8000; h++) {
    const double value = widened(type, uint16_t(h)), next = widened(type, uint16_t(h + 1));
    from.push_back(float(value));
    if (std::isnan(value) || std::isinf(value)) continue;
    const double step = std::isinf(next) ? value - widened(type, uint16_t(h - 1)) : next - value;
    const float tie = float(value + step / 2);
    for (float x : {tie, std::nextafter(tie, 0.f), std::nextafter(tie, INFINITY)}) from.push_back(x);
  }
  for (uint32_t u : {0x7f800001u, 0x7fbfffffu, 0x7fc00000u, 0x7fffffffu, 0x00000001u, 0x007fffffu, 0x7f7fffffu})
    from.push_back(float_of(u));
  const i64 n = i64(from.size());
  for (i64 i = 0; i < n; i++) from.push_back(-from[size_t(i)]);
  Array x(DType::f32, 2 * n), y(type, 2 * n);
  for (i64 i = 0; i < 2 * n; i++) x.set(i, from[size_t(i)]);
  k().dropout(copy_of(x, y), 0, 1);
  Check narrows("narrow", type);
  for (i64 i = 0; i < 2 * n; i++) {
    const float value = from[size_t(i)];
    uint16_t got;
    std::memcpy(&got, static_cast<const char*>(y.data()) + 2 * i, 2);
    if (std::isnan(value) && payload) narrows.near(widened(type, got), NAN, 0);
    else if (flushes && std::fabs(value) < 0x1p-126f) narrows.near(widened(type, got), 0, 0);
    else narrows.equal(got, narrowed(type, value));
  }
  narrows.holds(y.intact(), "wrote beside its result");
}

void dropout(DType type, i64 C) {
  constexpr i64 R = 3;
  const i64 stride = C + 5;
  Random random{uint64_t(C)};
  Array x(type, R * stride), y(type, R * stride);
  x.fill(random, 1, C, stride);
  const uint64_t seed = 0x123456789abcdefu;
  for (uint32_t threshold : {uint32_t(6554), uint32_t(65536)}) {
    y.forget();
    k().dropout({rows(x, stride), rows(y, stride), R, C, {seed, 7, threshold, 2, 0}}, 0, R);
    Check check("dropout", type, "C", C);
    for (i64 r = 0; r < R; r++)
      for (i64 c = 0; c < C; c++) {
        const bool keeps = threshold < 65536 && kept(seed, 7, threshold, 0, r + 2, c);
        check.stored(type, y[r * stride + c], keeps ? x[r * stride + c] * kept_scale(threshold) : 0, 0, 1e-6);
      }
    check.holds(y.intact(C, stride), "wrote beside its rows");
  }
  std::vector<uint8_t> keep(size_t(2 * R * C) + 1, 0xa5);
  cpu::DropoutMaskParams p{reinterpret_cast<bool*>(keep.data()), R, C, {seed, 7, 32768, 0, 0}};
  k().dropout_mask(p, 0, 2 * R);
  Check mask("dropout_mask C", C);
  for (i64 r = 0; r < 2 * R; r++)
    for (i64 c = 0; c < C; c++) mask.equal(keep[size_t(r * C + c)], kept(seed, 7, 32768, r / R, r % R, c));
  mask.equal(keep.back(), 0xa5);
}

double gelu(double z, bool tanh) {
  const double u = 0.7978845608028654 * (z + 0.044715 * z * z * z);
  return tanh ? 0.5 * z * (1 + std::tanh(u)) : 0.5 * z * std::erfc(-z * 0.7071067811865476);
}
double gelu_slope(double z, bool tanh) {
  const double u = 0.7978845608028654 * (z + 0.044715 * z * z * z), t = std::tanh(u);
  const double cdf = 0.5 * std::erfc(-z * 0.7071067811865476), pdf = 0.3989422804014327 * std::exp(-0.5 * z * z);
  if (!tanh) return cdf + z * pdf;
  return 0.5 * (1 + t) + 0.5 * z * (1 - t * t) * 0.7978845608028654 * (1 + 3 * 0.044715 * z * z);
}
void gelu_rows(DType type, bool tanh, bool biased, i64 R, i64 C) {
  const i64 stride = C + 3, tail = biased || C < 3 ? C : C - 2;  // a bias has whole rows
  Random random(uint64_t(R * 1000 + C));
  Array x(type, R * stride), bias(type, C), dy(type, R * stride), y(type, R * stride);
  x.fill(random, 3, C, stride);
  bias.fill(random, 1);
  dy.fill(random, 1, C, stride);
  const i64 chunks = (R + cpu::kRowChunk - 1) / cpu::kRowChunk;
  Array sums(DType::f32, chunks * C);
  GeluParams p{};
  p.x = rows(x, stride), p.dout = rows(dy, stride), p.out = rows(y, stride);
  if (biased) p.bias = vector(bias), p.dbias = sums.floats();
  p.R = R, p.C = C, p.tail = tail, p.tanh = tanh;
  const double exact = type == DType::bf16 ? 0x1p-9 : 3e-6;  // before bf16 a shorter exponential
  k().gelu_fwd(p, 0, R);
  Check forward("gelu_fwd", type, tanh ? "tanh" : "erf", "R", R, "C", C);
  for (i64 r = 0; r < R; r++)
    for (i64 c = 0; c < (r == R - 1 ? tail : C); c++)
      forward.stored(type, y[r * stride + c], gelu(x[r * stride + c] + (biased ? bias[c] : 0), tanh), 2e-6, exact);
  forward.holds(y.intact(C, stride), "wrote beside its rows");
  y.forget();
  k().gelu_bwd(p, 0, chunks);
  std::vector<double> total(size_t(chunks * C));
  Check backward("gelu_bwd", type, tanh ? "tanh" : "erf", "R", R, "C", C);
  for (i64 r = 0; r < R; r++)
    for (i64 c = 0; c < (r == R - 1 ? tail : C); c++) {
      const double d = dy[r * stride + c] * gelu_slope(x[r * stride + c] + (biased ? bias[c] : 0), tanh);
      total[size_t(r / cpu::kRowChunk * C + c)] += d;
      backward.stored(type, y[r * stride + c], d, type == DType::bf16 ? 2e-2 : 4e-6, exact);
    }
  for (i64 c = 0; biased && c < chunks * C; c++)
    backward.near(sums[c], total[size_t(c)], type == DType::bf16 ? 0.1 : 1e-4, 1e-5);
  backward.holds(y.intact(C, stride) && sums.intact(), "wrote beside its rows");
}

void embedding(DType type, i64 C) {
  constexpr i64 N = 7, V = 11, P = 9;
  Random random(uint64_t(C) + 5);
  Array wte(type, V * C), wpe(DType::f32, P * C), y(type, N * C), dy(type, N * C), dtable(type, V * C);
  wte.fill(random, 1), wpe.fill(random, 1), dy.fill(random, 1);
  const i64 ids[N] = {3, 0, 10, 3, 3, 7, 0}, positions[N] = {8, 0, 1, 5, 2, 3, 3};
  k().embedding_fwd({ids, positions, rows(wte, C), rows(wpe, C), rows(y, C), N, 0, V, P, C}, 0, N);
  Check forward("embedding_fwd", type, "C", C);
  for (i64 n = 0; n < N; n++)
    for (i64 c = 0; c < C; c++)
      forward.stored(type, y[n * C + c], wte[ids[n] * C + c] + wpe[positions[n] * C + c], 1e-6, 1e-6);
  forward.holds(y.intact(), "wrote beside its rows");
  const i64 keys[N] = {0, 0, 3, 3, 3, 7, 10}, order[N] = {1, 6, 0, 3, 4, 5, 2};
  k().embedding_bwd({keys, order, rows(dy, C), rows(dtable, C), N, V, C}, 0, N);
  Check backward("embedding_bwd", type, "C", C);
  for (i64 v = 0; v < V; v++)
    for (i64 c = 0; c < C; c++) {
      double sum = 0;
      bool occurs = false;
      for (i64 n = 0; n < N; n++)
        if (ids[n] == v) sum += dy[n * C + c], occurs = true;
      backward.stored(type, dtable[v * C + c], occurs ? sum : NAN, 1e-6, 1e-6);  // others are not written
    }
  backward.holds(dtable.intact(), "wrote beside its rows");
}

void sum_chunks(DType type, i64 C) {
  constexpr i64 chunks = 5;
  Random random(uint64_t(C) + 9);
  Array partial(DType::f32, chunks * C), out(type, C);
  partial.fill(random, 1);
  k().sum_chunks({partial.floats(), chunks, C, out.data(), type}, 0, C);
  Check check("sum_chunks", type, "C", C);
  for (i64 c = 0; c < C; c++) {
    double sum = 0;
    for (i64 n = 0; n < chunks; n++) sum += partial[n * C + c];
    check.stored(type, out[c], sum, 2e-6, 1e-6);
  }
  check.holds(out.intact(), "wrote beside its result");
}

}  // namespace

void check_rows() {
  for (DType type : {DType::bf16, DType::f16}) conversions(type);
  for (DType type : kTypes)
    for (i64 C : {1, 3, 4, 5, 15, 16, 17, 33, 130}) {
      dropout(type, C);
      embedding(type, C);
      sum_chunks(type, C);
      for (bool tanh : {false, true}) gelu_rows(type, tanh, C % 2 == 0, C == 17 ? 67 : 3, C);
    }
  for (DType type : kTypes) dropout(type, 2051), gelu_rows(type, true, true, 2, 2051);
}

}  // namespace gptfast::checks
