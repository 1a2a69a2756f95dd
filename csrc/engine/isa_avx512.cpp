#define GPTFAST_ISA isa_avx512
#define GPTFAST_ISA_NAME "avx512"
#include "isa.h"
