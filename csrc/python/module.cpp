// gptfast._C: what is not a tensor operation: build information, the inference engine, guards of mapped files, checksums.
#include "bind.h"
#include "crc32.h"
#include "engine.h"
#include "mapping.h"

namespace gptfast {
namespace {

using python::Object;

Object build_info() {
#ifdef __clang__
  const std::string compiler = "clang " + std::to_string(__clang_major__) + "." + std::to_string(__clang_minor__);
#else
  const std::string compiler = "g++ " __VERSION__;
#endif
  const Object info = python::to_python(std::unordered_map<std::string, std::string>{
      {"compiler", compiler}, {"torch_target", GPTFAST_TORCH_TARGET}, {"torch_headers", GPTFAST_TORCH_HEADERS}});
#ifdef GPTFAST_CUDA
  const Object cuda = python::to_python(std::string(GPTFAST_CUDA));
#else
  const Object cuda = python::to_python(false);
#endif
  if (PyDict_SetItemString(info.get(), "cuda", cuda.get())) throw python::Raised();
  return info;
}

PyMethodDef functions[] = {
    python::method<&build_info>("build_info", "Compiler, torch version of the headers, and what was compiled in."), {}};
PyModuleDef definition = {
    PyModuleDef_HEAD_INIT,
    "gptfast._C",
    "Build information of gptfast's compiled part, its inference engine, and guards of mapped files.",
    -1,
    functions,
    nullptr,
    nullptr,
    nullptr,
    nullptr};

}  // namespace
}  // namespace gptfast

PyMODINIT_FUNC PyInit__C() {
  return gptfast::python::guarded([] {
    gptfast::python::Object module = gptfast::python::Object::owned(PyModule_Create(&gptfast::definition));
    gptfast::engine::bind(module.get());
    gptfast::mapping::bind(module.get());
    gptfast::crc32::bind(module.get());
    return module;
  });
}
