// Adapters for Python: A and B of each matrix become one block that the engine reads.
#pragma once
#include <memory>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "../engine/adapter.h"
#include "arguments.h"
#include "matrix.h"

namespace gptfast::engine {

// The updates of an adapter for engines of this shape.
class PyAdapter {
 public:
  // (number of the matrix, scale, A, B) of each; half: to be held in bf16
  using Source = std::tuple<i64, double, Object, Object>;
  PyAdapter(const Object& shape, bool half, const std::vector<Source>& sources) {
    const Shape s = shape_of(shape);
    std::vector<Adapter::Source> updates;
    for (const auto& [number, scale, a, b] : sources) {
      const Matrix A("adapter", a), B("adapter", b);
      const auto [N, K] = size_of(s, number);
      if (A.columns != K || B.rows != N || B.columns != A.rows || A.rows < 1)
        throw std::invalid_argument("adapter: A or B of matrix " + std::to_string(number) + " has another shape");
      updates.push_back({number, A.rows, float(scale), A.data, B.data, A.ld, B.ld});
    }
    const python::WithoutGil release;
    adapter_ = std::make_shared<const Adapter>(s, half, updates);
  }
  const std::shared_ptr<const Adapter>& get() const { return adapter_; }
  i64 bytes() { return adapter_->bytes(); }

 private:
  std::shared_ptr<const Adapter> adapter_;
};

}  // namespace gptfast::engine
