// Cross-entropy.
#include "check.h"

namespace gptfast::checks {
namespace {

const cpu::Kernels& k() { return cpu::kernels(); }

void cross_entropy(DType type, i64 V, float smoothing) {
  constexpr i64 R = 4, ignored = -100;
  const i64 stride = V + 1;
  Random random{uint64_t(V)};
  Array x(type, R * stride), dx(type, R * stride), loss(DType::f32, R), lse(DType::f32, 2 * R), dloss(DType::f32, R);
  x.fill(random, 3, V, stride);
  dloss.fill(random, 1);
  for (i64 v = 0; v < V; v++) x.set(stride + v, x[stride + v] + 60);  // a row with a common offset
  const i64 targets[R] = {0, V - 1, ignored, V / 2};
  CrossEntropyParams p{rows(x, stride), targets,  loss.floats(), lse.floats(), dloss.floats(), rows(dx, stride), R, V,
                       ignored,         smoothing};
  k().cross_entropy_fwd(p, 0, R);
  k().cross_entropy_bwd(p, 0, R);
  Check check("cross_entropy", type, smoothing > 0 ? "smoothed V" : "V", V);
  for (i64 r = 0; r < R; r++) {
    double top = -INFINITY, sum = 0, mean = 0;
    for (i64 v = 0; v < V; v++) top = std::max(top, x[r * stride + v]), mean += x[r * stride + v] / double(V);
    for (i64 v = 0; v < V; v++) sum += std::exp(x[r * stride + v] - top);
    const double level = top + std::log(sum), e = double(smoothing);
    const bool counts = targets[r] != ignored;
    const double picked = counts ? x[r * stride + targets[r]] : 0;
    check.near(loss[r], counts ? (1 - e) * (level - picked) + e * (level - mean) : 0, 2e-5, 1e-6);
    check.near(lse[2 * r] + lse[2 * r + 1], counts ? level : 0, 1e-5, 1e-6);
    for (i64 v = 0; v < V; v++) {
      const double slope = std::exp(x[r * stride + v] - level) - (v == targets[r] ? 1 - e : 0) - e / double(V);
      check.stored(type, dx[r * stride + v], counts ? dloss[r] * slope : 0, 1e-6, 1e-5);
    }
  }
  check.holds(dx.intact(V, stride) && loss.intact() && lse.intact(), "wrote beside its rows");
}

}  // namespace

void check_loss() {
  for (DType type : kTypes)
    for (i64 V : {1, 3, 5, 16, 31, 65, 2049})
      for (float smoothing : {0.f, 0.1f}) cross_entropy(type, V, smoothing);
}

}  // namespace gptfast::checks
