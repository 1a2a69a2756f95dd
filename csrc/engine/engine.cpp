#include "engine.h"

#include <algorithm>
#include <chrono>
#include <stdexcept>

#include "pack.h"

namespace gptfast::engine {

namespace {
constexpr i64 kPrefillChunk = 256;  // tokens of a pass: their activations stay in the caches
}  // namespace

Engine::Engine(const Shape& shape, const Formats& formats, char* weights, int threads, DType cache,
               const Kernels& kernels)
    : model_(shape, formats), weights_(weights), kernels_(kernels), pool_(threads), cache_type_(cache),
      key_bytes_(key_elements(shape.D) * element_size(cache)),
      value_bytes_(value_elements(shape.D) * element_size(cache)),
      layer_bytes_(shape.kv_heads * (key_bytes_ + value_bytes_)), Cp_(round_up(shape.C, kPanel)),
      Qp_(round_up(shape.qkv(), kPanel)), Ap_(round_up(shape.attended(), kPanel)), Fp_(round_up(shape.fc(), kPanel)),
      stride_(std::max({Cp_, Ap_, round_up(shape.F, kPanel)})), next_(size_t(3 * shape.layers)), own_(size_t(threads)) {
  zeros_.grow(Cp_);
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
  pool_.run([&](int t) {
    const Range mine = share(weight.N, t);
    for (i64 n = mine.first; n < mine.last; n++)
      kernels_.embed(weight.format, from, weight.K, n, weight.factor, zeros.data(), values + n * ld);
  });
}

double Engine::read_rate(int times) {
  const std::lock_guard guard(mutex_);
  std::atomic<int64_t> sink{0};
  const auto start = std::chrono::steady_clock::now();
  pool_.run([&](int t) {
    const Range mine = share(model_.bytes / 4096, t);
    for (int i = 0; i < times; i++) {
      sink += kernels_.read(weights_ + mine.first * 4096, (mine.last - mine.first) * 4096);
      pool_.barrier(t);
    }
  });
  return double(model_.bytes) * times / std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

void Engine::extend(Cache& cache, const std::vector<i64>& rows, const std::vector<i64>& counts, const int* tokens,
                    bool last_only, float* out, i64 ld) {
  const std::lock_guard guard(mutex_);
  cache.check_rows("extend", rows);
  for (size_t i = 0; i < rows.size(); i++) cache.check_room("extend", rows[i], counts[i]);
  extend_locked(cache, rows, counts, tokens, last_only, out, ld);
}

void Engine::prefix(Cache& cache, i64 row, const float* vectors, i64 n) {
  const std::lock_guard guard(mutex_);
  cache.check_live("prefix", row);
  if (cache.length(row) || n < 1 || n >= model_.shape.positions)
    throw std::invalid_argument("prefix: expected an empty slot and fewer vectors than block_size");
  reserve(cache, {row}, {n});
  for (i64 at = 0; at < n; at += kPrefillChunk)
    run_chunk({{0, std::min(n - at, kPrefillChunk), at, 0, 0, cache.pages(row), &cache.adapters(row),
                vectors + at * model_.shape.C}},
              nullptr, nullptr, 0);
  cache.append(row, n);
  cache.set_prefix(row);
}

// The first positions of one head of a page.
void Engine::copy_head(const char* from, char* to, i64 layer, i64 head, i64 positions) const {
  const i64 size = element_size(cache_type_), D = model_.shape.D;
  const i64 keys = layer * layer_bytes_ + head * key_bytes_;
  const i64 values = layer * layer_bytes_ + model_.shape.kv_heads * key_bytes_ + head * value_bytes_;
  for (i64 at = keys; at < keys + key_bytes_; at += kPage * size)
    std::memcpy(to + at, from + at, size_t(positions * size));
  std::memcpy(to + values, from + values, size_t(positions * padded_head(D) * size));
}

void Engine::reserve(Cache& cache, const std::vector<i64>& rows, const std::vector<i64>& counts) {
  std::vector<Cache::Copy> copies;
  const auto copy = [&] {
    pool_.run([&](int t) {
      const Range mine = share(model_.shape.kv_heads, t);
      for (const auto& [from, to, positions] : copies)
        for (i64 layer = 0; layer < model_.shape.layers; layer++)
          for (i64 head = mine.first; head < mine.last; head++) copy_head(from, to, layer, head, positions);
    });
  };
  try {
    for (size_t i = 0; i < rows.size(); i++) cache.reserve(rows[i], counts[i], copies);
  } catch (const std::bad_alloc&) {  // what has a page of its own already must not lose its past
    copy();
    throw;
  }
  if (!copies.empty()) copy();
}

void Engine::extend_locked(Cache& cache, const std::vector<i64>& rows, const std::vector<i64>& counts,
                           const int* tokens, bool last_only, float* out, i64 ld) {
  reserve(cache, rows, counts);
  std::vector<Run> runs;
  i64 M = 0, wanted = 0, written = 0, done = 0;
  auto flush = [&] {
    if (!M) return;
    run_chunk(runs, tokens + done, out + written * ld, ld);
    written += std::exchange(wanted, 0);
    done += std::exchange(M, 0);
    runs.clear();
  };
  for (size_t i = 0; i < rows.size(); i++)
    for (i64 at = 0; at < counts[i];) {
      const i64 n = std::min(counts[i] - at, kPrefillChunk - M);
      const i64 logits = !last_only ? n : at + n == counts[i] ? 1 : 0;
      runs.push_back(
          {M, n, cache.length(rows[i]) + at, logits, wanted, cache.pages(rows[i]), &cache.adapters(rows[i]), nullptr});
      at += n;
      M += n;
      wanted += logits;
      if (M == kPrefillChunk) flush();
    }
  flush();
  for (size_t i = 0; i < rows.size(); i++) cache.append(rows[i], counts[i]);
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
  for (Thread& own : own_) inputs(own.inputs, 1);
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
