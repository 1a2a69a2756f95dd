// The x86 intrinsics that simd.h uses. Reading <immintrin.h> is most of a small unit's time. A quarter of it is AVX512-FP16,
// which no kernel uses: it is left out by its include guards, where no other part of the header needs it.
#if defined(__x86_64__) && !defined(GPTFAST_SCALAR)
#if defined(__GNUC__) && !defined(__clang__) && __GNUC__ <= 13
#define __AVX512FP16INTRIN_H_INCLUDED
#define __AVX512FP16VLINTRIN_H_INCLUDED
#endif
#include <immintrin.h>
#endif
