// Python's limited API (one binary for Python 3.10 and newer): objects, and values from and to Python.
#pragma once
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <unordered_map>
#include <utility>
#include <vector>

#ifndef Py_LIMITED_API
#error "csrc/python is compiled with Py_LIMITED_API"
#endif

namespace gptfast::python {

// The error that Python has set.
struct Raised {};

[[noreturn]] inline void raise(PyObject* type, const std::string& message) {
  PyErr_SetString(type, message.c_str());
  throw Raised();
}

// A reference that this owns; never null, except before it is assigned.
class Object {
 public:
  Object() = default;
  static Object owned(PyObject* p) {
    if (!p) throw Raised();
    Object o;
    o.p_ = p;
    return o;
  }
  static Object borrowed(PyObject* p) {
    if (!p) throw Raised();
    Py_INCREF(p);
    return owned(p);
  }
  Object(const Object& o) : p_(o.p_) { Py_XINCREF(p_); }
  Object(Object&& o) noexcept : p_(std::exchange(o.p_, nullptr)) {}
  Object& operator=(Object o) noexcept {
    std::swap(p_, o.p_);
    return *this;
  }
  ~Object() { Py_XDECREF(p_); }

  PyObject* get() const { return p_; }
  PyObject* release() { return std::exchange(p_, nullptr); }
  Object attribute(const char* name) const { return owned(PyObject_GetAttrString(p_, name)); }
  Object operator[](const char* key) const {
    const Object name = owned(PyUnicode_FromString(key));
    return owned(PyObject_GetItem(p_, name.get()));
  }
  Object operator[](Py_ssize_t i) const { return owned(PySequence_GetItem(p_, i)); }
  bool contains(const char* key) const { return PyMapping_HasKeyString(p_, key); }

 private:
  PyObject* p_ = nullptr;
};

// Other threads of Python run while this lives.
class WithoutGil {
 public:
  WithoutGil() : state_(PyEval_SaveThread()) {}
  ~WithoutGil() noexcept(false) { PyEval_RestoreThread(state_); }  // it ends the thread where the interpreter ends
  WithoutGil(const WithoutGil&) = delete;
  WithoutGil& operator=(const WithoutGil&) = delete;

 private:
  PyThreadState* state_;
};

// An instance of a class that `T` stands for.
template <class T> struct Instance {
  PyObject_HEAD std::shared_ptr<T> value;
};
template <class T> inline PyTypeObject* type_of = nullptr;

// ---- from Python

template <class T> struct From;
template <class T> T from_python(PyObject* p) { return From<T>::read(p); }

template <class T>
  requires std::is_integral_v<T>
struct From<T> {
  static T read(PyObject* p) {
    if constexpr (std::is_same_v<T, bool>) {
      const int truth = PyObject_IsTrue(p);
      if (truth < 0) throw Raised();
      return truth;
    } else {
      const Object index = Object::owned(PyNumber_Index(p));
      if constexpr (std::is_same_v<T, uint64_t>) {
        const uint64_t value = PyLong_AsUnsignedLongLong(index.get());
        if (value == uint64_t(-1) && PyErr_Occurred()) throw Raised();
        return value;
      } else {
        const long long value = PyLong_AsLongLong(index.get());
        if (value == -1 && PyErr_Occurred()) throw Raised();
        if (value != T(value)) raise(PyExc_OverflowError, "Python int too large to convert to C int");
        return T(value);
      }
    }
  }
};
template <class T>
  requires std::is_floating_point_v<T>
struct From<T> {
  static T read(PyObject* p) {
    const double value = PyFloat_AsDouble(p);
    if (value == -1 && PyErr_Occurred()) throw Raised();
    return T(value);
  }
};
template <> struct From<std::string> {
  static std::string read(PyObject* p) {
    Py_ssize_t size = 0;
    const char* text = PyUnicode_AsUTF8AndSize(p, &size);
    if (!text) throw Raised();
    return {text, size_t(size)};
  }
};
template <> struct From<Object> {
  static Object read(PyObject* p) { return Object::borrowed(p); }
};
template <class T> struct From<std::optional<T>> {
  static std::optional<T> read(PyObject* p) { return p == Py_None ? std::nullopt : std::optional(from_python<T>(p)); }
};
template <class T> struct From<std::shared_ptr<T>> {
  static std::shared_ptr<T> read(PyObject* p) {
    if (!PyObject_TypeCheck(p, type_of<T>)) raise(PyExc_TypeError, "expected an object of another class of gptfast._C");
    return reinterpret_cast<Instance<T>*>(p)->value;
  }
};
template <class T> struct From<std::vector<T>> {
  static std::vector<T> read(PyObject* p) {
    if (!PySequence_Check(p) || PyUnicode_Check(p) || PyBytes_Check(p)) raise(PyExc_TypeError, "expected a sequence");
    const bool list = PyList_Check(p);
    std::vector<T> all;
    const Py_ssize_t size = PySequence_Size(p);
    if (size < 0) throw Raised();
    all.reserve(size_t(size));
    for (Py_ssize_t i = 0; i < size; i++) {
      const Object item = list ? Object::borrowed(PyList_GetItem(p, i)) : Object::owned(PySequence_GetItem(p, i));
      all.push_back(from_python<T>(item.get()));
    }
    return all;
  }
};
template <class... T> struct From<std::tuple<T...>> {
  static std::tuple<T...> read(PyObject* p) {
    if (PySequence_Size(p) != Py_ssize_t(sizeof...(T))) {
      if (PyErr_Occurred()) throw Raised();
      raise(PyExc_TypeError, "expected a sequence of " + std::to_string(sizeof...(T)));
    }
    return read(p, std::index_sequence_for<T...>());
  }
  template <size_t... I> static std::tuple<T...> read(PyObject* p, std::index_sequence<I...>) {
    return {from_python<T>(Object::owned(PySequence_GetItem(p, Py_ssize_t(I))).get())...};
  }
};
template <class T> struct From<std::unordered_map<std::string, T>> {
  static std::unordered_map<std::string, T> read(PyObject* p) {
    if (!PyDict_Check(p)) raise(PyExc_TypeError, "expected a dict");
    std::unordered_map<std::string, T> all;
    const Object items = Object::owned(PyDict_Items(p));
    for (Py_ssize_t i = 0; i < PyList_Size(items.get()); i++) {
      auto [key, value] = from_python<std::tuple<std::string, T>>(PyList_GetItem(items.get(), i));
      all.emplace(std::move(key), std::move(value));
    }
    return all;
  }
};

// ---- to Python

inline Object to_python(bool value) { return Object::borrowed(value ? Py_True : Py_False); }
inline Object to_python(int value) { return Object::owned(PyLong_FromLong(value)); }
inline Object to_python(int64_t value) { return Object::owned(PyLong_FromLongLong(value)); }
inline Object to_python(uint64_t value) { return Object::owned(PyLong_FromUnsignedLongLong(value)); }
inline Object to_python(double value) { return Object::owned(PyFloat_FromDouble(value)); }
inline Object to_python(const std::string& value) {
  return Object::owned(PyUnicode_FromStringAndSize(value.data(), Py_ssize_t(value.size())));
}
inline Object to_python(Object value) { return value; }
template <class T> Object to_python(const std::vector<T>& values) {
  Object list = Object::owned(PyList_New(Py_ssize_t(values.size())));
  for (size_t i = 0; i < values.size(); i++)
    if (PyList_SetItem(list.get(), Py_ssize_t(i), to_python(values[i]).release())) throw Raised();
  return list;
}
template <class T> Object to_python(const std::unordered_map<std::string, T>& values) {
  Object dict = Object::owned(PyDict_New());
  for (const auto& [key, value] : values)
    if (PyDict_SetItemString(dict.get(), key.c_str(), to_python(value).get())) throw Raised();
  return dict;
}

}  // namespace gptfast::python
