// Rows of bf16 as words, where there are products of pairs: a load is two vectors of values, those of even and those of odd
// columns, and a store is a whole vector.
#pragma once
#include "pairs-inl.h"

#ifdef GPTFAST_PAIRS
struct Split {
  F even, odd;
};
#ifdef GPTFAST_NEON
INL void stream_words(void* p, I words) { istore(p, words); }
#else
INL void stream_words(void* p, I words) { _mm512_stream_si512(static_cast<__m512i*>(p), words); }
#endif
INL Split split(I words) { return {as_float(shl16(words)), as_float(iand(words, iset(0xffff0000u)))}; }
INL Split load_words(const void* row, i64 c) { return split(iload(at(row, DType::bf16, c))); }
INL void put(bool past, void* p, I words) { past ? stream_words(p, words) : istore(p, words); }
INL void put_words(bool past, void* p, Split v) { put(past, p, pair_bf16(v.even, v.odd)); }
// fp32 columns to the order of words, and back.
INL void split_columns(float* x, i64 C) {
  for (i64 c = 0; c < C; c += 2 * L) {
    F first = load(x + c), second = load(x + c + L);
    deinterleave(first, second);
    store(x + c, first), store(x + c + L, second);
  }
}
INL void join_columns(float* x, i64 C) {
  for (i64 c = 0; c < C; c += 2 * L) {
    F first = load(x + c), second = load(x + c + L);
    interleave(first, second);
    store(x + c, first), store(x + c + L, second);
  }
}
#endif
