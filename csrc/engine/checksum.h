// A mark of the bytes of several regions of memory, to tell whether any of them has changed.
#pragma once
#include <utility>
#include <vector>

#include "kernels.h"

namespace gptfast::engine {

using Region = std::pair<const char*, i64>;  // bytes

// The same for any number of threads and any instruction set.
uint64_t checksum(const std::vector<Region>& regions, int threads, const Kernels& kernels);

}  // namespace gptfast::engine
