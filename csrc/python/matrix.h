// Memory that Python hands over. Tensors are DLPack capsules: these say where the values lie, of what type, and how many.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

#include "values.h"

namespace gptfast {

// The begin of DLPack's DLManagedTensor (dlpack.h, version 0.x), whose layout does not change.
struct DLTensor {
  char* data;
  struct {
    int32_t type, id;
  } device;
  int32_t ndim;
  struct {
    uint8_t code, bits;
    uint16_t lanes;
  } dtype;
  const int64_t *shape, *strides;
  uint64_t byte_offset;
};

// fp32 values on the CPU, rows `ld` apart, each of `columns` neighbours. The capsule must stay alive while it is used.
struct Matrix {
  float* data;
  int64_t rows, columns, ld;

  Matrix(const char* what, const python::Object& capsule) {
    constexpr int kCpu = 1, kPinned = 3, kFloat = 2;
    auto* t = static_cast<const DLTensor*>(PyCapsule_GetPointer(capsule.get(), "dltensor"));
    if (!t) throw python::Raised();
    if ((t->device.type != kCpu && t->device.type != kPinned) || t->ndim < 1 || t->ndim > 2 ||
        t->dtype.code != kFloat || t->dtype.bits != 32 || t->dtype.lanes != 1)
      throw std::invalid_argument(std::string(what) +
                                  ": expected a float32 tensor on the CPU of one or two dimensions");
    data = reinterpret_cast<float*>(t->data + t->byte_offset);
    const bool vector = t->ndim == 1;
    rows = vector ? 1 : t->shape[0], columns = t->shape[t->ndim - 1];
    const int64_t step = !t->strides || columns <= 1 ? 1 : t->strides[t->ndim - 1];
    ld = vector || !t->strides || rows <= 1 ? columns : t->strides[0];
    if (step != 1 || ld < columns)
      throw std::invalid_argument(std::string(what) + ": expected rows of neighbouring values that do not overlap");
  }
};

// All bytes of a contiguous tensor on the CPU, of any type.
struct Bytes {
  const char* data;
  int64_t size;

  Bytes(const char* what, const python::Object& capsule) {
    constexpr int kCpu = 1, kPinned = 3;
    auto* t = static_cast<const DLTensor*>(PyCapsule_GetPointer(capsule.get(), "dltensor"));
    if (!t) throw python::Raised();
    bool fits = t->device.type == kCpu || t->device.type == kPinned;
    int64_t count = 1;
    for (int d = t->ndim - 1; d >= 0; d--) {
      fits &= !t->strides || t->shape[d] <= 1 || t->strides[d] == count;
      count *= t->shape[d];
    }
    if (!fits && count) throw std::invalid_argument(std::string(what) + ": expected a contiguous tensor on the CPU");
    data = t->data + t->byte_offset;
    size = count * t->dtype.bits * t->dtype.lanes / 8;
  }
};

// The memory of an object such as mmap, which keeps it where it is as long as this lives. numpy finds it: before Python
// 3.11 the limited API has no buffers.
class Memory {
 public:
  char* data;
  int64_t size;
  bool readonly;

  explicit Memory(const python::Object& source) {
    using python::Object;
    const Object numpy = Object::owned(PyImport_ImportModule("numpy"));
    array_ = Object::owned(PyObject_CallMethod(numpy.get(), "frombuffer", "Os", source.get(), "uint8"));
    const Object place = array_.attribute("__array_interface__")["data"];
    data = reinterpret_cast<char*>(python::from_python<uint64_t>(place[Py_ssize_t(0)].get()));
    readonly = python::from_python<bool>(place[Py_ssize_t(1)].get());
    size = python::from_python<int64_t>(array_.attribute("nbytes").get());
  }

 private:
  python::Object array_;
};

}  // namespace gptfast
