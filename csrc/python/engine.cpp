// The inference engine for Python: pointers come in as integers or buffers; checks that speak to users are in
// gptfast.engine.
#include "engine.h"

#include <pthread.h>
#include <pybind11/stl.h>

#include <atomic>
#include <memory>
#include <mutex>
#include <set>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "../engine/engine.h"

namespace py = pybind11;

namespace gptfast::engine {
namespace {

Format format_named(const std::string& name) {
  for (int i = 0; i < kFormats; i++)
    if (name == kFormatNames[i]) return Format(i);
  throw std::invalid_argument("unknown format " + name);
}
cpu::DType type_named(const std::string& name) {
  if (name == "float32") return cpu::DType::f32;
  if (name == "float16") return cpu::DType::f16;
  if (name == "bfloat16") return cpu::DType::bf16;
  throw std::invalid_argument("unknown type " + name);
}
Shape shape_of(const py::dict& d) {
  Shape s;
  auto count = [&](const char* key) { return d[key].cast<i64>(); };
  auto flag = [&](const char* key) { return d[key].cast<bool>(); };
  s.layers = count("n_layer"), s.heads = count("n_head"), s.C = count("n_embd"), s.F = count("inner_dim");
  s.V = count("vocab_size"), s.positions = count("block_size"), s.window = count("window");
  s.pre_norm = flag("pre_norm"), s.final_norm = flag("final_norm"), s.gelu_tanh = flag("gelu_tanh");
  s.tied = flag("tied"), s.bias = flag("bias");
  s.eps = d["eps"].cast<float>(), s.embed_scale = d["embed_scale"].cast<float>();
  return s;
}
Formats formats_of(const py::dict& d) {
  auto of = [&](const char* key) { return format_named(d[key].cast<std::string>()); };
  return {of("c_attn"), of("attn_proj"), of("c_fc"), of("mlp_proj"), of("head")};
}

// fork() waits until no engine computes: the child, which has none of the other threads, would wait for ever for a lock
// that one of them held.
class Forks {
 public:
  static void add(Engine* engine) {
    static const int once = pthread_atfork(lock_all, unlock_all, unlock_all);
    (void)once;
    const std::lock_guard guard(mutex_);
    engines_.insert(engine);
  }
  static void remove(Engine* engine) {
    const std::lock_guard guard(mutex_);
    engines_.erase(engine);
  }

 private:
  static void lock_all() {
    mutex_.lock();
    for (Engine* engine : engines_) engine->lock().lock();
  }
  static void unlock_all() {
    for (Engine* engine : engines_) engine->lock().unlock();
    mutex_.unlock();
  }
  static inline std::mutex mutex_;
  static inline std::set<Engine*> engines_;
};

using SamplingTuple = std::tuple<float, i64, double, uint64_t, i64>;  // of gptfast.generation.sequences
std::vector<Sampling> samplings_of(const std::vector<SamplingTuple>& tuples) {
  std::vector<Sampling> samplings;
  for (const auto& [temperature, top_k, top_p, seed, stream] : tuples)
    samplings.push_back({temperature, top_k, top_p, seed, stream});
  return samplings;
}

// An engine and the memory it reads.
class PyEngine {
 public:
  PyEngine(const py::dict& shape, const py::dict& formats, py::buffer weights, int threads, const std::string& cache,
           const std::string& isa)
      : keep_(std::move(weights)), info_(keep_.request()) {
    const Kernels* k = kernels(isa.c_str());
    if (!k) throw std::invalid_argument("instruction set " + isa + " cannot run here");
    const Shape s = shape_of(shape);
    const Formats f = formats_of(formats);
    if (info_.size * info_.itemsize < Model(s, f).bytes)
      throw std::invalid_argument("the weights' memory is too small");
    if (reinterpret_cast<uintptr_t>(info_.ptr) % 64)
      throw std::invalid_argument("the weights' memory is not aligned to 64");
    engine_ = std::make_unique<Engine>(s, f, static_cast<char*>(info_.ptr), threads, type_named(cache), *k);
    Forks::add(engine_.get());
  }
  ~PyEngine() {
    if (engine_) Forks::remove(engine_.get());
  }
  PyEngine(const PyEngine&) = delete;
  PyEngine& operator=(const PyEngine&) = delete;
  Engine& get() { return *engine_; }

  void pack(const std::string& name, uintptr_t values, i64 N, i64 K, i64 ld) {
    const auto found = engine_->model().by_name.find(name);
    if (found == engine_->model().by_name.end()) throw std::invalid_argument("the model has no weight " + name);
    if (found->second.N != N || found->second.K != K) throw std::invalid_argument(name + " has another shape");
    if (info_.readonly) throw std::invalid_argument("the weights' memory cannot be written");
    const py::gil_scoped_release release;
    engine_->pack(found->second, reinterpret_cast<const float*>(values), ld);
  }

  // See Engine::draw.
  std::vector<i64> draw(const std::vector<SamplingTuple>& samplings, const std::vector<i64>& positions,
                        uintptr_t logits, i64 ld) {
    if (samplings.size() != positions.size()) throw std::invalid_argument("as many samplings as positions are needed");
    const py::gil_scoped_release release;
    return engine_->draw(samplings_of(samplings), positions, reinterpret_cast<const float*>(logits), ld);
  }

 private:
  py::buffer keep_;
  py::buffer_info info_;
  std::unique_ptr<Engine> engine_;
};

// Sequences of one engine.
class PyCache {
  template <class Fn>
  auto locked(Fn f) {
    const py::gil_scoped_release release;
    const std::lock_guard guard(engine_->get().lock());
    return f();
  }
  void live_row(i64 row) {
    if (!cache_.live(row)) throw std::invalid_argument("row " + std::to_string(row) + " is not in use");
  }

 public:
  PyCache(std::shared_ptr<PyEngine> engine, i64 capacity, i64 max_len)
      : engine_(std::move(engine)), cache_(engine_->get().page_bytes(), capacity, max_len) {}

  i64 add() {
    return locked([&] { return cache_.add(); });
  }
  i64 free_rows() {
    return locked([&] { return cache_.free_rows(); });
  }
  i64 bytes() {
    return locked([&] { return cache_.bytes(); });
  }
  bool live(i64 row) {
    return locked([&] { return cache_.live(row); });
  }
  i64 length(i64 row) {
    return locked([&] { return live_row(row), cache_.length(row); });
  }
  void release(i64 row) {
    locked([&] { return live_row(row), cache_.release(row), 0; });
  }
  void truncate(i64 row, i64 length) {
    locked([&] { return live_row(row), cache_.truncate(row, length), 0; });
  }
  void copy(const std::vector<i64>& rows, const std::vector<i64>& sources) {
    locked([&] {
      if (rows.size() != sources.size()) throw std::invalid_argument("as many rows as sources are needed");
      for (i64 row : rows) live_row(row);
      for (i64 row : sources) live_row(row);
      return cache_.copy(rows, sources), 0;
    });
  }
  void extend(const std::vector<i64>& rows, const std::vector<i64>& counts, const std::vector<int>& tokens,
              bool last_only, uintptr_t out, i64 ld) {
    const Shape& s = engine_->get().model().shape;
    i64 total = 0;
    for (size_t i = 0; i < rows.size(); i++) {
      live_row(rows[i]);
      if (counts.at(i) < 1 || cache_.length(rows[i]) + counts[i] > cache_.max_len())
        throw std::invalid_argument("no room");
      total += counts[i];
    }
    if (total != i64(tokens.size())) throw std::invalid_argument("counts and tokens differ");
    for (int token : tokens)
      if (token < 0 || token >= s.V) throw std::invalid_argument("token outside the vocabulary");
    const py::gil_scoped_release release;
    engine_->get().extend(cache_, rows, counts, tokens.data(), last_only, reinterpret_cast<float*>(out), ld);
  }

  // From any thread, also while another one decodes.
  void interrupt() { interrupted_ = true; }

  // Returns what each row got; see Engine::decode.
  std::vector<std::vector<int>> decode(const std::vector<i64>& rows, const std::vector<SamplingTuple>& samplings,
                                       const std::vector<i64>& ends, i64 steps, bool more, uintptr_t logits, i64 ld) {
    for (i64 row : rows) {
      live_row(row);
      if (cache_.length(row) + steps - !more > cache_.max_len()) throw std::invalid_argument("no room");
    }
    if (samplings.size() != rows.size()) throw std::invalid_argument("as many samplings as rows are needed");
    std::vector<std::vector<int>> tokens;
    const py::gil_scoped_release release;
    engine_->get().decode(cache_, rows, samplings_of(samplings), ends, steps, more, interrupted_,
                          reinterpret_cast<float*>(logits), ld, tokens);
    return tokens;
  }

 private:
  std::shared_ptr<PyEngine> engine_;
  Cache cache_;
  std::atomic<bool> interrupted_{false};
};

}  // namespace
}  // namespace gptfast::engine

void bind_engine(py::module_& m) {
  using namespace gptfast::engine;
  py::class_<PyEngine, std::shared_ptr<PyEngine>>(m, "Engine")
      .def(py::init<const py::dict&, const py::dict&, py::buffer, int, const std::string&, const std::string&>())
      .def("pack", &PyEngine::pack)
      .def("draw", &PyEngine::draw)
      .def("read_rate",
           [](PyEngine& e, int times) {
             const py::gil_scoped_release release;
             return e.get().read_rate(times);
           })
      .def_property_readonly("threads", [](PyEngine& e) { return e.get().threads(); })
      .def_property_readonly("page_bytes", [](PyEngine& e) { return e.get().page_bytes(); })
      .def_property_readonly("work_bytes", [](PyEngine& e) { return e.get().work_bytes(); });
  py::class_<PyCache>(m, "Cache")
      .def(py::init<std::shared_ptr<PyEngine>, i64, i64>())
      .def("add", &PyCache::add)
      .def("free_rows", &PyCache::free_rows)
      .def("bytes", &PyCache::bytes)
      .def("live", &PyCache::live)
      .def("length", &PyCache::length)
      .def("release", &PyCache::release)
      .def("truncate", &PyCache::truncate)
      .def("copy", &PyCache::copy)
      .def("extend", &PyCache::extend)
      .def("decode", &PyCache::decode)
      .def("interrupt", &PyCache::interrupt);
  m.def("packed_bytes", [](const py::dict& shape, const py::dict& formats) {
    return Model(shape_of(shape), formats_of(formats)).bytes;
  });
  m.def("weight_names", [](const py::dict& shape, const py::dict& formats) {
    std::vector<std::string> names;
    for (const auto& [name, weight] : Model(shape_of(shape), formats_of(formats)).by_name) names.push_back(name);
    return names;
  });
}
