// The inference engine for Python. Whatever could corrupt memory is checked here or in the engine, under its lock;
// gptfast.engine says the rest in its users' words.
#include "engine.h"

#include <atomic>
#include <cmath>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "../engine/checksum.h"
#include "adapter.h"
#include "arguments.h"
#include "bind.h"
#include "forks.h"

namespace gptfast::engine {

using python::WithoutGil;

namespace {

// An engine and the memory it reads.
class PyEngine {
 public:
  PyEngine(const Object& shape, const Object& formats, const Object& weights, int threads, const std::string& cache,
           const std::string& isa)
      : weights_(weights) {
    const Kernels* k = kernels(isa.c_str());
    if (!k) throw std::invalid_argument("instruction set " + isa + " cannot run here");
    if (threads < 1 || threads > kMostThreads) throw std::invalid_argument("threads must be 1 to 1024");
    const Shape s = shape_of(shape);
    const Formats f = formats_of(formats);
    const i64 needed = Model::bytes_of(s, f);
    if (weights_.size != needed)
      throw std::invalid_argument("the model does not fit its weights: they take " + std::to_string(needed) +
                                  " bytes, and " + std::to_string(weights_.size) + " are there");
    if (reinterpret_cast<uintptr_t>(weights_.data) % 64)
      throw std::invalid_argument("the weights' memory is not aligned to 64");
    const cpu::DType type = type_named(cache);
    const WithoutGil release;  // as many layers as bytes allow
    engine_ = std::make_unique<Engine>(s, f, weights_.data, threads, type, *k);
    Forks::add(engine_.get());
  }
  ~PyEngine() {
    if (engine_) Forks::remove(engine_.get());
  }
  PyEngine(const PyEngine&) = delete;
  PyEngine& operator=(const PyEngine&) = delete;
  Engine& get() { return *engine_; }
  int threads() { return engine_->threads(); }
  double read_rate(int times) {
    const WithoutGil release;
    return engine_->read_rate(times);
  }

  std::vector<std::string> weight_names() {
    std::vector<std::string> names;
    for (const auto& [name, weight] : engine_->model().by_name) names.push_back(name);
    return names;
  }

  // A whole vector, or rows of a matrix from `first` on, whole panels but for the last. 2^exponent divides them.
  void pack(const std::string& name, const Object& capsule, i64 first, int exponent) {
    const Matrix values(name.c_str(), capsule);
    const Weight& w = named(name);
    const i64 rows = values.rows;
    if (w.K ? values.columns != w.K || first < 0 || first % kPanel || rows < 1 || rows > w.N || first > w.N - rows ||
                  (rows % kPanel && first + rows != w.N)
            : rows != 1 || values.columns != w.N || first)
      throw std::invalid_argument(name + " has another shape");
    if (exponent < -126 || exponent > 126) throw std::invalid_argument(name + ": the exponent is out of range");
    if (weights_.readonly) throw std::invalid_argument("the weights' memory cannot be written");
    const WithoutGil release;
    engine_->pack(w, values.data, values.ld, first, rows, std::ldexp(1.f, exponent));
  }
  // Writes them back, as the engine computes with them.
  void unpack(const std::string& name, const Object& capsule) {
    const Matrix values(name.c_str(), capsule);
    const Weight& w = named(name);
    if (w.K ? values.rows != w.N || values.columns != w.K : values.rows != 1 || values.columns != w.N)
      throw std::invalid_argument(name + " has another shape");
    const WithoutGil release;
    engine_->unpack(w, values.data, values.ld);
  }

  // See Engine::draw.
  std::vector<i64> draw(const std::vector<SamplingTuple>& tuples, const std::vector<i64>& positions,
                        const Object& capsule) {
    const Matrix logits("draw", capsule);
    const std::vector<Sampling> samplings = samplings_of("draw", tuples);
    if (samplings.size() != positions.size())
      throw std::invalid_argument("draw: as many samplings as positions are needed");
    for (i64 position : positions)
      if (position < 0 || position > UINT32_MAX) throw std::invalid_argument("draw: a position is outside [0, 2**32)");
    check_logits("draw", logits, i64(samplings.size()), engine_->model().shape.V);
    const WithoutGil release;
    return engine_->draw(samplings, positions, logits.data, logits.ld);
  }

 private:
  const Weight& named(const std::string& name) {
    const auto found = engine_->model().by_name.find(name);
    if (found == engine_->model().by_name.end()) throw std::invalid_argument("the model has no weight " + name);
    return found->second;
  }

  static constexpr int kMostThreads = 1024;
  const Memory weights_;
  std::unique_ptr<Engine> engine_;
};

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
    locked([&] {
      cache_.check_live("truncate", row);
      if (length < 0 || length > cache_.tokens(row))
        throw std::invalid_argument("truncate: length is " + std::to_string(length) + "; slot " + std::to_string(row) +
                                    " holds " + std::to_string(cache_.tokens(row)) + " positions");
      return cache_.truncate(row, length), 0;
    });
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
  // The bytes of a page, where the sizes are some that the engine can have.
  static i64 checked(PyEngine& engine, i64 capacity, i64 max_len) {
    if (capacity < 1) throw std::invalid_argument("sequences: the capacity must be at least 1");
    if (capacity >= i64(1) << 31) throw std::bad_alloc();
    if (max_len < 1 || max_len > engine.get().model().shape.positions)
      throw std::invalid_argument("sequences: max_len must be 1 to block_size");
    return engine.get().page_bytes();
  }
  std::shared_ptr<PyEngine> engine_;
  Cache cache_;
  std::atomic<bool> interrupted_{false};
};

i64 packed_bytes(const Object& shape, const Object& formats) {
  return Model::bytes_of(shape_of(shape), formats_of(formats));
}

// By name; "" of vectors.
std::unordered_map<std::string, std::string> weight_formats(const Object& shape, const Object& formats) {
  const Shape s = shape_of(shape);
  const Formats f = formats_of(formats);
  std::unordered_map<std::string, std::string> found;
  const WithoutGil release;
  for (const auto& [name, weight] : Model(s, f).by_name) found[name] = weight.K ? kFormatNames[int(weight.format)] : "";
  return found;
}

uint64_t checksum_of(const std::vector<Object>& tensors, int threads, const std::string& isa) {
  const Kernels* k = kernels(isa.c_str());
  if (!k) throw std::invalid_argument("instruction set " + isa + " cannot run here");
  std::vector<Region> regions;
  for (const Object& tensor : tensors) {
    const Bytes bytes("checksum", tensor);
    regions.push_back({bytes.data, bytes.size});
  }
  const WithoutGil release;
  return checksum(regions, threads, *k);
}

using python::method;

PyMethodDef engine_methods[] = {method<&PyEngine::weight_names>("weight_names"),
                                method<&PyEngine::pack>("pack"),
                                method<&PyEngine::unpack>("unpack"),
                                method<&PyEngine::draw>("draw"),
                                method<&PyEngine::read_rate>("read_rate"),
                                {}};
PyGetSetDef engine_properties[] = {python::property<&PyEngine::threads>("threads"), {}};
PyGetSetDef adapter_properties[] = {python::property<&PyAdapter::bytes>("bytes"), {}};
PyMethodDef cache_methods[] = {method<&PyCache::add>("add"),
                               method<&PyCache::fork>("fork"),
                               method<&PyCache::bytes>("bytes"),
                               method<&PyCache::lengths>("lengths"),
                               method<&PyCache::release>("release"),
                               method<&PyCache::truncate>("truncate"),
                               method<&PyCache::copy>("copy"),
                               method<&PyCache::extend>("extend"),
                               method<&PyCache::prefix>("prefix"),
                               method<&PyCache::decode>("decode"),
                               method<&PyCache::interrupt>("interrupt"),
                               {}};
PyMethodDef functions[] = {method<&packed_bytes>("packed_bytes"),
                           method<&weight_formats>("weight_formats"),
                           method<&checksum_of>("checksum"),
                           {}};

}  // namespace

void bind(PyObject* module) {
  python::add_class<PyEngine, Object, Object, Object, int, std::string, std::string>(
      module, "gptfast._C.Engine", "A packed model, and the threads that compute with it.", engine_methods,
      engine_properties);
  python::add_class<PyAdapter, Object, std::vector<PyAdapter::Source>>(
      module, "gptfast._C.Adapter", "The low-rank updates of an adapter, as the engine reads them.", nullptr,
      adapter_properties);
  python::add_class<PyCache, std::shared_ptr<PyEngine>, i64, i64>(
      module, "gptfast._C.Cache", "Keys and values of the sequences of an engine.", cache_methods, nullptr);
  python::add_functions(module, functions);
}

}  // namespace gptfast::engine
