// Grow-only zeroed memory, aligned for every vector.
#pragma once
#include <cstdlib>
#include <cstring>
#include <new>
#include <utility>

#include "format.h"

namespace gptfast::engine {

template <class T> class Buffer {
 public:
  Buffer() = default;
  Buffer(Buffer&& other) noexcept : data_(std::exchange(other.data_, nullptr)), size_(std::exchange(other.size_, 0)) {}
  ~Buffer() { std::free(data_); }
  T* get() const { return data_; }
  void grow(i64 n) {
    if (n <= size_) return;
    std::free(std::exchange(data_, nullptr));
    size_ = 0;
    const size_t bytes = size_t(round_up(n * i64(sizeof(T)), 64));
    data_ = static_cast<T*>(std::aligned_alloc(64, bytes));
    if (!data_) throw std::bad_alloc();
    std::memset(data_, 0, bytes);
    size_ = n;
  }

 private:
  T* data_ = nullptr;
  i64 size_ = 0;
};

}  // namespace gptfast::engine
