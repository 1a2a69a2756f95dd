// The intrinsics that simd.h uses. On x86 reading <immintrin.h> is most of a small unit's time: g++ reads all instruction sets,
// whatever the flags. Those that no kernel uses are left out by their include guards, where the rest of the header does
// without them: checked with g++ 12. The types at the end are what it would lack then.
#if defined(__x86_64__) && !defined(GPTFAST_SCALAR)
#if defined(__GNUC__) && !defined(__clang__) && __GNUC__ <= 13
#define __AVX512FP16INTRIN_H_INCLUDED
#define __AVX512FP16VLINTRIN_H_INCLUDED
#if __GNUC__ == 12
#define _MM_MALLOC_H_INCLUDED
#define _WMMINTRIN_H_INCLUDED
#define _SHAINTRIN_H_INCLUDED
#define _KEYLOCKERINTRIN_H_INCLUDED
#define _GFNIINTRIN_H_INCLUDED
#define __VAESINTRIN_H_INCLUDED
#define _VPCLMULQDQINTRIN_H_INCLUDED
#define _AVXVNNIINTRIN_H_INCLUDED
#ifndef __AVX512F__
#define _AVX512FINTRIN_H_INCLUDED
#define _AVX512BWINTRIN_H_INCLUDED
#define _AVX512DQINTRIN_H_INCLUDED
#endif
#ifndef __AVX512VNNI__
#define __AVX512VNNIINTRIN_H_INCLUDED
#endif
#ifndef __AVX512BF16__
#define _AVX512BF16INTRIN_H_INCLUDED
#endif
#define _AVX512VLINTRIN_H_INCLUDED
#define _AVX512VLDQINTRIN_H_INCLUDED
#define _AVX512VLBWINTRIN_H_INCLUDED
#define _AVX512ERINTRIN_H_INCLUDED
#define _AVX512PFINTRIN_H_INCLUDED
#define _AVX512CDINTRIN_H_INCLUDED
#define _AVX512IFMAINTRIN_H_INCLUDED
#define _AVX512IFMAVLINTRIN_H_INCLUDED
#define _AVX512VBMIINTRIN_H_INCLUDED
#define _AVX512VBMIVLINTRIN_H_INCLUDED
#define __AVX512VBMI2INTRIN_H_INCLUDED
#define _AVX512VBMI2VLINTRIN_H_INCLUDED
#define _AVX512VNNIVLINTRIN_H_INCLUDED
#define _AVX5124FMAPSINTRIN_H_INCLUDED
#define _AVX5124VNNIWINTRIN_H_INCLUDED
#define _AVX512VPOPCNTDQINTRIN_H_INCLUDED
#define _AVX512VPOPCNTDQVLINTRIN_H_INCLUDED
#define _AVX512BITALGINTRIN_H_INCLUDED
#define _AVX512VP2INTERSECTINTRIN_H_INCLUDED
#define _AVX512VP2INTERSECTVLINTRIN_H_INCLUDED
#define _AVX512BF16VLINTRIN_H_INCLUDED
typedef unsigned int __mmask32;
typedef unsigned short __bfloat16;
typedef short __m256bh __attribute__((vector_size(32), may_alias));
#endif
#endif
#include <immintrin.h>
#elif defined(__aarch64__) && !defined(GPTFAST_SCALAR)
#include <arm_neon.h>
#endif
