// The inference engine for Python. Whatever could corrupt memory is checked here or in the engine, under its lock;
// gptfast.engine says the rest in its users' words.
#include "engine.h"

#include <stdexcept>
#include <string>
#include <unordered_map>
#include <vector>

#include "../engine/checksum.h"
#include "adapter.h"
#include "arguments.h"
#include "bind.h"
#include "cache_class.h"
#include "engine_class.h"

namespace gptfast::engine {
namespace {

i64 packed_bytes(const Object& shape, const Object& formats) {
  return Model::bytes_of(shape_of(shape), formats_of(formats));
}

// By name; "" of vectors.
std::unordered_map<std::string, std::string> weight_formats(const Object& shape, const Object& formats) {
  const Shape s = shape_of(shape);
  const Formats f = formats_of(formats);
  std::unordered_map<std::string, std::string> found;
  const WithoutGil release;
  for (const auto& [name, weight] : Model(s, f).by_name) found[name] = weight.K ? kFormatNames[int(weight.format)] : "";
  return found;
}

uint64_t checksum_of(const std::vector<Object>& tensors, int threads, const std::string& isa) {
  const Kernels* k = kernels(isa.c_str());
  if (!k) throw std::invalid_argument("instruction set " + isa + " cannot run here");
  std::vector<Region> regions;
  for (const Object& tensor : tensors) {
    const Bytes bytes("checksum", tensor);
    regions.push_back({bytes.data, bytes.size});
  }
  const WithoutGil release;
  return checksum(regions, threads, *k);
}

using python::method;

PyMethodDef engine_methods[] = {method<&PyEngine::weight_names>("weight_names"),
                                method<&PyEngine::pack>("pack"),
                                method<&PyEngine::unpack>("unpack"),
                                method<&PyEngine::draw>("draw"),
                                method<&PyEngine::read_rate>("read_rate"),
                                {}};
PyGetSetDef engine_properties[] = {python::property<&PyEngine::threads>("threads"), {}};
PyGetSetDef adapter_properties[] = {python::property<&PyAdapter::bytes>("bytes"), {}};
PyMethodDef cache_methods[] = {method<&PyCache::add>("add"),
                               method<&PyCache::fork>("fork"),
                               method<&PyCache::bytes>("bytes"),
                               method<&PyCache::lengths>("lengths"),
                               method<&PyCache::release>("release"),
                               method<&PyCache::truncate>("truncate"),
                               method<&PyCache::copy>("copy"),
                               method<&PyCache::extend>("extend"),
                               method<&PyCache::prefix>("prefix"),
                               method<&PyCache::decode>("decode"),
                               method<&PyCache::interrupt>("interrupt"),
                               {}};
PyMethodDef functions[] = {method<&packed_bytes>("packed_bytes"),
                           method<&weight_formats>("weight_formats"),
                           method<&checksum_of>("checksum"),
                           {}};

}  // namespace

void bind(PyObject* module) {
  python::add_class<PyEngine, Object, Object, Object, int, std::string, std::string>(
      module, "gptfast._C.Engine", "A packed model, and the threads that compute with it.", engine_methods,
      engine_properties);
  python::add_class<PyAdapter, Object, bool, std::vector<PyAdapter::Source>>(
      module, "gptfast._C.Adapter", "The low-rank updates of an adapter, as the engine reads them.", nullptr,
      adapter_properties);
  python::add_class<PyCache, std::shared_ptr<PyEngine>, i64, i64>(
      module, "gptfast._C.Cache", "Keys and values of the sequences of an engine.", cache_methods, nullptr);
  python::add_functions(module, functions);
}

}  // namespace gptfast::engine
