#pragma once
#include "values.h"

namespace gptfast::mapping { void bind(PyObject* module); }
