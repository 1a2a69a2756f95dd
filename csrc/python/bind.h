// Functions and classes for Python. Their C++ signatures say which arguments there are; all are given by position.
#pragma once
#include <cstring>
#include <new>

#include "values.h"

namespace gptfast::python {

// Whatever f throws becomes Python's error.
template <class Fn> PyObject* guarded(Fn f) {
  const auto failed = [](PyObject* type, const std::exception& e) {
    PyErr_SetString(type, e.what());
    return nullptr;
  };
  try {
    return f().release();
  } catch (const Raised&) {
    return nullptr;
  } catch (const std::bad_alloc& e) {
    return failed(PyExc_MemoryError, e);
  } catch (const std::out_of_range& e) {
    return failed(PyExc_IndexError, e);
  } catch (const std::logic_error& e) {
    return failed(PyExc_ValueError, e);
  } catch (const std::exception& e) {
    return failed(PyExc_RuntimeError, e);
  }
}

template <class R, class... A, class Fn> Object invoke(PyObject* const* args, Py_ssize_t count, Fn f) {
  if (count != Py_ssize_t(sizeof...(A)))
    raise(PyExc_TypeError,
          "expected " + std::to_string(sizeof...(A)) + " arguments by position, got " + std::to_string(count));
  return [&]<size_t... I>(std::index_sequence<I...>) {
    std::tuple<std::decay_t<A>...> read{from_python<std::decay_t<A>>(args[I])...};  // in their order
    if constexpr (std::is_void_v<R>) {
      f(std::get<I>(read)...);
      return Object::borrowed(Py_None);
    } else {
      return to_python(f(std::get<I>(read)...));
    }
  }(std::index_sequence_for<A...>());
}

template <auto F> struct Call;
template <class R, class... A, R (*F)(A...)> struct Call<F> {
  static PyObject* run(PyObject*, PyObject* const* args, Py_ssize_t count) {
    return guarded([&] { return invoke<R, A...>(args, count, F); });
  }
};
template <class R, class C, class... A, R (C::*F)(A...)> struct Call<F> {
  static PyObject* run(PyObject* self, PyObject* const* args, Py_ssize_t count) {
    C& object = *reinterpret_cast<Instance<C>*>(self)->value;
    return guarded(
        [&] { return invoke<R, A...>(args, count, [&](auto&... values) { return (object.*F)(values...); }); });
  }
};
template <class C, class R, R (C::*F)()> struct Property {
  static PyObject* read(PyObject* self, void*) {
    return guarded([&] { return to_python((reinterpret_cast<Instance<C>*>(self)->value.get()->*F)()); });
  }
};

template <auto F> PyMethodDef method(const char* name, const char* doc = nullptr) {
  return {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&Call<F>::run)), METH_FASTCALL, doc};
}
template <class R, class C> C class_of(R (C::*)());
template <auto F> PyGetSetDef property(const char* name) {
  using C = decltype(class_of(F));
  return {name, &Property<C, decltype((std::declval<C&>().*F)()), F>::read, nullptr, nullptr, nullptr};
}

inline void add_functions(PyObject* module, PyMethodDef* functions) {
  if (PyModule_AddFunctions(module, functions)) throw Raised();
}

// ---- classes

// What `Name(...)` calls: make_shared<T>(A...).
template <class T, class... A> PyObject* make(PyTypeObject* type, PyObject* args, PyObject* named) {
  return guarded([&] {
    if (named && PyDict_Size(named)) raise(PyExc_TypeError, "arguments are given by position only");
    std::vector<PyObject*> values;
    for (Py_ssize_t i = 0; i < PyTuple_Size(args); i++) values.push_back(PyTuple_GetItem(args, i));
    std::shared_ptr<T> made;
    invoke<void, A...>(values.data(), Py_ssize_t(values.size()),
                       [&](auto&... given) { made = std::make_shared<T>(std::move(given)...); });
    const auto alloc = reinterpret_cast<allocfunc>(PyType_GetSlot(type, Py_tp_alloc));
    Object object = Object::owned(alloc(type, 0));
    new (&reinterpret_cast<Instance<T>*>(object.get())->value) std::shared_ptr<T>(std::move(made));
    return object;
  });
}
template <class T> void destroy(PyObject* self) {
  PyTypeObject* type = Py_TYPE(self);
  reinterpret_cast<Instance<T>*>(self)->value.~shared_ptr();
  reinterpret_cast<freefunc>(PyType_GetSlot(type, Py_tp_free))(self);
  Py_DECREF(type);
}

// `name` is that of the module and the class. It, and `methods` and `properties`, which end with {}, live as long as the
// module. A...: the constructor's arguments.
template <class T, class... A>
void add_class(PyObject* module, const char* name, const char* doc, PyMethodDef* methods, PyGetSetDef* properties) {
  std::vector<PyType_Slot> slots = {{Py_tp_new, reinterpret_cast<void*>(&make<T, A...>)},
                                    {Py_tp_dealloc, reinterpret_cast<void*>(&destroy<T>)},
                                    {Py_tp_doc, const_cast<char*>(doc)}};
  if (methods) slots.push_back({Py_tp_methods, methods});
  if (properties) slots.push_back({Py_tp_getset, properties});
  slots.push_back({0, nullptr});
  PyType_Spec spec = {name, int(sizeof(Instance<T>)), 0, Py_TPFLAGS_DEFAULT, slots.data()};
  const Object type = Object::owned(PyType_FromSpec(&spec));
  type_of<T> = reinterpret_cast<PyTypeObject*>(type.get());
  Py_INCREF(type.get());  // type_of keeps it
  if (PyModule_AddObjectRef(module, std::strrchr(name, '.') + 1, type.get())) throw Raised();
}

}  // namespace gptfast::python
