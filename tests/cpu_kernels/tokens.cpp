// A small GPT whose greedy tokens are compared between machines, in every format of weights and cache.
#include "../../csrc/engine/engine.h"
#include "check.h"

namespace gptfast::checks {
namespace {

using namespace engine;

struct Model {
  Shape shape;
  std::vector<char> memory;
  Engine engine;

  static char* aligned(std::vector<char>& memory) {
    return memory.data() + (64 - reinterpret_cast<uintptr_t>(memory.data()) % 64) % 64;
  }
  Model(const Shape& s, Format f, DType cache, const Kernels& kernels)
      : shape(s), memory(size_t(engine::Model::bytes_of(s, formats(f))) + 64 + 16384),
        engine(s, formats(f), aligned(memory), 2, cache, kernels) {
    std::vector<std::string> names;
    for (const auto& [name, weight] : engine.model().by_name) names.push_back(name);
    std::sort(names.begin(), names.end());
    Random random(50);  // with it no decision is near another
    for (const std::string& name : names) {
      const Weight& weight = engine.model().by_name.at(name);
      std::vector<float> values(size_t(weight.N * std::max<i64>(weight.K, 1)));
      const bool norm = name.find("ln_") != std::string::npos && name.find("weight") != std::string::npos;
      const double size = name == "wte.weight" || name == "wpe.weight" ? 1
                          : weight.K                                   ? 1.5 / std::sqrt(double(weight.K))
                                                                       : 0.2;
      for (float& v : values) v = float(size * random.normal() + (norm ? 1 : 0));
      engine.pack(weight, values.data(), weight.K, 0, weight.N, 1.f);
    }
  }
  static Formats formats(Format f) { return {f, f, f, f, f}; }

  // What greedy decoding of two rows writes, and how near the second best token ever came.
  std::vector<int> write(i64 steps, double* margin) {
    const i64 ld = panels(shape.V) * kPanel;
    Cache cache(engine.cache_sizes(), 2, shape.positions, shape.positions);
    const std::vector<i64> rows = {cache.add(), cache.add()}, counts = {37, 3};
    std::vector<int> tokens, written;
    Random random(5);
    for (i64 i = 0; i < 40; i++) tokens.push_back(int(random.below(shape.V)));
    Buffer<float> logits;
    logits.grow(2 * ld);
    engine.extend(cache, rows, counts, tokens.data(), true, logits.get(), ld);
    for (i64 step = 0; step < steps; step++) {
      std::vector<int> next;
      for (i64 r = 0; r < 2; r++) {
        const float* row = logits.get() + r * ld;
        int best = 0;
        for (int v = 1; v < shape.V; v++)
          if (row[v] > row[best]) best = v;
        for (int v = 0; v < shape.V; v++)
          if (v != best) *margin = std::min(*margin, double(row[best]) - double(row[v]));
        next.push_back(best);
        written.push_back(best);
      }
      engine.extend(cache, rows, {1, 1}, next.data(), true, logits.get(), ld);
    }
    return written;
  }
};

}  // namespace

void print_tokens(const char* isa) {
  Shape shape;
  shape.layers = 2, shape.heads = 2, shape.C = 48, shape.F = 100, shape.V = 61, shape.positions = 128,
  shape.kv_heads = 2, shape.D = 24, shape.window = 20, shape.pattern = "LS", shape.tied = false;
  for (int f = 0; f < kFormats; f++)
    for (DType cache : kTypes) {
      if (f && cache != (f % 2 ? DType::bf16 : DType::f16)) continue;
      Model model(shape, Format(f), cache, *engine::kernels(isa));
      double margin = INFINITY;
      const std::vector<int> tokens = model.write(8, &margin);
      std::printf("tokens %s %s %s", isa, kFormatNames[f], name_of(cache));
      for (int t : tokens) std::printf(" %d", t);
      std::printf(" margin %.4f\n", margin);
    }
}

}  // namespace gptfast::checks
