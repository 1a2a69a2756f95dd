#pragma once
#include "values.h"

namespace gptfast::engine { void bind(PyObject* module); }
