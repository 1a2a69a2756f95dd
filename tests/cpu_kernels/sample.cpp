// Drawing tokens: the kept set by sorting, the draw by its definition.
#include "check.h"

namespace gptfast::checks {
namespace {

const cpu::Kernels& k() { return cpu::kernels(); }

struct Draw {
  DType type;
  i64 V, top_k;
  float temperature;
  double top_p;
};
constexpr uint64_t kSeed = 2024;
constexpr i64 kRows = 6;

// Tokens that top-k and top-p leave, best first. `margin` becomes the distance of a decision from the other side.
std::vector<i64> kept_tokens(const Array& x, i64 r, const Draw& draw, double* margin) {
  std::vector<i64> ids(static_cast<size_t>(draw.V));
  for (i64 v = 0; v < draw.V; v++) ids[size_t(v)] = v;
  const auto logit = [&](i64 v) { return x[r * draw.V + v]; };
  std::stable_sort(ids.begin(), ids.end(), [&](i64 a, i64 b) { return logit(a) > logit(b); });
  if (draw.top_k > 0 && draw.top_k < draw.V) ids.resize(size_t(draw.top_k));
  if (draw.top_p >= 1) return ids;
  double total = 0, mass = 0;
  const auto weight = [&](i64 v) { return std::exp((logit(v) - logit(ids[0])) / double(draw.temperature)); };
  for (i64 v : ids) total += weight(v);
  size_t n = 0;
  while (n < ids.size() && mass < draw.top_p * total) mass += weight(ids[n++]);
  *margin =
      std::min(std::fabs(mass - draw.top_p * total), std::fabs(mass - weight(ids[n - 1]) - draw.top_p * total)) / total;
  ids.resize(n);
  return ids;
}
double score(const Array& x, i64 r, const Draw& draw, i64 v, i64 position, i64 stream) {
  const Philox p(kSeed, uint32_t(v >> 2), uint32_t(position), uint32_t(stream), 0x73616d70u);
  const double u = std::min(double(float(p.word[v & 3])) * 0x1p-32 + 0x1p-33, 1 - 0x1p-24);
  return x[r * draw.V + v] / double(draw.temperature) - std::log(-std::log1p(-u));
}

void sample(const Draw& draw) {
  Random random(uint64_t(draw.V * 7 + draw.top_k));
  Array x(draw.type, kRows * draw.V);
  x.fill(random, 2);
  i64 out[kRows + 1], position[kRows], stream[kRows];
  std::fill(out, out + kRows + 1, -77);
  for (i64 r = 0; r < kRows; r++) position[r] = 5 * r, stream[r] = r % 2;
  const SampleOptions all{draw.temperature, draw.top_k, draw.top_p, kSeed};
  k().sample({rows(x, draw.V), position, stream, nullptr, out, kRows, draw.V, all}, 0, kRows);
  Check check("sample", draw.type, "V", draw.V, "top_k", draw.top_k, draw.top_p < 1 ? "top_p" : "",
              draw.temperature > 0 ? "drawn" : "greedy");
  for (i64 r = 0; r < kRows; r++) {
    double margin = 1, best = -INFINITY, second = -INFINITY;
    i64 token = -1;
    for (i64 v : draw.temperature > 0 ? kept_tokens(x, r, draw, &margin) : std::vector<i64>()) {
      const double s = score(x, r, draw, v, position[r], stream[r]);
      if (s > best) second = best, best = s, token = v;
      else second = std::max(second, s);
    }
    for (i64 v = 0; draw.temperature == 0 && v < draw.V; v++)
      if (x[r * draw.V + v] > best) best = x[r * draw.V + v], token = v;
    if (margin > 1e-5 && best - second > 1e-4) check.equal(out[r], token);
    else check.holds(out[r] >= 0 && out[r] < draw.V, "not a token");
  }
  check.equal(out[kRows], -77);
}

void strange_rows() {
  constexpr i64 V = 37;
  Array x(DType::f32, 3 * V);
  for (i64 i = 0; i < 3 * V; i++) x.set(i, i < V ? 1 : -INFINITY);
  x.set(35, NAN), x.set(2 * V + 36, -5);
  const i64 zero[3] = {0, 0, 0};
  i64 out[3] = {7, 7, 7};
  Check check("sample of strange rows");
  for (i64 top_k : {0, 3})
    for (double top_p : {1., 0.5}) {
      k().sample({rows(x, V), zero, zero, nullptr, out, 3, V, {1, top_k, top_p, kSeed}}, 0, 3);
      check.equal(out[0], -1), check.equal(out[1], -2), check.equal(out[2], 36);  // nan; nothing; one token
    }
}

}  // namespace

void check_sample() {
  for (DType type : kTypes)
    for (i64 V : {1, 5, 33, 300, 1031})
      for (const auto& [top_k, top_p] : {std::pair<i64, double>{0, 1.}, {0, 0.7}, {4, 1.}, {20, 0.9}}) {
        sample({type, V, top_k, 0.8f, top_p});
        if (!top_k && top_p == 1) sample({type, V, 0, 0.f, 1.});
      }
  strange_rows();
}

}  // namespace gptfast::checks
