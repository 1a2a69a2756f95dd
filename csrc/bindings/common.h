// What every op's glue shares. Only this folder includes torch, and only its stable ABI (one binary for torch >= 2.11).
// The glue checks what could corrupt memory, allocates, and spreads items over torch's thread pool; most messages meant
// for users are raised in gptfast/ops before a call arrives here. Schemas are in gptfast/_schemas.py.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <initializer_list>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <tuple>
#include <utility>
#include <vector>

#include "../cpu/kernels.h"
#include "boxed.h"

namespace gptfast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptTensor = std::optional<Tensor>;

// Raises RuntimeError with these words. STD_TORCH_CHECK puts the place in the source before them, which no user can read.
#define GPTFAST_CHECK(condition, ...) \
  if (!(condition)) ::gptfast::refuse(__VA_ARGS__)
template <class... Words> [[noreturn]] void refuse(const Words&... words) {
  std::ostringstream text;
  (text << ... << words);
  throw std::runtime_error(text.str());
}

// The tensor, which torch lets be None where it must not be.
inline const Tensor& defined(const Tensor& x) {
  GPTFAST_CHECK(x.defined(), "a tensor is missing (None)");
  return x;
}
inline bool on_cpu(const Tensor& x) { return defined(x).is_cpu(); }

inline DType dtype_of(const char* op, const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return DType::f32;
    case ScalarType::BFloat16: return DType::bf16;
    case ScalarType::Half: return DType::f16;
    default: break;
  }
  refuse(op, ": expected a float32, bfloat16 or float16 tensor");
}

// Query heads of a key head; refuses numbers of heads that do not divide.
inline i64 heads_per_key_head(const char* op, i64 heads, i64 key_heads) {
  GPTFAST_CHECK(heads == key_heads || (key_heads >= 1 && key_heads <= heads && heads % key_heads == 0), op, ": k has ",
                key_heads, " heads, which do not divide the ", heads, " of q");
  return heads == key_heads ? 1 : heads / key_heads;
}

// The dtype that an op names by number: its place in gptfast.backend.KERNEL_DTYPES.
inline ScalarType dtype_of_code(const char* op, i64 code) {
  constexpr ScalarType types[] = {ScalarType::Float, ScalarType::BFloat16, ScalarType::Half};
  GPTFAST_CHECK(code >= 0 && code < 3, op, ": unknown dtype ", code, "; expected 0 to 2");
  return types[code];
}

// A contiguous CPU tensor; large ones come from memory that is kept (results.cpp).
Tensor new_tensor(torch::headeronly::IntHeaderOnlyArrayRef size, ScalarType dtype);
inline Tensor new_tensor(std::initializer_list<i64> size, ScalarType dtype) {
  return new_tensor(torch::headeronly::IntHeaderOnlyArrayRef(size.begin(), size.size()), dtype);
}
inline Tensor new_like(const Tensor& x, ScalarType dtype) { return new_tensor(x.sizes(), dtype); }
inline Tensor new_like(const Tensor& x) { return new_like(x, x.scalar_type()); }

// The tensor without gaps; torch's call takes a microsecond, also where there is nothing to do.
inline Tensor dense(const Tensor& x) { return x.is_contiguous() ? x : torch::stable::contiguous(x); }

// x (…, C) seen as rows of C. `owner` keeps the copy alive that is made where no single row stride exists.
struct RowView {
  Tensor owner;
  i64 R, C, stride;
  DType dtype;
  Rows rows() const { return {owner.const_data_ptr(), stride, dtype}; }
};
inline bool single_row_stride(const Tensor& x, i64* stride) {
  const i64 d = x.dim();
  if (x.size(d - 1) > 1 && x.stride(d - 1) != 1) return false;
  i64 expected = -1;  // stride that the next outer dimension must have
  *stride = x.size(d - 1);
  for (i64 k = d - 2; k >= 0; k--) {
    if (x.size(k) == 1) continue;
    if (expected < 0) *stride = x.stride(k);
    else if (x.stride(k) != expected) return false;
    expected = x.stride(k) * x.size(k);
  }
  return true;
}
inline RowView rows_of(const char* op, const Tensor& x) {
  GPTFAST_CHECK(on_cpu(x) && x.dim() >= 1, op, ": expected a CPU tensor of at least one dimension");
  RowView v{x, 0, x.size(x.dim() - 1), 0, dtype_of(op, x)};
  v.R = v.C ? x.numel() / v.C : 0;
  if (!single_row_stride(x, &v.stride)) {
    v.owner = torch::stable::contiguous(x);
    v.stride = v.C;
  }
  return v;
}
// `results`: how many such tensors the launch fills. Together larger than kStreamBytes they go past the caches, which
// saves reading each line before it is written; smaller, the next op finds them there.
constexpr i64 kStreamBytes = 16 << 20;
inline MutRows mut_rows(const char* op, Tensor& y, i64 C, i64 results = 1) {
  const DType dtype = dtype_of(op, y);
  void* data = y.mutable_data_ptr();
  const bool aligned = reinterpret_cast<uintptr_t>(data) % 64 == 0 && C * element_size(dtype) % 64 == 0;
  return {data, C, dtype, aligned && y.numel() * element_size(dtype) * results >= kStreamBytes};
}

// A vector of n values, or {nullptr} when absent. `owner` as above.
inline Vector vector_of(const char* op, const OptTensor& v, i64 n, Tensor* owner) {
  if (!v) return {nullptr, DType::f32};
  GPTFAST_CHECK(on_cpu(*v) && v->numel() == n, op, ": expected a CPU vector of ", n, " values, got ", v->numel());
  *owner = dense(*v);
  return {owner->const_data_ptr(), dtype_of(op, *v)};
}

// n float32 values on the CPU; `owner` as above.
inline const float* floats_of(const char* op, const char* name, const Tensor& x, i64 n, Tensor* owner) {
  GPTFAST_CHECK(on_cpu(x) && x.scalar_type() == ScalarType::Float && x.numel() == n, op, ": ", name, " must be ", n,
                " float32 values on the CPU");
  *owner = dense(x);
  return static_cast<const float*>(owner->const_data_ptr());
}

// round(65536 p), halves to even: as gptfast.rng.dropout_threshold.
inline uint32_t dropout_threshold(double p) {
  GPTFAST_CHECK(p >= 0 && p <= 1, "dropout: p is ", p, "; expected a probability in [0, 1]");
  return uint32_t(std::nearbyint(p * 65536));
}
// An offset holds two numbers (gptfast/rng.py): that of the mask, and above its 32 bits the row, or the matrix of attention,
// that the first one of the tensor is in the whole batch.
inline Dropout dropout_of_rows(double p, i64 seed, i64 offset) {
  GPTFAST_CHECK(offset >= 0, "dropout: offset is ", offset, "; expected 0 to 2**63 - 1");
  return {uint64_t(seed), uint32_t(offset), dropout_threshold(p), uint32_t(offset >> 32), 0};
}
inline Dropout dropout_of_matrices(double p, i64 seed, i64 offset) {
  Dropout d = dropout_of_rows(p, seed, offset);
  std::swap(d.first_row, d.first_matrix);
  return d;
}
inline float epsilon_of(const char* op, double eps) {
  GPTFAST_CHECK(eps >= 0 && std::isfinite(eps), op, ": eps is ", eps, "; expected a finite number >= 0");
  return float(eps);
}
inline float smoothing_of(const char* op, double label_smoothing) {
  GPTFAST_CHECK(label_smoothing >= 0 && label_smoothing <= 1, op, ": label_smoothing is ", label_smoothing,
                "; expected 0 to 1");
  return float(label_smoothing);
}
inline void check_sampling(const char* op, double temperature, i64 top_k, double top_p) {
  GPTFAST_CHECK(temperature >= 0 && std::isfinite(temperature) && top_k >= 0 && top_p > 0 && top_p <= 1, op,
                ": temperature is ", temperature, ", top_k ", top_k, " and top_p ", top_p,
                "; expected temperature >= 0, top_k >= 0 and 0 < top_p <= 1");
}
// The options of sample_rows: a SampleOptions each row.
inline void check_row_options(const char* op, const Tensor& logits, const Tensor& options) {
  GPTFAST_CHECK(defined(logits).dim() == 2 && defined(options).dim() == 2 && options.size(0) == logits.size(0) &&
                    options.size(1) == 4 && options.scalar_type() == ScalarType::Long,
                op, ": options must be int64 of shape (B, 4) for logits of shape (B, V)");
}

inline i64 ceil_div(i64 a, i64 b) { return (a + b - 1) / b; }

// Runs f(item) for every item of [0, n), dealt one by one in order, so that threads end together when items differ.
template <class Fn> void parallel_items(i64 n, const Fn& f) {
  const i64 threads = torch::stable::get_num_threads();
  if (n <= 0) return;
  std::atomic<i64> next{0};
  torch::stable::parallel_for(0, threads < n ? threads : n, 1, [&](i64, i64) {
    for (i64 item; (item = next.fetch_add(1)) < n;) f(item);
  });
}

// Runs f(begin, end) over [0, n) on torch's pool; `cost` is the work of one item in bytes or so. Parts of at least 32 KB,
// at most eight a thread, are dealt in order: beside another process a thread that gets half a core takes fewer of them.
template <class Fn> void parallel(i64 n, i64 cost, const Fn& f) {
  const i64 least = cost > 0 ? ceil_div(32768, cost) : 1, most = 8 * i64(torch::stable::get_num_threads());
  const i64 part = std::max(least, ceil_div(n, most));
  parallel_items(ceil_div(n, part), [&](i64 i) { f(i * part, std::min(n, (i + 1) * part)); });
}

// (chunks, C) fp32 partial sums -> (C) of `dtype`.
inline Tensor sum_chunks(const char* op, const Tensor& partial, ScalarType dtype) {
  const i64 C = partial.size(1);
  Tensor out = new_tensor({C}, dtype);
  const PartialSums p{static_cast<const float*>(partial.const_data_ptr()), partial.size(0), C, out.mutable_data_ptr(),
                      dtype_of(op, out)};
  parallel((C + 63) / 64, p.parts * 256,
           [&](i64 begin, i64 end) { cpu::kernels().sum_chunks(p, begin * 64, end * 64 < C ? end * 64 : C); });
  return out;
}

}  // namespace gptfast
