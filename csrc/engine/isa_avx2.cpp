#define GPTFAST_ISA isa_avx2
#define GPTFAST_ISA_NAME "avx2"
#include "isa.h"
