#include "engine.h"

#include <algorithm>
#include <chrono>
#include <stdexcept>

#include "pack.h"

namespace gptfast::engine {

Engine::Engine(const Shape& shape, const Formats& formats, char* weights, int threads, DType cache,
               const Kernels& kernels)
    : model_(shape, formats), weights_(weights), kernels_(kernels), pool_(threads), cache_type_(cache),
      key_bytes_(key_elements(shape.D) * element_size(cache)),
      value_bytes_(value_elements(shape.D) * element_size(cache)),
      layer_bytes_(shape.kv_heads * (key_bytes_ + value_bytes_)), Cp_(round_up(shape.C, kPanel)),
      Qp_(round_up(shape.qkv(), kPanel)), Ap_(round_up(shape.attended(), kPanel)), Fp_(round_up(shape.fc(), kPanel)),
      stride_(std::max({Cp_, Ap_, round_up(shape.F, kPanel)})), next_(size_t(3 * shape.layers)), own_(size_t(threads)) {
  zeros_.grow(Cp_);
  i64 places[2] = {0, 0};
  for (i64 l = 0; l < shape.layers; l++) place_.push_back(places[shape.window_of(l) > 0]++);
}

void Engine::pack(const Weight& weight, const float* values, i64 ld, i64 first, i64 rows, float factor) {
  const std::lock_guard guard(mutex_);
  char* to = weights_ + weight.offset;
  if (!weight.K) {
    std::memcpy(to, values, size_t(weight.N) * 4);
    return;
  }
  to += first / kPanel * panel_bytes(weight.format, weight.K);
  pool_.run([&](int t) {
    const Range mine = share(panels(rows), t);
    engine::pack(weight.format, values, ld, rows, weight.K, factor, mine.first, mine.last, to);
  });
}

void Engine::unpack(const Weight& weight, float* values, i64 ld) {
  const std::lock_guard guard(mutex_);
  const char* from = weights_ + weight.offset;
  if (!weight.K) {
    std::memcpy(values, from, size_t(weight.N) * 4);
    return;
  }
  const std::vector<float> zeros(size_t(weight.K));
  if (const Blocks& all = weight.outside; all.blocks) {
    const i64 K = weight.K;
    pool_.run([&](int t) {
      const Range mine = share(panels(weight.N), t);
      std::vector<char> panel(size_t(panel_bytes(weight.format, K)));  // the two parts together
      for (i64 p = mine.first; p < mine.last; p++) {
        std::memcpy(panel.data(), all.blocks + p * kPanel * K / 2, size_t(kPanel * K / 2));
        std::memcpy(panel.data() + kPanel * K / 2, all.scales + p * K, size_t(K));
        for (i64 n = 0; n < kPanel; n++)
          kernels_.embed(weight.format, panel.data(), K, n, 1.f, zeros.data(), values + (p * kPanel + n) * ld);
      }
    });
    return;
  }
  pool_.run([&](int t) {
    const Range mine = share(weight.N, t);
    for (i64 n = mine.first; n < mine.last; n++)
      kernels_.embed(weight.format, from, weight.K, n, weight.factor, zeros.data(), values + n * ld);
  });
}

double Engine::read_rate(int times) {
  const std::lock_guard guard(mutex_);
  std::atomic<int64_t> sink{0};
  i64 outside = 0;
  for (const auto& [name, part] : model_.formats.outside) outside += part.block_bytes;
  const auto start = std::chrono::steady_clock::now();
  pool_.run([&](int t) {
    const auto read = [&](const char* from, i64 bytes) {
      const Range mine = share(bytes / 4096, t);
      sink += kernels_.read(from + mine.first * 4096, (mine.last - mine.first) * 4096);
    };
    for (int i = 0; i < times; i++) {
      read(weights_, model_.bytes);
      for (const auto& [name, part] : model_.formats.outside)
        read(reinterpret_cast<const char*>(part.of.blocks), part.block_bytes);
      pool_.barrier(t);
    }
  });
  return double(model_.bytes + outside) * times /
         std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

void Engine::reserve_workspace(i64 M, i64 longest) {
  for (Thread& own : own_) own.scratch.grow(attend_scratch(model_.shape.heads, longest));
  if (M <= capacity_) return;
  const i64 rows = M == 1 ? 1 : round_up(M, 8);
  auto inputs = [&](Inputs& in, i64 n) {
    in.normed.grow(n * (model_.shape.gated ? stride_ : Cp_));
    in.bf16.grow(n * stride_);
    in.q.grow(n * stride_);
    in.scale.grow(n * stride_ / kGroup);
    in.acc_init.grow(n * stride_ / kGroup);
  };
  for (Thread& own : own_) {
    inputs(own.inputs, 1);
    if (kernels_.gathers && rows >= kUnpackedRows) own.products.grow(rows * kProductsRow);
  }
  inputs(shared_, rows);
  x_.grow(rows * Cp_);
  qkv_.grow(rows * Qp_);
  attended_.grow(rows * Ap_);
  hidden_.grow(rows * std::max<i64>(1, model_.shape.experts_a_token) * Fp_);
  branch_.grow(rows * Cp_);
  if (const i64 slots = rows * model_.shape.experts_a_token; slots) {
    inputs(routes_.inputs, slots);
    routes_.logits.grow(rows * round_up(model_.shape.experts, kPanel));
    routes_.answers.grow(slots * Cp_);
    for (auto* list : {&routes_.row, &routes_.expert, &routes_.slot}) list->resize(size_t(slots));
    routes_.share.resize(size_t(slots));
    routes_.first.resize(size_t(model_.shape.experts) + 1);
    routes_.active.reserve(size_t(model_.shape.experts));
  }
  capacity_ = rows;
}

void Engine::run_chunk(const std::vector<Run>& runs, const int* tokens, float* out, i64 ld) {
  i64 longest = 0;
  M_ = runs.back().first + runs.back().n;
  wanted_ = runs.back().row + runs.back().wanted;
  for (const Run& run : runs) longest = std::max(longest, run.start + run.n);
  reserve_workspace(M_, longest);
  runs_ = runs;
  note_adapters();
  for (auto& item : next_) item = 0;
  pool_.run([&](int t) { forward(t, tokens, out, ld); });
}

}  // namespace gptfast::engine
