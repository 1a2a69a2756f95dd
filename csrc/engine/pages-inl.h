// Pages of keys and values: what the kernels of attention share.
#pragma once
#include "tiles-inl.h"

constexpr int kAttendVectors = L == 16 ? 4 : 2;

template <DType T> INL F load_cached(const char* p, i64 element) {
  if constexpr (T == DType::bf16) return load_bf16(reinterpret_cast<const uint16_t*>(p) + element);
  if constexpr (T == DType::f16) return load_f16(reinterpret_cast<const uint16_t*>(p) + element);
  return load(reinterpret_cast<const float*>(p) + element);
}

// The keys and the values of head h in the page that holds a position.
template <DType T> INL char* keys_of(const AttendParams& p, i64 h, i64 at) {
  return p.pages[at / kPage] + p.keys + h * key_elements(p.D) * element_size(T);
}
template <DType T> INL char* values_of(const AttendParams& p, i64 h, i64 at) {
  return p.pages[at / kPage] + p.values + h * value_elements(p.D) * element_size(T);
}
