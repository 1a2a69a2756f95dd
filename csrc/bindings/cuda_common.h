// What the CUDA glue shares. Its sources are compiled twice: into gptfast/_cuda_ops.so (dispatch key CUDA, beside the CPU
// ops in torch.ops.gptfast) and, with GPTFAST_EMU, into a library of the tests that runs the same kernels on CPU tensors
// (torch.ops.gptfast_emu).
#pragma once
#include <torch/headeronly/util/shim_utils.h>

#include "../cuda/kernels.h"
#include "common.h"

#if defined(GPTFAST_EMU)
#define GPTFAST_CUDA_IMPL(m) STABLE_TORCH_LIBRARY_IMPL(gptfast_emu, CPU, m)
#else
#define GPTFAST_CUDA_IMPL(m) STABLE_TORCH_LIBRARY_IMPL(gptfast, CUDA, m)
// torch declares it only where USE_CUDA is defined.
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** ret_stream);
#endif

namespace gptfast::cuda {

using torch::headeronly::IntHeaderOnlyArrayRef;
constexpr i64 kFlatRow = 2048;  // of pointwise ops whose shape does not matter: fills a block
constexpr i64 kMostRows = (i64(1) << 31) - 1, kMostColumns = i64(1) << 30;

#if defined(GPTFAST_EMU)
constexpr const char* kDevice = "CPU";
inline bool on_device(const Tensor& t) { return on_cpu(t); }
struct Launch {
  cudaStream_t stream = nullptr;
  explicit Launch(const Tensor&) {}
  bool capturing() const { return false; }
};
#else
constexpr const char* kDevice = "CUDA";
inline bool on_device(const Tensor& t) { return defined(t).is_cuda(); }
// Makes the tensor's device current, and finds torch's stream there.
struct Launch {
  torch::stable::accelerator::DeviceGuard guard;
  cudaStream_t stream = nullptr;
  explicit Launch(const Tensor& x) : guard(x.get_device_index()) {
    void* current = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &current));
    stream = static_cast<cudaStream_t>(current);
  }
  bool capturing() const {  // into a CUDA graph
    cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
    return cleared(cudaStreamIsCapturing(stream, &status)) == cudaSuccess && status != cudaStreamCaptureStatusNone;
  }
};
#endif

inline void check(const char* op, cudaError_t error) {
  GPTFAST_CHECK(error == cudaSuccess, op, ": the CUDA launch failed: ", cudaGetErrorString(error),
                ". An earlier kernel may be the cause: run with CUDA_LAUNCH_BLOCKING=1; `gptfast doctor` says whether "
                "this GPU is supported; backend='eager' avoids the kernel");
}

inline DType dtype_of(const char* op, const Tensor& t) { return DType(int(gptfast::dtype_of(op, t))); }
// Every tensor of a call lies on the device of the first.
inline void check_device(const char* op, const char* name, const Tensor& t, const Tensor& first) {
  GPTFAST_CHECK(on_device(t) && t.get_device_index() == first.get_device_index(), op, ": ", name,
                " is on another device than the input; expected all tensors on one ", kDevice,
                " device: move it with .to(device)");
}

// What `make` allocates. torch's words are kept, but for the place in its sources; the older stable ABI has none of the
// allocator's. Trainers that try a smaller batch look for "out of memory".
template <class F> Tensor allocated(const char* op, IntHeaderOnlyArrayRef size, F make) {
  try {
    return make();
  } catch (const std::exception& error) {
    std::string shape, said = error.what();
    for (const i64 n : size) shape += (shape.empty() ? "" : ", ") + std::to_string(n);
    said = said.substr(0, said.find(" API call failed at "));
    GPTFAST_CHECK(false, op, ": ", kDevice, " out of memory: no room for a tensor of shape (", shape,
                  "); use a smaller batch or shorter sequences, or free other tensors (in torch: ", said, ")");
  }
}
inline Tensor new_tensor(const char* op, const Tensor& like, IntHeaderOnlyArrayRef size, ScalarType dtype) {
  return allocated(op, size, [&] { return torch::stable::new_empty(like, size, dtype); });
}
inline Tensor new_tensor(const char* op, const Tensor& like, std::initializer_list<i64> size, ScalarType dtype) {
  return new_tensor(op, like, IntHeaderOnlyArrayRef(size.begin(), size.size()), dtype);
}
inline Tensor new_like(const char* op, const Tensor& x, ScalarType dtype) {
  return new_tensor(op, x, x.sizes(), dtype);
}
inline Tensor new_like(const char* op, const Tensor& x) { return new_like(op, x, x.scalar_type()); }
inline Tensor contiguous(const char* op, const Tensor& x) {
  return allocated(op, x.sizes(), [&] { return torch::stable::contiguous(x); });
}
inline float* floats(Tensor& t) { return static_cast<float*>(t.mutable_data_ptr()); }
inline float* floats(const Tensor& t) { return const_cast<float*>(static_cast<const float*>(t.const_data_ptr())); }

// x (…, C) seen as rows of C, on the device of `first`. `owner` keeps the copy alive that is made where no single row
// stride exists.
struct View {
  Tensor owner;
  i64 R, C, stride;
  DType dtype;
  Rows rows() const { return {owner.const_data_ptr(), stride, dtype}; }
};
inline View view_of(const char* op, const char* name, const Tensor& x, const Tensor& first) {
  check_device(op, name, x, first);
  GPTFAST_CHECK(x.dim() >= 1, op, ": ", name, " has no dimension");
  View v{x, 0, x.size(x.dim() - 1), 0, dtype_of(op, x)};
  v.R = v.C ? x.numel() / v.C : 0;
  GPTFAST_CHECK(v.R <= kMostRows && v.C <= kMostColumns, op, ": ", name, " has ", v.R, " rows of ", v.C,
                "; the CUDA kernels take up to ", kMostRows, " rows of ", kMostColumns, ": use backend='eager'");
  if (!single_row_stride(x, &v.stride)) {
    v.owner = contiguous(op, x);
    v.stride = v.C;
  }
  return v;
}
inline View view_of(const char* op, const Tensor& x) { return view_of(op, "the input", x, x); }
inline MutRows mut_rows(const char* op, Tensor& y, i64 C) { return {y.mutable_data_ptr(), C, dtype_of(op, y)}; }

inline Vector vector_of(const char* op, const char* name, const OptTensor& v, i64 n, const Tensor& first,
                        Tensor* owner) {
  if (!v) return {nullptr, DType::f32};
  check_device(op, name, *v, first);
  GPTFAST_CHECK(v->numel() == n, op, ": ", name, " has ", v->numel(), " values; expected ", n);
  *owner = contiguous(op, *v);
  return {owner->const_data_ptr(), dtype_of(op, *v)};
}
// n int64 values; `owner` as above.
inline const i64* indices_of(const char* op, const char* name, const Tensor& t, i64 n, const Tensor& first,
                             Tensor* owner) {
  check_device(op, name, t, first);
  GPTFAST_CHECK(t.scalar_type() == ScalarType::Long && t.numel() == n, op, ": ", name, " must be int64 with ", n,
                " values");
  *owner = contiguous(op, t);
  return static_cast<const i64*>(owner->const_data_ptr());
}

// (parts, C) fp32 partial sums -> (C) of `dtype`.
inline Tensor sum_of_parts(const char* op, const Tensor& partial, ScalarType dtype, cudaStream_t stream) {
  const i64 C = partial.size(1);
  Tensor out = new_tensor(op, partial, {C}, dtype);
  const PartialSums p{floats(partial), partial.size(0), C, out.mutable_data_ptr(), dtype_of(op, out)};
  check(op, sum_parts(p, {}, stream));
  return out;
}

}  // namespace gptfast::cuda
