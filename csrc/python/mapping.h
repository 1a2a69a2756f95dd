#pragma once
#include <pybind11/pybind11.h>

void bind_mapping(pybind11::module_& m);
