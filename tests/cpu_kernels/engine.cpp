// The engine's kernels.
#include "../../csrc/engine/kernels.h"
#include "../../csrc/engine/pack.h"
#include "check.h"

namespace gptfast::checks {
namespace {

using namespace engine;

struct Checker {
  const Kernels& k;

  // W packed in a format; the values that are computed with; activations of M rows, and what they stand for.
  struct Product {
    Format format;
    i64 M, K, depth = padded_depth(format, K), stride = round_up(K, kGroup);
    Array w{DType::f32, kPanel * K}, x{DType::f32, M * stride}, y{DType::f32, M * (kPanel + 3)};
    std::vector<char> memory = std::vector<char>(size_t(panel_bytes(format, K) + 2 * kAhead));
    std::vector<double> exact = std::vector<double>(size_t(kPanel * K)), used = std::vector<double>(size_t(M * K));
    std::vector<uint16_t> bf16 = std::vector<uint16_t>(size_t(M * stride), 0xffff);
    std::vector<int8_t> q = std::vector<int8_t>(size_t(M * stride), 99);
    std::vector<float> scale = std::vector<float>(size_t(M * stride / kGroup), NAN);
    std::vector<int32_t> start = std::vector<int32_t>(size_t(M * stride / kGroup), 1 << 20);
    static constexpr i64 kAhead = 16384;  // is asked for ahead, never read

    Product(const Checker& c, Format f, i64 rows, i64 inputs) : format(f), M(rows), K(inputs) {
      Random random(uint64_t(K * 100) + uint64_t(f));
      w.fill(random, 0.1);
      engine::pack(format, w.floats(), K, kPanel, K, 1.f, 0, 1, panel());
      const std::vector<float> zeros(static_cast<size_t>(K));
      std::vector<float> row(size_t(K) + 1, 7.f);
      for (i64 n = 0; n < kPanel; n++) {
        c.k.embed(format, panel(), K, n, 1.f, zeros.data(), row.data());
        for (i64 i = 0; i < K; i++) exact[size_t(n * K + i)] = double(row[size_t(i)]);
      }
      for (i64 i = 0; i < x.size(); i++) x.set(i, i % stride < K ? random.normal() : 0);  // rows end in zeros
      c.prepare(*this);
    }
    char* panel() {
      const uintptr_t at = reinterpret_cast<uintptr_t>(memory.data());
      return memory.data() + (64 - at % 64) % 64;
    }
    Activations activations() {
      return {x.floats(), stride, bf16.data(), q.data(), scale.data(), start.data(), stride};
    }
  };

  // Value i of a row of bytes.
  static double stands_for(Format format, const int8_t* q, const float* scale, i64 i) {
    const bool mxfp4 = format == Format::mxfp4;  // even ones first, and half the scale
    const i64 at = mxfp4 ? i / 8 * 8 + i % 2 * 4 + i % 8 / 2 : i;
    return q[at] * double(scale[i / kGroup]) * (mxfp4 ? 2 : 1);
  }

  void prepare(Product& p) const {
    for (i64 m = 0; m < p.M; m++) {
      k.quantize_activations(p.format, p.x.floats() + m * p.stride, p.K, p.activations(), m, 1.f);
      for (i64 i = 0; i < p.K; i++) {
        const double x = p.x[m * p.stride + i];
        double used = x;
        if (quantised(p.format))
          used = stands_for(p.format, p.q.data() + m * p.stride, p.scale.data() + m * p.stride / kGroup, i);
        else if (p.format == Format::bf16 && k.bf16_pairs)
          used = widened(DType::bf16, p.bf16[size_t(m * p.stride + i)]);
        p.used[size_t(m * p.K + i)] = used;
      }
    }
  }

  void weights(Format format) const {
    Product p(*this, format, 1, 67);
    const double room[] = {0,    0x1p-9, 0.002, 0.012,
                           0.05, 0.05,   0.05,  0.065};  // by format: half a step of the coarsest group, and clipping
    Check check("pack and embed", kFormatNames[int(format)]);
    for (i64 i = 0; i < kPanel * 67; i++) check.near(p.exact[size_t(i)], p.w[i], room[int(format)]);
  }

  void product(Format format, i64 M, i64 K) const {
    Product p(*this, format, M, K);
    Check check("product", kFormatNames[int(format)], "M", M, "K", K);
    for (i64 m = 0; m < M; m++)
      for (i64 i = 0; i < K; i++) {
        const double x = p.x[m * p.stride + i], room = quantised(format) ? 0.52 * 5 / 127 : 0;
        check.near(p.used[size_t(m * K + i)], x, room, format == Format::bf16 ? 0x1p-8 : 0);
      }
    k.product[int(format)](p.panel(), p.activations(), M, p.depth, p.y.floats(), kPanel + 3);
    for (i64 m = 0; m < M; m++)
      for (i64 n = 0; n < kPanel; n++) {
        double sum = 0, size = 0;
        for (i64 i = 0; i < K; i++) {
          const double term = p.used[size_t(m * K + i)] * p.exact[size_t(n * K + i)];
          sum += term, size += std::fabs(term);
        }
        check.near(p.y[m * (kPanel + 3) + n], sum, 1e-6 * size + 1e-6);
      }
    check.holds(p.y.intact(kPanel, kPanel + 3), "wrote beside its rows");
    rows_do_not_depend(p);
    if (k.unpack[int(format)]) unpacked(p);
  }
  // Two panels together: the bits of each alone. They differ, as one has the inputs of the other along k.
  void together(Format format, i64 M, i64 K) const {
    if (!k.products[int(format)]) return;
    Product p(*this, format, M, K);
    const i64 bytes = panel_bytes(format, K), ldy = 2 * kPanel + 3;
    std::vector<char> memory(size_t(2 * bytes + 64 + Product::kAhead));
    char* panels = memory.data() + (64 - reinterpret_cast<uintptr_t>(memory.data()) % 64) % 64;
    Array turned(DType::f32, kPanel * K), y(DType::f32, M * ldy), alone(DType::f32, M * kPanel);
    for (i64 i = 0; i < kPanel * K; i++) turned.set(i, p.w[kPanel * K - 1 - i]);
    std::memcpy(panels, p.panel(), size_t(bytes));
    engine::pack(format, turned.floats(), K, kPanel, K, 1.f, 0, 1, panels + bytes);
    k.products[int(format)](panels, 2, p.activations(), M, p.depth, y.floats(), ldy);
    Check check("products of panels together", kFormatNames[int(format)], "M", M, "K", K);
    for (i64 i = 0; i < 2; i++) {
      k.product[int(format)](panels + i * bytes, p.activations(), M, p.depth, alone.floats(), kPanel);
      for (i64 m = 0; m < M; m++)
        for (i64 n = 0; n < kPanel; n++) check.near(y[m * ldy + i * kPanel + n], alone[m * kPanel + n], 0);
    }
    check.holds(y.intact(2 * kPanel, ldy), "wrote beside its rows");
  }
  // Any bytes of blocks, and scales far apart, in the second panel of a matrix that ends where its memory does.
  void blocks(i64 M, i64 K) const {
    Random random(uint64_t(K * 10 + M));
    const i64 groups = K / kGroup;
    std::vector<uint8_t> codes(size_t(2 * kPanel * K / 2)), scales(size_t(2 * kPanel * groups));
    for (uint8_t& b : codes) b = uint8_t(random.next());
    for (uint8_t& s : scales)
      s = uint8_t(random.next() % 10 ? 87 + random.next() % 80 : 0);  // 0: the smallest, in all but name
    Array x(DType::f32, M * K), y(DType::f32, M * (kPanel + 3));
    x.fill(random, 1);
    std::vector<int8_t> q(size_t(M * K), 99);
    std::vector<float> scale(size_t(M * groups), NAN);
    std::vector<int32_t> start(size_t(M * groups), 1 << 20);
    const Activations in{x.floats(), K, nullptr, q.data(), scale.data(), start.data(), K};
    for (i64 m = 0; m < M; m++) k.quantize_activations(Format::mxfp4, x.floats() + m * K, K, in, m, 1.f);
    k.product_of_blocks({codes.data() + kPanel * K / 2, scales.data() + kPanel * groups}, in, M, K, y.floats(),
                        kPanel + 3);
    Check check("product of blocks M", M, "K", K);
    for (i64 m = 0; m < M; m++)
      for (i64 n = 0; n < kPanel; n++) {
        double sum = 0, size = 0;
        for (i64 i = 0; i < K; i++) {
          const i64 at = (kPanel + n) * K + i;
          const double level = kMxfp4[codes[size_t(at / 2)] >> at % 2 * 4 & 15];
          const double term = std::ldexp(level, scales[size_t(at / kGroup)] - kMxfp4Bias) *
                              stands_for(Format::mxfp4, q.data() + m * K, scale.data() + m * groups, i);
          sum += term, size += std::fabs(term);
        }
        check.near(y[m * (kPanel + 3) + n], sum, 1e-6 * size + 1e-36);
      }
    check.holds(y.intact(kPanel, kPanel + 3), "wrote beside its rows");
    Array alone(DType::f32, kPanel);
    k.product_of_blocks({codes.data() + kPanel * K / 2, scales.data() + kPanel * groups}, in.from(M - 1), 1, K,
                        alone.floats(), kPanel);
    for (i64 n = 0; n < kPanel; n++) check.near(alone[n], y[(M - 1) * (kPanel + 3) + n], 0);
  }
  // bf16: four products and loads for 32 k. int8: for 16 outputs a product, two loads and a store.
  void tiles() const {
    for (const bool bytes : {false, true}) {
      Product p(*this, bytes ? Format::int8 : Format::bf16, 32, 256);
      Check check("tiles of the engine", kFormatNames[int(p.format)]);
      const emulated::Counts before = emulated::counts(),
                             want = bytes ? emulated::Counts{1, 64, 32, 32} : emulated::Counts{1, 32, 4, 32};
      k.product[int(p.format)](p.panel(), p.activations(), p.M, p.depth, p.y.floats(), kPanel);
      counted(check, before, want);
    }
  }
  // The first and the last row alone: the same bits.
  void rows_do_not_depend(Product& p) const {
    Check check("a row of a product alone", kFormatNames[int(p.format)], "M", p.M, "K", p.K);
    for (i64 m : {i64(0), p.M - 1}) {
      Array y(DType::f32, kPanel);
      Activations x = p.activations();
      x.f32 += m * x.f32_stride, x.bf16 += m * x.stride, x.q += m * x.stride;
      x.scale += m * x.stride / kGroup, x.acc_init += m * x.stride / kGroup;
      k.product[int(p.format)](p.panel(), x, 1, p.depth, y.floats(), kPanel);
      for (i64 n = 0; n < kPanel; n++) check.near(y[n], p.y[m * (kPanel + 3) + n], 0);
    }
  }
  // A panel of few bits as one of int8: the bits of the direct product.
  void unpacked(Product& p) const {
    std::vector<char> memory(size_t(panel_bytes(Format::int8, p.K) + 2 * Product::kAhead));
    char* panel = memory.data() + (64 - reinterpret_cast<uintptr_t>(memory.data()) % 64) % 64;
    k.unpack[int(p.format)](p.panel(), p.depth, panel);
    Array y(DType::f32, p.M * kPanel);
    Activations x = p.activations();
    x.offset = weight_offset(p.format);
    k.product[int(Format::int8)](panel, x, p.M, p.depth, y.floats(), kPanel);
    Check check("unpack", kFormatNames[int(p.format)], "M", p.M, "K", p.K);
    for (i64 m = 0; m < p.M; m++)
      for (i64 n = 0; n < kPanel; n++) check.near(y[m * kPanel + n], p.y[m * (kPanel + 3) + n], 0);
  }

  void epilogues() const {
    Random random(8);
    constexpr i64 M = 3;
    Array y(DType::f32, M * kPanel), bias(DType::f32, kPanel), out(DType::f32, M * kPanel);
    y.fill(random, 3), bias.fill(random, 1);
    for (int e = 0; e < kEpilogues; e++) {
      Array before(DType::f32, M * kPanel);
      before.fill(random, 1);
      std::memcpy(out.data(), before.data(), size_t(M * kPanel) * 4);
      k.epilogue(Epilogue(e), y.floats(), kPanel, M, bias.floats(), out.floats(), kPanel);
      Check check("epilogue", kEpilogueNames[e]);
      for (i64 i = 0; i < M * kPanel; i++) {
        const double z = y[i] + bias[i % kPanel], u = 0.7978845608028654 * (z + 0.044715 * z * z * z);
        const double want[] = {z,
                               before[i] + z,
                               0.5 * z * (1 + std::tanh(u)),
                               0.5 * z * std::erfc(-z * 0.7071067811865476),
                               std::max(z, 0.),
                               z / (1 + std::exp(-z)),
                               z / (1 + std::exp(-1.702 * z)),
                               std::tanh(z),
                               std::max(z, 0.) * std::max(z, 0.)};
        check.near(out[i], want[e], 3e-6, 3e-6);
      }
    }
  }

  void lora(DType type, i64 M, i64 K, i64 r) const {
    Random random{uint64_t(K)};
    constexpr i64 N = 2 * kPanel;  // the last two panels of three
    const i64 lda = lora_stride(K), wide = M + M / 2;
    Array x(DType::f32, wide * (K + 1)), A(type, r * lda), B(type, 3 * r * kPanel);
    Array h(DType::f32, wide * r), y(DType::f32, wide * N), before(DType::f32, wide * N);
    x.fill(random, 1, K, K + 1), A.fill(random, 1), B.fill(random, 1), h.fill(random, 1), before.fill(random, 1);
    std::vector<i64> rows;  // two of three
    for (i64 m = 0; m < wide; m++)
      if (i64(rows.size()) < M && m % 3 != 1) rows.push_back(m);
    for (i64 j = 0; j < r; j++)
      for (i64 i = K; i < lda; i++) A.set(j * lda + i, 0);
    for (i64 i = 0; i < y.size(); i++) y.set(i, before[i]);
    std::vector<double> untouched(size_t(h.size()));
    for (i64 i = 0; i < h.size(); i++) untouched[size_t(i)] = h[i];
    const bool half = type == DType::bf16;
    const auto at = [](const Array& x) { return static_cast<const char*>(x.data()); };
    const LowRank update{at(A), at(B), half, r, 0.5f, lda * (half ? 2 : 4)};
    const i64 split = r / 2;  // in two parts, as threads share the ranks
    for (auto [first, last] : {std::pair<i64, i64>{0, split}, {split, r}})
      k.lora_down(x.floats(), K + 1, rows.data(), M, K, update.ranks(first, last), h.floats() + first, r);
    k.lora_up(h.floats(), r, rows.data(), M, update, 1, 2, y.floats(), N);
    Check check("lora", int(type), "M", M, "K", K, "r", r);
    for (i64 m = 0; m < wide; m++) {
      const bool updated = std::find(rows.begin(), rows.end(), m) != rows.end();
      for (i64 j = 0; j < r; j++) {
        double sum = 0;
        for (i64 i = 0; i < K; i++) sum += 0.5 * x[m * (K + 1) + i] * A[j * lda + i];
        if (updated) check.near(h[m * r + j], sum, 1e-5 * std::sqrt(double(K)));
        else check.holds(h[m * r + j] == untouched[size_t(m * r + j)], "wrote to another row");
      }
      for (i64 n = 0; n < N; n++) {
        double sum = before[m * N + n];
        for (i64 j = 0; j < r && updated; j++)
          sum += h[m * r + j] * B[((1 + n / kPanel) * r + j) * kPanel + n % kPanel];
        check.near(y[m * N + n], sum, 1e-5 * std::sqrt(double(K)));
      }
    }
    check.holds(h.intact() && y.intact(), "wrote beside its rows");
  }

  void layer_norm(i64 C) const {
    Random random{uint64_t(C)};
    Array x(DType::f32, C), w(DType::f32, C), b(DType::f32, C), y(DType::f32, C);
    x.fill(random, 2), w.fill(random, 1), b.fill(random, 1);
    Check check("engine layer_norm C", C);
    for (const float* bias : {static_cast<const float*>(b.floats()), static_cast<const float*>(nullptr)}) {
      k.layer_norm(x.floats(), w.floats(), bias, 1e-5f, C, y.floats());
      double mean = 0, variance = 0;
      for (i64 c = 0; c < C; c++) mean += x[c] / double(C);
      for (i64 c = 0; c < C; c++) variance += (x[c] - mean) * (x[c] - mean) / double(C);
      for (i64 c = 0; c < C; c++)
        check.near(y[c], (x[c] - mean) / std::sqrt(variance + 1e-5) * w[c] + (bias ? b[c] : 0), 2e-5, 1e-5);
    }
    check.holds(y.intact(), "wrote beside its row");
  }

  void rms_norm(i64 C) const {
    Random random{uint64_t(C)};
    Array x(DType::f32, C), w(DType::f32, C), y(DType::f32, C);
    x.fill(random, 2), w.fill(random, 1);
    Check check("engine rms_norm C", C);
    double squares = 0;
    for (i64 c = 0; c < C; c++) squares += double(x[c]) * x[c] / double(C);
    for (const float* weight : {static_cast<const float*>(w.floats()), static_cast<const float*>(nullptr)}) {
      k.rms_norm(x.floats(), weight, 1e-5f, C, y.floats());
      for (i64 c = 0; c < C; c++) check.near(y[c], x[c] / std::sqrt(squares + 1e-5) * (weight ? w[c] : 1), 2e-6, 2e-6);
    }
    check.holds(y.intact(), "wrote beside its row");
  }

  void rotate(i64 half, bool interleaved) const {
    Random random{uint64_t(half)};
    const i64 D = 2 * half + 3;
    Array x(DType::f32, D), before(DType::f32, D), cos(DType::f32, half), sin(DType::f32, half);
    before.fill(random, 1), cos.fill(random, 1), sin.fill(random, 1);
    for (i64 i = 0; i < D; i++) x.set(i, before[i]);
    k.rotate(cos.floats(), sin.floats(), half, interleaved, x.floats());
    Check check("rotate half", half, "interleaved", interleaved);
    for (i64 i = 0; i < half; i++) {
      const i64 first = interleaved ? 2 * i : i, second = interleaved ? 2 * i + 1 : half + i;
      check.near(x[first], before[first] * cos[i] - before[second] * sin[i], 1e-6, 1e-6);
      check.near(x[second], before[second] * cos[i] + before[first] * sin[i], 1e-6, 1e-6);
    }
    for (i64 i = 2 * half; i < D; i++) check.near(x[i], before[i], 0);
    check.holds(x.intact(), "wrote beside its row");
  }

  void gates(i64 C) const {
    Random random{uint64_t(C)};
    Array x(DType::f32, 2 * C), y(DType::f32, C);
    x.fill(random, 9);
    Check check("gate and cap C", C);
    for (const GateForm& form : {GateForm{}, GateForm{1.702f, 1.f, 7.f, false}, GateForm{1.702f, 1.f, 7.f, true}}) {
      k.gate(form, x.floats(), C, y.floats());
      for (i64 c = 0; c < C; c++) {
        const double most = form.limit, g = x[form.interleaved ? 2 * c : c],
                     u = x[form.interleaved ? 2 * c + 1 : C + c];
        const double gate = std::min<double>(g, most), up = std::clamp<double>(u, -most, most);
        check.near(y[c], (up + form.shift) * gate / (1 + std::exp(-form.alpha * gate)), 3e-6, 3e-6);
      }
    }
    for (i64 c = 0; c < C; c++) y.set(c, x[c]);
    k.cap(4.f, C, y.floats());
    for (i64 c = 0; c < C; c++) check.near(y[c], 4 * std::tanh(x[c] / 4), 1e-6, 2e-6);
    check.holds(y.intact(), "wrote beside its row");
  }

  struct Attention {
    i64 n, start, D, window, group = 1;  // group: heads of queries that read one of keys, of one position
    float softcap = 0.f;
    bool sinks = false;
  };
  void attend(DType cache, const Attention& a) const {
    const i64 n = a.n, start = a.start, D = a.D, group = a.group;
    const i64 heads = n == 1 ? 3 : 1;  // the heads of one query, or the queries of one head
    const i64 stride = heads * D + 1, wide = heads * group * D + 1, positions = start + n, size = element_size(cache);
    const i64 key_bytes = key_elements(D) * size, value_bytes = value_elements(D) * size;
    const i64 pages = (positions + kPage - 1) / kPage, page_bytes = heads * (key_bytes + value_bytes);
    std::vector<uint8_t> memory(size_t(pages * page_bytes + 64 + 16384), 0);
    std::vector<char*> page;
    for (i64 i = 0; i < pages; i++)
      page.push_back(reinterpret_cast<char*>(memory.data()) +
                     (64 - reinterpret_cast<uintptr_t>(memory.data()) % 64) % 64 + i * page_bytes);
    Random random(uint64_t(positions * 10 + D));
    Array q(DType::f32, positions * wide), key(DType::f32, positions * stride), value(DType::f32, positions * stride);
    q.fill(random, 1, heads * group * D, wide);
    for (Array* x : {&key, &value}) x->fill(random, 1, heads * D, stride);
    Array out(DType::f32, n * wide), scratch(DType::f32, attend_scratch(heads * group, positions), true);
    Array sinks(DType::f32, heads * group);
    sinks.fill(random, 2);
    AttendParams p = {};
    p.k = key.floats(), p.v = value.floats(), p.stride = stride;
    p.n = positions, p.heads = heads, p.D = D;
    p.cache = cache, p.pages = page.data(), p.values = heads * key_bytes;
    k.store_kv(p);
    p.together = group > 1;
    p.q = q.floats() + start * wide, p.q_stride = p.together ? D : wide, p.q_heads = group * D;
    p.n = p.together ? group : n, p.start = start;
    p.window = a.window, p.scale = float(1 / std::sqrt(double(D))), p.softcap = a.softcap;
    p.sinks = a.sinks ? sinks.floats() : nullptr;
    p.out = out.floats(), p.out_stride = p.q_stride, p.scratch = scratch.floats();
    k.attend(k, p);
    Check check("attend", cache, "n", n, "start", start, "D", D, "window", a.window, "group", group, "softcap",
                int(a.softcap), "sinks", a.sinks);
    const auto kept = [&](double x) { return cache == DType::f32 ? x : widened(cache, narrowed(cache, float(x))); };
    for (i64 i = start; i < positions; i++)
      for (i64 g = 0; g < heads * group; g++) {
        const i64 h = g / group, first = a.window ? std::max<i64>(0, i - a.window + 1) : 0;
        std::vector<double> w(size_t(i + 1), 0.);
        double top = a.sinks ? double(sinks[g]) : -INFINITY, sum = 0;
        for (i64 j = first; j <= i; j++) {
          double& score = w[size_t(j)];
          for (i64 d = 0; d < D; d++)
            score += q[i * wide + g * D + d] * kept(key[j * stride + h * D + d]) * double(p.scale);
          if (a.softcap > 0) score = a.softcap * std::tanh(score / a.softcap);
          top = std::max(top, score);
        }
        for (i64 j = first; j <= i; j++) sum += w[size_t(j)] = std::exp(w[size_t(j)] - top);
        if (a.sinks) sum += std::exp(sinks[g] - top);
        for (i64 d = 0; d < D; d++) {
          double want = 0;
          for (i64 j = first; j <= i; j++) want += w[size_t(j)] / sum * kept(value[j * stride + h * D + d]);
          check.near(out[(i - start) * wide + g * D + d], want, 5e-6, 1e-5);
        }
      }
    check.holds(out.intact(heads * group * D, wide) && scratch.intact(), "wrote beside its rows");
  }

  void checksum() const {
    std::vector<char> bytes(2000);
    Random random(12);
    for (char& b : bytes) b = char(random.next());
    Check check("checksum and read");
    for (i64 n : {0, 1, 255, 256, 257, 1999}) {
      const uint64_t mark = k.checksum(bytes.data() + 1, n, 5),
                     scalar = engine::kernels("scalar")->checksum(bytes.data() + 1, n, 5);
      check.holds(mark == scalar, "another mark");
    }
    (void)k.read(bytes.data(), 1999);
  }
};

}  // namespace

void check_engine(const char* isa) {
  const Checker c{*engine::kernels(isa)};
  for (int f = 0; f < kFormats; f++) {
    c.weights(Format(f));
    for (i64 M : {1, 2, 3, 4, 5, 6, 7, 15, 16, 17})
      for (i64 K : {1, 33, 68}) c.product(Format(f), M, K);
    for (i64 M : {32, 33, 50}) c.product(Format(f), M, 100);
    c.product(Format(f), 35, 548);  // more than once what is unpacked together
    for (i64 M : {5, 32, 49}) c.together(Format(f), M, 548);
  }
  for (i64 M : {1, 2, 5, 17})
    for (i64 K : {32, 480, 544, 2880}) c.blocks(M, K);  // rows of scales that fill 16 and do not
  if (!std::strcmp(isa, "amx")) c.tiles();
  c.epilogues();
  for (DType type : {DType::f32, DType::bf16})
    for (i64 M : {1, 5})
      for (i64 r : {1, 4, 9}) c.lora(type, M, 35, r);
  for (i64 C : {1, 5, 64, 67}) c.layer_norm(C), c.rms_norm(C), c.gates(C);
  for (i64 half : {1, 7, 32, 40}) c.rotate(half, false), c.rotate(half, true);
  for (DType cache : kTypes) {
    c.attend(cache, {1, 0, 5, 0}), c.attend(cache, {1, 130, 64, 0}), c.attend(cache, {9, 60, 24, 0});
    c.attend(cache, {7, 120, 12, 70}), c.attend(cache, {1, 130, 20, 70, 8, 0.f, true});
    c.attend(cache, {7, 66, 12, 70, 1, 3.f, true}), c.attend(cache, {1, 70, 24, 0, 3, 2.f});
  }
  c.checksum();
}

}  // namespace gptfast::checks
