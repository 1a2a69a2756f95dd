// Grow-only zeroed memory, aligned for every vector.
#pragma once
#include <cstring>
#include <utility>

#include "../cpu/system.h"
#include "format.h"

namespace gptfast::engine {

template <class T> class Buffer {
 public:
  Buffer() = default;
  Buffer(Buffer&& other) noexcept : data_(std::exchange(other.data_, nullptr)), size_(std::exchange(other.size_, 0)) {}
  ~Buffer() { cpu::free_aligned(data_); }
  T* get() const { return data_; }
  void grow(i64 n) {
    if (n <= size_) return;
    cpu::free_aligned(std::exchange(data_, nullptr));
    size_ = 0;
    const size_t bytes = size_t(round_up(n * i64(sizeof(T)), 64));
    data_ = static_cast<T*>(cpu::allocate_aligned(64, bytes));
    std::memset(data_, 0, bytes);
    size_ = n;
  }

 private:
  T* data_ = nullptr;
  i64 size_ = 0;
};

}  // namespace gptfast::engine
