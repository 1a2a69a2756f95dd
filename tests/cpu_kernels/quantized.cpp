// Products with weights in codes: packed for gemm both ways, few rows at once, and decoded.
#include <array>

#include "check.h"

namespace gptfast::checks {
namespace {

const cpu::Kernels& k() { return cpu::kernels(); }
i64 ceil_div(i64 a, i64 b) { return (a + b - 1) / b; }

// The levels of nf4 (arXiv 2305.14314, appendix E).
constexpr double kNf4[16] = {-1,
                             -0.6961928009986877,
                             -0.5250730514526367,
                             -0.39491748809814453,
                             -0.28444138169288635,
                             -0.18477343022823334,
                             -0.09105003625154495,
                             0,
                             0.07958029955625534,
                             0.16093020141124725,
                             0.24611230194568634,
                             0.33791524171829224,
                             0.44070982933044434,
                             0.5626170039176941,
                             0.7229568362236023,
                             1};
constexpr double kMxfp4[8] = {0, 0.5, 1, 1.5,
                              2, 3,   4, 6};  // of the low three bits of a code (OCP Microscaling Formats 1.0)

// What a byte of a doubly quantised scale stands for (arXiv 1511.04561): places 1, 2 to 3, 4 to 7, … from 127 on are the middles of
// 1, 2, 4, … parts of (0.1, 1), times 10^-6 and ten times as much each; below 127 the same, negative; 255 is 1.
double dynamic(int byte) {
  if (byte == 127 || byte == 255) return byte == 255;
  const int place = std::abs(byte - 127), parts = 1 << int(std::log2(place));
  const double middle = 0.1 + 0.9 * (place - parts + 0.5) / parts;
  return (byte < 127 ? -1 : 1) * middle * std::pow(10, std::log2(parts) - 6);
}

struct Codes {
  cpu::Codes format;
  i64 N, K, group;
  i64 groups = ceil_div(K, group), row_bytes = groups * group / (format == cpu::Codes::int8 ? 1 : 2);
  std::vector<uint8_t> codes = std::vector<uint8_t>(size_t(N * row_bytes));
  Array scales{DType::f16, N * groups};
  std::vector<uint8_t> exponents = std::vector<uint8_t>(size_t(N * groups));  // of mxfp4, in place of the scales
  bool twice = false;  // scales are these bytes, and `nested` for each 256 of them
  std::vector<uint8_t> bytes = exponents;
  std::vector<float> nested = std::vector<float>(size_t(ceil_div(N * groups, cpu::kNestedBlock)));

  Codes(cpu::Codes f, i64 outputs, i64 inputs, i64 size) : format(f), N(outputs), K(inputs), group(size) {
    Random random(uint64_t(N * 1000 + K));
    for (uint8_t& c : codes) c = uint8_t(random.next());
    for (i64 i = 0; i < scales.size(); i++) scales.set(i, 0.01 + 0.1 * random.uniform());
    for (uint8_t& e : exponents) e = uint8_t(120 + random.next() % 5);
    for (uint8_t& b : bytes) b = uint8_t(random.next());
    for (float& f : nested) f = float(0.01 + 0.1 * random.uniform());
  }
  cpu::QuantizedMatrix matrix() const {
    Rows of = rows(scales, groups);
    if (format == cpu::Codes::mxfp4) of.data = exponents.data();
    if (twice) of.data = bytes.data();
    return {codes.data(), row_bytes, of, N, K, group, format, twice ? nested.data() : nullptr, 0.25f};
  }
  double scale(i64 n, i64 i) const {
    const i64 at = n * groups + i / group;
    if (twice) return dynamic(bytes[size_t(at)]) * double(nested[size_t(at / cpu::kNestedBlock)]) + 0.25;
    return format == cpu::Codes::mxfp4 ? std::ldexp(1., exponents[size_t(at)] - 127) : scales[at];
  }
  double at(i64 n, i64 i) const {
    const double scale = this->scale(n, i);
    if (format == cpu::Codes::int8) return scale * double(int8_t(codes[size_t(n * row_bytes + i)]));
    const uint8_t byte = codes[size_t(n * row_bytes + i / 2)];
    const bool low = (i % 2 == 0) == (format == cpu::Codes::mxfp4);  // the first in the high half, of mxfp4 in the low
    const int code = low ? byte & 15 : byte >> 4;
    if (format == cpu::Codes::mxfp4) return scale * (code & 8 ? -1 : 1) * kMxfp4[code & 7];
    return scale * (format == cpu::Codes::nf4 ? double(float(kNf4[code])) : code - 8.);
  }
};
const char* name(cpu::Codes f) {
  constexpr const char* names[] = {"int8", "int4", "nf4", "mxfp4"};
  return names[int(f)];
}
double as_bf16(double x) { return widened(DType::bf16, narrowed(DType::bf16, float(x))); }

// y = x W^T (transposed), or dx = dy W, by the product of packed panels.
void many_rows(const Codes& w, DType type, bool transposed, i64 M) {
  const i64 N = transposed ? w.N : w.K, K = transposed ? w.K : w.N, lda = K + 1;
  Random random{uint64_t(M)};
  Array x(type, M * lda), y(type, M * N);
  x.fill(random, 1, K, lda);
  const bool pairs = type == DType::bf16 && k().multiplies_pairs;
  const i64 words = pairs ? ceil_div(K, 2) : K, depth = ceil_div(words, cpu::kGemmDepth) * cpu::kGemmDepth;
  Array packed(DType::f32, depth * ceil_div(N, cpu::kGemmPanel) * cpu::kGemmPanel, true);
  cpu::QuantizedPackParams q{w.matrix(), {}, transposed};
  cpu::GemmParams& p = q.gemm;
  p.a = {x.data(), lda, type, false}, p.c = rows(y, N), p.M = M, p.N = N, p.K = K, p.pairs = pairs;
  p.k1 = words, p.n1 = N, p.packed = static_cast<uint32_t*>(packed.data()), p.columns = 96;
  const i64 groups = ceil_div(N, cpu::kGemmPanel * cpu::kPackPanels);
  for (i64 i = 0; i < groups * ceil_div(words, cpu::kGemmDepth); i++) k().quantized_pack(q, i);
  for (i64 i = 0; i < ceil_div(M, cpu::kGemmRows) * ceil_div(N, p.columns); i++) k().gemm(p, i);
  Check check("quantized_pack", name(w.format), type, transposed ? "x W^T" : "dy W", "N", w.N, "K", w.K);
  for (i64 m = 0; m < M; m++)
    for (i64 n = 0; n < N; n++) {
      double sum = 0, size = 0;
      for (i64 i = 0; i < K; i++) {
        const double weight = transposed ? w.at(n, i) : w.at(i, n), factor = pairs ? as_bf16(weight) : weight;
        sum += x[m * lda + i] * factor, size += std::fabs(x[m * lda + i] * factor);
      }
      // a scale times a level, rounded before it is rounded to bf16: a few fall to the other side
      check.stored(type, y[m * N + n], sum, size * (pairs ? 2e-4 : 1e-6) + 1e-6);
    }
  check.holds(y.intact() && packed.intact(), "wrote beside its rows");
}

void few_rows(const Codes& w, DType type, i64 M) {
  Random random(uint64_t(M + 50));
  Array x(type, M * w.K), y(type, M * w.N), bias(DType::f32, w.N);
  x.fill(random, 1);
  bias.fill(random, 1);
  Array spread(DType::f32, M * ceil_div(w.K, cpu::kChunkCodes) * cpu::kChunkCodes, true);
  cpu::QuantizedRowsParams p{w.matrix(), rows(x, w.K), vector(bias), rows(y, w.N), M, spread.floats()};
  k().quantized_spread(p);
  for (i64 i = 0; i < ceil_div(w.N, cpu::kQuantizedRows); i++) k().quantized_rows(p, i);
  const bool pairs = type == DType::bf16 && k().multiplies_pairs && w.format != cpu::Codes::int8;
  Check check("quantized_rows", name(w.format), type, "M", M, "N", w.N, "K", w.K);
  for (i64 m = 0; m < M; m++)
    for (i64 n = 0; n < w.N; n++) {
      double sum = bias[n], size = 1;
      for (i64 i = 0; i < w.K; i++) {
        const double scale = w.scale(n, i), level = w.at(n, i) / scale;
        const double product = x[m * w.K + i] * scale * (pairs ? as_bf16(level) : level);
        sum += product, size += std::fabs(product);
      }
      check.stored(type, y[m * w.N + n], sum, size * 1e-6);
    }
  check.holds(y.intact() && spread.intact(), "wrote beside its rows");
}

void decode(const Codes& w, i64 first, i64 last) {
  Array out(DType::bf16, w.N * (last - first));
  k().quantized_decode({w.matrix(), first, last, static_cast<uint16_t*>(out.data())}, 0, w.N);
  Check check("quantized_decode", name(w.format), "N", w.N, "K", w.K);
  for (i64 n = 0; n < w.N; n++)
    for (i64 i = first; i < last; i++) check.stored(DType::bf16, out[n * (last - first) + i - first], w.at(n, i), 0);
  check.holds(out.intact(), "wrote beside its rows");
}

}  // namespace

void check_quantized() {
  for (cpu::Codes format : {cpu::Codes::int8, cpu::Codes::int4, cpu::Codes::nf4, cpu::Codes::mxfp4})
    for (const auto& [N, K, group] : {std::array<i64, 3>{1, 1, 32}, {35, 33, 32}, {33, 160, 64}, {5, 300, 128}}) {
      const Codes w(format, N, K, format == cpu::Codes::mxfp4 ? 32 : group);
      for (DType type : kTypes) {
        for (i64 M : {1, 2, 3, 4, 7, 8})
          if (M < 3 || N == 35) few_rows(w, type, M);
        for (bool transposed : {true, false}) many_rows(w, type, transposed, 9);
      }
      decode(w, 0, K);
      if (K > group) decode(w, group, K);
    }
  for (const auto& [N, K, group] : {std::array<i64, 3>{1, 64, 64}, {35, 1120, 32}, {33, 384, 128}}) {
    Codes w(cpu::Codes::nf4, N, K, group);
    w.twice = true;
    for (DType type : {DType::f32, DType::bf16}) {
      for (i64 M : {1, 3, 8}) few_rows(w, type, M);
      for (bool transposed : {true, false}) many_rows(w, type, transposed, 9);
    }
  }
  const Codes deep(cpu::Codes::nf4, 3, 700, 32);  // more words than a block of panels has
  for (DType type : {DType::f32, DType::bf16}) many_rows(deep, type, true, 2), many_rows(deep, type, false, 2);
}

}  // namespace gptfast::checks
