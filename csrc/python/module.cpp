// gptfast._C: what is not a tensor operation: build information, the inference engine, and guards of mapped files.
#include <pybind11/pybind11.h>

#include <string>

#include "engine.h"
#include "mapping.h"

namespace {

pybind11::dict build_info() {
  pybind11::dict info;
  info["compiler"] = std::string("g++ ") + __VERSION__;
  info["torch_target"] = GPTFAST_TORCH_TARGET;
  info["torch_headers"] = GPTFAST_TORCH_HEADERS;
#ifdef GPTFAST_CUDA
  info["cuda"] = std::string(GPTFAST_CUDA);
#else
  info["cuda"] = false;
#endif
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Build information of gptfast's compiled part, its inference engine, and guards of mapped files.";
  m.def("build_info", &build_info, "Compiler, torch version of the headers, and what was compiled in.");
  bind_engine(m);
  bind_mapping(m);
}
