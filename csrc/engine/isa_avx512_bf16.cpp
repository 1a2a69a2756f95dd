#define GPTFAST_ISA isa_avx512_bf16
#define GPTFAST_ISA_NAME "avx512_bf16"
#include "isa.h"
