#define GPTFAST_SCALAR
#define GPTFAST_ISA isa_scalar
#define GPTFAST_ISA_NAME "scalar"
#include "isa.h"
