// layer_norm and add_layer_norm, and both without the mean: rms_norm and add_rms_norm.
#include "check.h"

namespace gptfast::checks {
namespace {

const cpu::Kernels& k() { return cpu::kernels(); }

struct Norm {
  static constexpr i64 R = 3;
  static constexpr uint64_t kSeed = 77;
  DType type;
  i64 C, stride = C + 2;
  bool added;  // add_layer_norm, with dropout
  Array x{type, R * stride}, residual{type, R * stride}, weight{DType::f32, C}, bias{DType::f32, C};
  Array total{type, R * stride}, y{type, R * stride}, mean{DType::f32, 2 * R}, rstd{DType::f32, R};
  Array dy{type, R * stride}, dtotal{type, R * stride}, dx{type, R * stride}, dresidual{type, R * stride};
  Array dweight{DType::f32, C}, dbias{DType::f32, C};
  LayerNormParams p{};

  Norm(DType t, i64 columns, bool with_residual) : type(t), C(columns), added(with_residual) {
    Random random(uint64_t(C * 10 + added));
    for (Array* a : {&x, &residual, &dy, &dtotal}) a->fill(random, 1, C, stride);
    weight.fill(random, 1), bias.fill(random, 1);
    for (i64 i = 0; i < C; i++) x.set(stride + i, x[stride + i] + 100);  // a row far from 0
    p.x = rows(x, stride), p.weight = vector(weight), p.bias = vector(bias), p.y = rows(y, stride);
    p.mean = mean.floats(), p.rstd = rstd.floats(), p.R = R, p.C = C, p.eps = 1e-5f;
    if (added) {
      p.residual = rows(residual, stride), p.total = rows(total, stride);
      p.dropout = {kSeed, 3, 6554, 1, 0};
    }
  }
  double drop(double value, i64 r, i64 c) const {
    return kept(kSeed, 3, 6554, 0, r + 1, c) ? value * kept_scale(6554) : 0;
  }
  double mean_of(const Array& a, i64 r) const {
    double sum = 0;
    for (i64 c = 0; c < C; c++) sum += a[r * stride + c];
    return sum / double(C);
  }
  double rstd_of(const Array& a, i64 r) const {
    double sum = 0, m = mean_of(a, r);
    for (i64 c = 0; c < C; c++) sum += (a[r * stride + c] - m) * (a[r * stride + c] - m);
    return 1 / std::sqrt(sum / double(C) + double(p.eps));
  }

  void forward() {
    k().layer_norm_fwd(p, 0, R);
    Check check("layer_norm_fwd", type, added ? "added C" : "C", C);
    const Array& input = added ? total : x;
    for (i64 r = 0; r < R; r++) {
      const double m = mean_of(input, r), s = rstd_of(input, r);
      check.near(mean[r] + mean[R + r], m, 1e-5, 1e-6);
      check.near(rstd[r], s, 0, 1e-5 + 1e-7 * std::fabs(m) * s);
      for (i64 c = 0; c < C; c++) {
        const i64 i = r * stride + c;
        if (added) check.stored(type, total[i], drop(x[i], r, c) + residual[i], 1e-6, 1e-6);
        check.stored(type, y[i], (input[i] - m) * s * weight[c] + bias[c], 2e-5 + 2e-7 * std::fabs(m) * s, 1e-5);
      }
    }
    check.holds(y.intact(C, stride) && total.intact(C, stride) && mean.intact(), "wrote beside its rows");
  }

  void without_mean() {  // RMSNorm
    p.mean = nullptr, p.bias = {nullptr, DType::f32};
    k().layer_norm_fwd(p, 0, R);
    Check check("rms_norm_fwd", type, added ? "added C" : "C", C);
    const Array& input = added ? total : x;
    for (i64 r = 0; r < R; r++) {
      double squares = 0;
      for (i64 c = 0; c < C; c++) squares += input[r * stride + c] * input[r * stride + c];
      const double s = 1 / std::sqrt(squares / double(C) + double(p.eps));
      check.near(rstd[r], s, 0, 1e-5);
      for (i64 c = 0; c < C; c++)
        check.stored(type, y[r * stride + c], input[r * stride + c] * s * weight[c], 1e-6, 1e-5);
    }
    check.holds(y.intact(C, stride), "wrote beside its rows");
  }

  void backward() {
    const Array& input = added ? total : x;
    p.x = rows(input, stride), p.dy = rows(dy, stride);
    if (added) p.dtotal = rows(dtotal, stride);
    p.dx = rows(dx, stride), p.dweight = dweight.floats(), p.dbias = dbias.floats();
    if (added) p.dresidual = rows(dresidual, stride);
    k().layer_norm_bwd(p, 0, 1);
    Check check("layer_norm_bwd", type, added ? "added C" : "C", C);
    std::vector<double> dw(static_cast<size_t>(C)), db(static_cast<size_t>(C));
    for (i64 r = 0; r < R; r++) {
      const double m = mean_of(input, r), s = rstd_of(input, r);
      double g_mean = 0, gx_mean = 0;
      for (i64 c = 0; c < C; c++) {
        const double xhat = (input[r * stride + c] - m) * s, d = dy[r * stride + c];
        g_mean += d * weight[c] / double(C), gx_mean += d * weight[c] * xhat / double(C);
        dw[size_t(c)] += d * xhat, db[size_t(c)] += d;
      }
      for (i64 c = 0; c < C; c++) {
        const i64 i = r * stride + c;
        const double xhat = (input[i] - m) * s, slope = s * (dy[i] * weight[c] - g_mean - xhat * gx_mean);
        const double d = slope + (added ? dtotal[i] : 0), room = 2e-5 * (1 + s) + 1e-6 * std::fabs(m) * s * s;
        check.stored(type, dx[i], added ? drop(d, r, c) : d, room, 1e-5);
        if (added) check.stored(type, dresidual[i], d, room, 1e-5);
      }
    }
    for (i64 c = 0; c < C; c++) {
      check.near(dweight[c], dw[size_t(c)], 1e-3, 1e-5);
      check.near(dbias[c], db[size_t(c)], 1e-5, 1e-5);
    }
    check.holds(dx.intact(C, stride) && dresidual.intact(C, stride) && dweight.intact() && dbias.intact(),
                "wrote beside its rows");
  }
};

}  // namespace

void check_norm() {
  for (DType type : kTypes)
    for (i64 C : {1, 3, 4, 7, 16, 33, 67, 160, 257})
      for (bool added : {false, true}) {
        Norm norm(type, C, added);
        norm.forward();
        norm.backward();
        Norm(type, C, added).without_mean();
      }
}

}  // namespace gptfast::checks
