// The sequences of an engine for Python.
#pragma once
#include <atomic>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "adapter.h"
#include "engine_class.h"

namespace gptfast::engine {

// Sequences of one engine. Every call checks and acts under one lock.
class PyCache {
  template <class Fn> auto locked(Fn f) {
    const WithoutGil release;
    const std::lock_guard guard(engine_->get().lock());
    return f();
  }
  std::vector<i64> add_rows(i64 count) {
    cache_.check_free(count);
    std::vector<i64> rows;
    for (i64 n = 0; n < count; n++) rows.push_back(cache_.add());
    return rows;
  }
  i64 panels_of_logits() const { return round_up(engine_->get().model().shape.V, kPanel); }

 public:
  PyCache(std::shared_ptr<PyEngine> engine, i64 capacity, i64 max_len)
      : engine_(std::move(engine)),
        cache_(checked(*engine_, capacity, max_len), capacity, max_len, engine_->get().model().shape.positions) {}

  // Empty rows under these adapters.
  std::vector<i64> add(i64 count, const std::vector<std::shared_ptr<PyAdapter>>& given) {
    Adapters adapters;
    for (const auto& adapter : given) adapters.push_back(adapter->get());
    for (const auto& adapter : adapters)
      if (!adapter->fits(engine_->get().model().shape))
        throw std::invalid_argument("allocate: the adapter is for a model of another shape");
    return locked([&] {
      const std::vector<i64> rows = add_rows(count);
      for (i64 row : rows) cache_.set_adapters(row, adapters);
      return rows;
    });
  }
  // Copies of a row.
  std::vector<i64> fork(i64 count, i64 row) {
    return locked([&] {
      cache_.check_live("fork", row);
      const std::vector<i64> rows = add_rows(count);
      cache_.copy(rows, std::vector<i64>(rows.size(), row));
      return rows;
    });
  }
  i64 bytes() {
    return locked([&] { return cache_.bytes(); });
  }
  std::vector<i64> lengths() {
    return locked([&] {
      std::vector<i64> all;
      for (i64 row = 0; row < cache_.capacity(); row++) all.push_back(cache_.tokens_of(row));
      return all;
    });
  }
  void release(i64 row) {
    locked([&] { return cache_.check_live("free", row), cache_.release(row), 0; });
  }
  void truncate(i64 row, i64 length) {
    const WithoutGil release;
    engine_->get().truncate(cache_, row, length);
  }
  void copy(const std::vector<i64>& rows, const std::vector<i64>& sources) {
    if (rows.size() != sources.size()) throw std::invalid_argument("copy: as many rows as sources are needed");
    locked([&] {
      cache_.check_rows("copy", rows);
      for (i64 row : sources) cache_.check_live("copy", row);
      return cache_.copy(rows, sources), 0;
    });
  }
  void extend(const std::vector<i64>& rows, const std::vector<i64>& counts, const std::vector<int>& tokens,
              bool last_only, const Object& capsule) {
    const Matrix out("extend", capsule);
    if (rows.size() != counts.size()) throw std::invalid_argument("extend: as many counts as rows are needed");
    i64 total = 0;
    for (i64 count : counts) {
      if (count < 1 || count > i64(tokens.size()) - total)
        throw std::invalid_argument("extend: counts and tokens differ");
      total += count;
    }
    if (total != i64(tokens.size())) throw std::invalid_argument("extend: counts and tokens differ");
    for (int token : tokens)
      if (token < 0 || token >= engine_->get().model().shape.V)
        throw std::invalid_argument("extend: a token is outside the vocabulary");
    check_logits("extend", out, last_only ? i64(rows.size()) : total, panels_of_logits());
    const WithoutGil release;
    engine_->get().extend(cache_, rows, counts, tokens.data(), last_only, out.data, out.ld);
  }

  // See Engine::prefix.
  void prefix(i64 row, const Object& capsule) {
    const Matrix vectors("prefix", capsule);
    if (vectors.columns != engine_->get().model().shape.C || vectors.ld != vectors.columns)
      throw std::invalid_argument("prefix: expected (n, n_embd) vectors one after another");
    const WithoutGil release;
    engine_->get().prefix(cache_, row, vectors.data, vectors.rows);
  }

  // From any thread, also while another one decodes.
  void interrupt() { interrupted_ = true; }

  // Returns what each row got; see Engine::decode.
  std::vector<std::vector<int>> decode(const std::vector<i64>& rows, const std::vector<SamplingTuple>& tuples,
                                       const std::vector<i64>& ends, i64 steps, const Object& capsule) {
    const Matrix logits("decode_steps", capsule);
    const std::vector<Sampling> samplings = samplings_of("decode_steps", tuples);
    if (samplings.size() != rows.size())
      throw std::invalid_argument("decode_steps: as many samplings as rows are needed");
    if (steps < 1)
      throw std::invalid_argument("decode_steps: steps is " + std::to_string(steps) + "; expected at least 1");
    check_logits("decode_steps", logits, i64(rows.size()), panels_of_logits());
    std::vector<std::vector<int>> tokens;
    const WithoutGil release;
    engine_->get().decode(cache_, rows, samplings, ends, steps, interrupted_, logits.data, logits.ld, tokens);
    return tokens;
  }

 private:
  // The sizes of a page, where the others are some that the engine can have.
  static Cache::Sizes checked(PyEngine& engine, i64 capacity, i64 max_len) {
    if (capacity < 1) throw std::invalid_argument("sequences: the capacity must be at least 1");
    if (capacity >= i64(1) << 31) throw std::bad_alloc();
    if (max_len < 1 || max_len > engine.get().model().shape.positions)
      throw std::invalid_argument("sequences: max_len must be 1 to block_size");
    return engine.get().cache_sizes();
  }
  std::shared_ptr<PyEngine> engine_;
  Cache cache_;
  std::atomic<bool> interrupted_{false};
};

}  // namespace gptfast::engine
