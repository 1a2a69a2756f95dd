#pragma once
#include "values.h"

namespace gptfast::crc32 { void bind(PyObject* module); }
