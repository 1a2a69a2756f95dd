// Memory for large results, kept for the next ones. As installed, glibc maps every buffer of this size afresh and unmaps
// it when freed: 12,000 page faults for 50 MB, more than the arithmetic of most ops (docs/notes/cpu.md).
#include <mutex>
#include <unordered_map>

#include "../cpu/system.h"
#include "common.h"

namespace gptfast {
namespace {

struct Block {
  void* data;
  size_t size;
};

class ResultMemory {
 public:
  // A kept block of about this size, or a new one.
  void* take(size_t bytes) {
    const std::lock_guard<std::mutex> lock(mutex_);
    size_t best = free_.size();
    for (size_t n = 0; n < free_.size(); n++)
      if (free_[n].size >= bytes && free_[n].size <= bytes + bytes / 4 &&
          (best == free_.size() || free_[n].size < free_[best].size))
        best = n;
    Block block;
    if (best < free_.size()) {
      block = free_[best];
      kept_ -= block.size;
      free_.erase(free_.begin() + long(best));
    } else {
      block.size = (bytes + 63) / 64 * 64;
      block.data = cpu::allocate_aligned(64, block.size);
    }
    sizes_[block.data] = block.size;
    return block.data;
  }
  void give(void* data) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = sizes_.find(data);
    free_.push_back({data, found->second});
    kept_ += found->second;
    sizes_.erase(found);
    shrink();
  }
  bool keeps() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return most_ > 0;
  }
  void keep(size_t most) {
    const std::lock_guard<std::mutex> lock(mutex_);
    most_ = most;
    shrink();
  }

 private:
  void shrink() {  // the block that has lain longest goes first
    size_t n = 0;
    for (; kept_ > most_; n++) {
      kept_ -= free_[n].size;
      cpu::free_aligned(free_[n].data);
    }
    free_.erase(free_.begin(), free_.begin() + long(n));
  }
  std::mutex mutex_;
  std::vector<Block> free_;                  // oldest first
  std::unordered_map<void*, size_t> sizes_;  // of what is in use
  size_t kept_ = 0, most_ = size_t(256) << 20;
};
ResultMemory& memory() {
  static ResultMemory* m = new ResultMemory;  // never destroyed: tensors may outlive every static
  return *m;
}

// Past the dispatcher, in which `torch::stable::empty` looks its operator up by name: two of the four microseconds of a small call
// where the caches hold something else.
Tensor small_tensor(torch::headeronly::IntHeaderOnlyArrayRef size, ScalarType dtype) {
  constexpr size_t most = 4;
  i64 strides[most], stride = 1;
  if (size.size() > most) return torch::stable::empty(size, dtype);
  for (size_t d = size.size(); d-- > 0; stride *= std::max<i64>(size[d], 1)) strides[d] = stride;
  const auto code = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  AtenTensorHandle made;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(i64(size.size()), size.data(), strides, code, aoti_torch_device_type_cpu(), 0, &made));
  return Tensor(made);
}

void keep_results(i64 bytes) { memory().keep(bytes < 0 ? 0 : size_t(bytes)); }

}  // namespace

Tensor new_tensor(torch::headeronly::IntHeaderOnlyArrayRef size, ScalarType dtype) {
  constexpr i64 large = 2 << 20;
  i64 bytes = dtype == ScalarType::Float ? 4 : dtype == ScalarType::Long ? 8 : dtype == ScalarType::Bool ? 1 : 2;
  for (const i64 n : size)
    GPTFAST_CHECK(n >= 0 && !__builtin_mul_overflow(bytes, n, &bytes), "out of memory: a result of ", n,
                  " in one dimension is larger than any memory");
  if (bytes < large) return small_tensor(size, dtype);
  if (!memory().keeps()) return torch::stable::empty(size, dtype);
  std::vector<i64> strides(size.size(), 1);
  for (size_t d = size.size() - 1; d > 0; d--) strides[d - 1] = strides[d] * size[d];
  return torch::stable::from_blob(
      memory().take(size_t(bytes)), size, strides, torch::stable::Device(torch::headeronly::DeviceType::CPU), dtype,
      +[](void* data) { memory().give(data); });
}

}  // namespace gptfast

STABLE_TORCH_LIBRARY_IMPL(gptfast, CompositeExplicitAutograd, m) {
  m.impl("keep_results", GPTFAST_BOX(&gptfast::keep_results));
}
