// An engine for Python.
#pragma once
#include <cmath>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "arguments.h"
#include "forks.h"
#include "matrix.h"

namespace gptfast::engine {

using python::WithoutGil;

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
    const Formats f = formats_of(formats, &outside_);
    const i64 needed = Model::bytes_of(s, f);
    if (weights_.size != needed)
      throw std::invalid_argument("the model does not fit its weights: they take " + std::to_string(needed) +
                                  " bytes, and " + std::to_string(weights_.size) + " are there");
    if (reinterpret_cast<uintptr_t>(weights_.data) % 64)
      throw std::invalid_argument("the weights' memory is not aligned to 64");
    const DType type = type_named(cache);
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
    if (w.outside.blocks) throw std::invalid_argument(name + " lies outside the weights' memory");
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
  std::vector<Memory> outside_;
  std::unique_ptr<Engine> engine_;
};

}  // namespace gptfast::engine
