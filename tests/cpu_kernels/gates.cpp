// rms_norm, relu_squared, swiglu and rotary.
#include "check.h"

namespace gptfast::checks {
namespace {

constexpr i64 kRows = 3;
const cpu::Kernels& k() { return cpu::kernels(); }

void rms_norm(DType type, i64 C, bool weighted) {
  const i64 stride = C + 2;
  Random random(uint64_t(C) * 3 + 1);
  Array x(type, kRows * stride), dy(type, kRows * stride), y(type, kRows * stride), dx(type, kRows * stride);
  Array weight(DType::f32, C), rstd(DType::f32, kRows), dweight(DType::f32, C);
  x.fill(random, 2, C, stride), dy.fill(random, 1, C, stride), weight.fill(random, 1);
  LayerNormParams p{};
  p.x = rows(x, stride), p.y = rows(y, stride), p.rstd = rstd.floats(), p.R = kRows, p.C = C, p.eps = 1e-5f;
  if (weighted) p.weight = vector(weight);
  k().layer_norm_fwd(p, 0, kRows);
  p.dy = rows(dy, stride), p.dresidual = rows(dx, stride);
  if (weighted) p.dweight = dweight.floats();
  k().layer_norm_bwd(p, 0, 1);
  Check forward("rms_norm_fwd", type, "C", C), backward("rms_norm_bwd", type, "C", C);
  std::vector<double> dw(static_cast<size_t>(C));
  const auto w = [&](i64 c) { return weighted ? weight[c] : 1.0; };
  for (i64 r = 0; r < kRows; r++) {
    double squares = 0, gx = 0;
    for (i64 c = 0; c < C; c++) squares += x[r * stride + c] * x[r * stride + c] / double(C);
    const double s = 1 / std::sqrt(squares + double(p.eps));
    for (i64 c = 0; c < C; c++) gx += dy[r * stride + c] * w(c) * x[r * stride + c] * s / double(C);
    forward.near(rstd[r], s, 0, 1e-5);
    for (i64 c = 0; c < C; c++) {
      const i64 i = r * stride + c;
      const double xhat = x[i] * s;
      forward.stored(type, y[i], xhat * w(c), 1e-6, 1e-5);
      backward.stored(type, dx[i], s * (dy[i] * w(c) - xhat * gx), 1e-5 * s, 1e-5);
      dw[size_t(c)] += dy[i] * xhat;
    }
  }
  for (i64 c = 0; weighted && c < C; c++) backward.near(dweight[c], dw[size_t(c)], 1e-5, 1e-5);
  forward.holds(y.intact(C, stride) && rstd.intact(), "wrote beside its rows");
  backward.holds(dx.intact(C, stride) && dweight.intact(), "wrote beside its rows");
}

void relu_squared(DType type, i64 C) {
  const i64 stride = C + 3, tail = C < 3 ? C : C - 2;
  Random random(uint64_t(C) + 11);
  Array x(type, kRows * stride), dy(type, kRows * stride), y(type, kRows * stride), dx(type, kRows * stride);
  x.fill(random, 2, C, stride), dy.fill(random, 1, C, stride);
  k().relu_squared_fwd({rows(x, stride), {}, rows(y, stride), kRows, C, tail}, 0, kRows);
  k().relu_squared_bwd({rows(x, stride), rows(dy, stride), rows(dx, stride), kRows, C, tail}, 0, kRows);
  Check check("relu_squared", type, "C", C);
  for (i64 r = 0; r < kRows; r++)
    for (i64 i = r * stride, end = i + (r == kRows - 1 ? tail : C); i < end; i++) {
      const double v = std::max(x[i], 0.0);
      check.stored(type, y[i], v * v, 0, 1e-6);
      check.stored(type, dx[i], 2 * v * dy[i], 0, 1e-6);
    }
  check.holds(y.intact(C, stride) && dx.intact(C, stride), "wrote beside its rows");
}

void swiglu(DType type, i64 C, bool interleaved, bool clamped) {
  const i64 width = interleaved ? 2 * C : C, stride = width + 1, out = C + 3;
  const float limit = clamped ? 1.5f : INFINITY, alpha = clamped ? 1.702f : 1.f, shift = clamped ? 1.f : 0.f;
  Random random(uint64_t(C) + 17);
  Array gate(type, kRows * stride), up(type, kRows * stride), dy(type, kRows * out), y(type, kRows * out);
  Array dgate(type, kRows * stride), dup(type, kRows * stride);
  gate.fill(random, 2, width, stride), up.fill(random, 2, width, stride), dy.fill(random, 1, C, out);
  SwigluParams p{};
  p.gate = rows(gate, stride), p.up = rows(up, stride), p.dout = rows(dy, out), p.out = rows(y, out);
  p.dgate = rows(dgate, stride), p.dup = rows(dup, stride), p.R = kRows, p.C = p.tail = C;
  p.alpha = alpha, p.shift = shift, p.limit = limit, p.interleaved = interleaved;
  k().swiglu_fwd(p, 0, kRows);
  k().swiglu_bwd(p, 0, kRows);
  const double exact = type == DType::bf16 ? 0x1p-9 : 3e-6;  // before bf16 a shorter exponential
  Check check("swiglu", type, interleaved ? "interleaved" : "", clamped ? "clamped" : "", "C", C);
  for (i64 r = 0; r < kRows; r++)
    for (i64 c = 0; c < C; c++) {
      const i64 ig = r * stride + (interleaved ? 2 * c : c), iu = interleaved ? ig + 1 : ig;
      const double a = gate[ig], b = (interleaved ? gate : up)[iu], d = dy[r * out + c];
      const double g = std::min(a, double(limit)), u = std::min(std::max(b, -double(limit)), double(limit));
      const double s = 1 / (1 + std::exp(-double(alpha) * g)), slope = s + double(alpha) * g * s * (1 - s);
      check.stored(type, y[r * out + c], (u + double(shift)) * g * s, 1e-6, exact);
      check.stored(type, dgate[ig], a > double(limit) ? 0 : d * (u + double(shift)) * slope, 2 * exact, exact);
      check.stored(type, (interleaved ? dgate : dup)[iu], std::fabs(b) > double(limit) ? 0 : d * g * s, 1e-6, exact);
    }
  check.holds(y.intact(C, out) && dgate.intact(width, stride) && (interleaved || dup.intact(C, stride)),
              "wrote beside its rows");
}

void rotary(DType type, i64 half, bool interleaved) {
  constexpr i64 B = 2, H = 2, T = 3, kTable = 5;
  const i64 D = 2 * half + (half % 3);
  Random random(uint64_t(half) + 23);
  Array x(type, B * T * H * D), y(type, B * T * H * D), back(type, B * T * H * D);
  Array cos(DType::f32, kTable * half), sin(DType::f32, kTable * half);
  x.fill(random, 1);
  for (i64 i = 0; i < kTable * half; i++) {
    const double angle = 6 * random.uniform();
    cos.set(i, std::cos(angle)), sin.set(i, std::sin(angle));
  }
  const i64 positions[B * T] = {4, 0, 1, 2, 2, 3};
  RotaryParams p{};
  p.x = {x.data(), T * H * D, D, H * D}, p.y = {y.data(), T * H * D, D, H * D}, p.dtype = type;
  p.cos = cos.floats(), p.sin = sin.floats(), p.positions = positions, p.position_stride = T;
  p.B = B, p.H = H, p.T = T, p.D = D, p.half = half, p.interleaved = interleaved;
  k().rotary(p, 0, B * T);
  p.x.data = y.data(), p.y.data = back.data(), p.inverse = true;
  k().rotary(p, 0, B * T);
  Check check("rotary", type, interleaved ? "interleaved" : "neox", "half", half);
  for (i64 i = 0; i < B * T * H; i++)
    for (i64 c = 0; c < D; c++) {
      const i64 at = i * D, pair = interleaved ? c / 2 : c % half, table = positions[i / H] * half + pair;
      const i64 first = at + (interleaved ? 2 * pair : pair), second = first + (interleaved ? 1 : half);
      const double a = x[first], b = x[second];
      const double turned = c >= 2 * half     ? x[at + c]
                            : at + c == first ? a * cos[table] - b * sin[table]
                                              : b * cos[table] + a * sin[table];
      check.stored(type, y[at + c], turned, 1e-6, 1e-6);
      const double unit = type == DType::f32 ? 1e-6 : type == DType::bf16 ? 0x1p-7 : 0x1p-9;
      check.near(back[at + c], x[at + c], 3 * unit, unit);
    }
  check.holds(y.intact() && back.intact(), "wrote beside its result");
}

}  // namespace

void check_gates() {
  for (DType type : kTypes)
    for (i64 C : {1, 3, 4, 7, 8, 15, 16, 17, 33, 65}) {
      rms_norm(type, C, C % 2 == 0), relu_squared(type, C);
      for (bool interleaved : {false, true}) {
        for (bool clamped : {false, true}) swiglu(type, C, interleaved, clamped);
        rotary(type, C, interleaved);
      }
    }
}

}  // namespace gptfast::checks
