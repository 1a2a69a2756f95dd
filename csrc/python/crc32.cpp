// CRC-32 of bytes, and of bytes on their way to another place: a checkpoint is summed as it is written, on a core that a
// training needs itself.
#include "crc32.h"

#include <stdexcept>

#include "../cpu/isa_select.h"
#include "bind.h"
#include "matrix.h"

#if defined(__x86_64__)
#include <immintrin.h>
#define FOLDS __attribute__((target("pclmul,sse4.1")))
#endif

namespace gptfast::crc32 {
namespace {

using python::Object;

#if defined(__x86_64__)
bool has_folds() {
  constexpr unsigned pclmul = 1u << 1, sse41 = 1u << 19;
  static const bool found = (cpu::Cpu().ecx1 & (pclmul | sse41)) == (pclmul | sse41);
  return found;
}

FOLDS inline __m128i fold(__m128i x, __m128i by, __m128i next) {
  const __m128i low = _mm_clmulepi64_si128(x, by, 0x00), high = _mm_clmulepi64_si128(x, by, 0x11);
  return _mm_xor_si128(_mm_xor_si128(low, high), next);
}

// Gopal et al., "Fast CRC Computation for Generic Polynomials Using PCLMULQDQ Instruction", Intel 2009: 64 bytes are folded
// onto the next 64, then onto 16, and these are divided by the polynomial. `state` is the CRC's complement; n is a multiple
// of 16, at least 64. The bytes go to `to` as well where there is one.
template <bool kCopies> FOLDS uint32_t folded(char* to, const char* from, int64_t n, uint32_t state) {
  const auto load = [&](int64_t at) __attribute__((target("pclmul,sse4.1"))) {
    const __m128i x = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + at));
    if constexpr (kCopies) _mm_storeu_si128(reinterpret_cast<__m128i*>(to + at), x);
    return x;
  };
  const __m128i by64 = _mm_set_epi64x(0x01c6e41596, 0x0154442bd4), by16 = _mm_set_epi64x(0x00ccaa009e, 0x01751997d0);
  __m128i x0 = _mm_xor_si128(load(0), _mm_cvtsi32_si128(int(state))), x1 = load(16), x2 = load(32), x3 = load(48);
  int64_t at = 64;
  for (; at + 64 <= n; at += 64) {
    x0 = fold(x0, by64, load(at)), x1 = fold(x1, by64, load(at + 16));
    x2 = fold(x2, by64, load(at + 32)), x3 = fold(x3, by64, load(at + 48));
  }
  x0 = fold(fold(fold(x0, by16, x1), by16, x2), by16, x3);
  for (; at < n; at += 16) x0 = fold(x0, by16, load(at));
  const __m128i words = _mm_setr_epi32(-1, 0, -1, 0), by8 = _mm_set_epi64x(0, 0x0163cd6124);
  const __m128i polynomial = _mm_set_epi64x(0x01f7011641, 0x01db710641);  // its quotient, and itself
  x0 = _mm_xor_si128(_mm_srli_si128(x0, 8), _mm_clmulepi64_si128(x0, by16, 0x10));
  x0 = _mm_xor_si128(_mm_srli_si128(x0, 4), _mm_clmulepi64_si128(_mm_and_si128(x0, words), by8, 0x00));
  const __m128i quotient = _mm_clmulepi64_si128(_mm_and_si128(x0, words), polynomial, 0x10);
  x0 = _mm_xor_si128(x0, _mm_clmulepi64_si128(_mm_and_si128(quotient, words), polynomial, 0x00));
  return uint32_t(_mm_extract_epi32(x0, 1));
}
#else
bool has_folds() { return false; }
template <bool> uint32_t folded(char*, const char*, int64_t, uint32_t state) { return state; }
#endif

template <bool kCopies> uint64_t summed(char* to, const char* from, int64_t n, uint64_t crc) {
  uint32_t state = ~uint32_t(crc);
  const int64_t even = has_folds() && n >= 64 ? n / 16 * 16 : 0;
  if (even) state = folded<kCopies>(to, from, even, state);
  for (int64_t i = even; i < n; i++) {
    state ^= uint8_t(from[i]);
    for (int bit = 0; bit < 8; bit++) state = (state >> 1) ^ (state & 1 ? 0xedb88320u : 0);
    if constexpr (kCopies) to[i] = from[i];
  }
  return uint32_t(~state);
}

bool is_fast() { return has_folds(); }

uint64_t crc32(const Object& content, uint64_t crc) {
  const Memory from(content);
  const python::WithoutGil released;
  return summed<false>(nullptr, from.data, from.size, crc);
}

uint64_t copy(const Object& target, const Object& content, uint64_t crc) {
  const Memory to(target), from(content);
  if (to.readonly || to.size != from.size)
    throw std::invalid_argument("copy_crc32: " + std::to_string(from.size) + " bytes do not go to " +
                                std::to_string(to.size) + (to.readonly ? " that are read-only" : ""));
  const python::WithoutGil released;
  return summed<true>(to.data, from.data, from.size, crc);
}

PyMethodDef functions[] = {
    python::method<&is_fast>("has_fast_crc32", "Whether this CPU has instructions for the next two."),
    python::method<&crc32>("crc32", "As zlib.crc32(content, crc); slow without such instructions."),
    python::method<&copy>("copy_crc32", "Copy content to target, of the same size, and return its crc32."),
    {}};

}  // namespace

void bind(PyObject* module) { python::add_functions(module, functions); }

}  // namespace gptfast::crc32
