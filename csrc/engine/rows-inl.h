// What happens to single rows between the products.
#include "activation-inl.h"
#include "tiles-inl.h"

// x + kRounder has the nearest integer, ties to even, of |x| < 2^22 in its low bits.
constexpr float kRounder = 12582912.f;  // 1.5 * 2^23
// The low byte of each lane.
INL void store_bytes(int8_t* p, I x) {
#if defined(GPTFAST_NEON)
  const uint16x4_t words = vmovn_u32(x);
  vst1_lane_u32(reinterpret_cast<uint32_t*>(p), vreinterpret_u32_u8(vmovn_u16(vcombine_u16(words, words))), 0);
#elif !defined(GPTFAST_SCALAR) && defined(__AVX512F__)
  _mm_storeu_si128((__m128i*)p, _mm512_cvtepi32_epi8(x));
#else
  alignas(64) int32_t lanes[L];
  istore(lanes, x);
  for (int i = 0; i < L; i++) p[i] = int8_t(lanes[i]);
#endif
}

// x in bytes: x / s, s = max |x| / 127 of each group, scale = factor * s; and -offset times their sum. A nan or an
// infinity makes the sum nan and with it the scale, so that it is not lost.
static void quantize_row(const float* x, i64 K, int offset, float factor, int8_t* q, float* scale, int32_t* acc_init) {
  for (i64 k = 0; k < K; k += kGroup, q += kGroup) {
    F v[kGroup / L], top = zero(), total = zero();
    UNROLL_FOR (int i = 0; i < kGroup / L; i++) {
      const i64 left = K - k - i * L;
      v[i] = left >= L ? load(x + k + i * L) : left > 0 ? load_n(x + k + i * L, left) : zero();
      top = max(abs(v[i]), top);
    }
    const float most = hmax(top);
    const F inverse = set(most > 1e-30f ? 127.f / most : 0.f);  // less is 0, and its inverse infinite
    UNROLL_FOR (int i = 0; i < kGroup / L; i++) {
      const F rounded = v[i] * inverse + set(kRounder);
      store_bytes(q + i * L, as_int(rounded));
      total = total + (rounded - set(kRounder));
    }
    const float all = sum(total);
    *scale++ = most / 127.f * factor + 0 * all;
    *acc_init++ = all == all ? -offset * int32_t(all) : 0;
  }
}
// The four even bytes of each 8, then the four odd ones.
static void even_then_odd(int8_t* q, i64 n) {
  for (i64 i = 0; i < n; i += 8) {
    uint64_t all, halves[2];
    __builtin_memcpy(&all, q + i, 8);
    for (int odd = 0; odd < 2; odd++) {
      uint64_t b = all >> 8 * odd & 0x00ff00ff00ff00ffull;
      b = (b | b >> 8) & 0x0000ffff0000ffffull;
      halves[odd] = (b | b >> 16) & 0xffffffffull;
    }
    all = halves[0] | halves[1] << 32;
    __builtin_memcpy(q + i, &all, 8);
  }
}
static void quantize_activations(Format f, const float* x, i64 K, const Activations& to, i64 row, float factor) {
  if (quantised(f)) {
    int8_t* q = to.q + row * to.stride;
    quantize_row(x, K, weight_offset(f), factor * (f == Format::mxfp4 ? 0.5f : 1.f), q,
                 to.scale + row * to.stride / kGroup, to.acc_init + row * to.stride / kGroup);
    if (f == Format::mxfp4) even_then_odd(q, round_up(K, kGroup));
    return;
  }
  if (f != Format::bf16 || !kPairs) return;
  uint16_t* out = to.bf16 + row * to.stride;
  narrow_row(out, x, DType::bf16, K);
  for (i64 k = K; k < padded_depth(f, K); k++) out[k] = 0;
}

static void layer_norm(const float* x, const float* weight, const float* bias, float eps, i64 C, float* y) {
  const F mean = set(row_sum(C, [&](i64 c, i64 n) { return load_lanes(x + c, n); }) / float(C));
  const float variance = row_sum(C,
                                 [&](i64 c, i64 n) {
                                   const F d = load_lanes(x + c, n) - mean;
                                   return n == L ? d * d : select_or_zero(first_n(n), d * d);
                                 }) /
                         float(C);
  const F rstd = set(1.f / __builtin_sqrtf(variance + eps));
  for_lanes(C, [&](i64 c, i64 n) {
    const F normed = (load_lanes(x + c, n) - mean) * rstd, w = weight ? load_lanes(weight + c, n) : set(1.f);
    store_lanes(y + c, bias ? fma(normed, w, load_lanes(bias + c, n)) : normed * w, n);
  });
}

template <Epilogue EPILOGUE>
APART static void epilogue_rows(const float* y, i64 ldy, i64 M, const float* bias, float* out, i64 ldo) {
  for (i64 m = 0; m < M; m++)
    ROLLED_FOR (int c = 0; c < kPanel; c += L) {
      F v = load(y + m * ldy + c);
      if (bias) v = v + load(bias + c);
      v = activate<EPILOGUE>(v);
      if (EPILOGUE == Epilogue::add) v = v + load(out + m * ldo + c);
      store(out + m * ldo + c, v);
    }
}
static void epilogue(Epilogue kind, const float* y, i64 ldy, i64 M, const float* bias, float* out, i64 ldo) {
  switch (kind) {
    case Epilogue::store: return epilogue_rows<Epilogue::store>(y, ldy, M, bias, out, ldo);
    case Epilogue::add: return epilogue_rows<Epilogue::add>(y, ldy, M, bias, out, ldo);
    case Epilogue::gelu_tanh: return epilogue_rows<Epilogue::gelu_tanh>(y, ldy, M, bias, out, ldo);
    case Epilogue::gelu: return epilogue_rows<Epilogue::gelu>(y, ldy, M, bias, out, ldo);
    case Epilogue::relu: return epilogue_rows<Epilogue::relu>(y, ldy, M, bias, out, ldo);
    case Epilogue::silu: return epilogue_rows<Epilogue::silu>(y, ldy, M, bias, out, ldo);
    case Epilogue::quick_gelu: return epilogue_rows<Epilogue::quick_gelu>(y, ldy, M, bias, out, ldo);
    case Epilogue::tanh: return epilogue_rows<Epilogue::tanh>(y, ldy, M, bias, out, ldo);
    case Epilogue::relu_squared: return epilogue_rows<Epilogue::relu_squared>(y, ldy, M, bias, out, ldo);
  }
}

INL float widen_half(const uint16_t* p) {
  alignas(64) uint16_t lanes[L] = {*p};
  alignas(64) float out[L];
  store(out, load_f16(lanes));
  return out[0];
}
// Value k of output n of a panel (n < 32) of so many bytes.
static float weight_at(Format f, const char* panel, i64 bytes, i64 n, i64 k) {
  if (f == Format::f32) return reinterpret_cast<const float*>(panel)[k * kPanel + n];
  if (f == Format::bf16) {
    const char* step = panel + header_bytes(f) + k / 4 * (group_bytes(f) / 8);
    const int nibble = reinterpret_cast<const uint16_t*>(step)[n % 16 * 2 + k % 2] >> (k % 4 / 2 * 8 + n / 16 * 4) & 15;
    const uint32_t exponent = reinterpret_cast<const uint16_t*>(panel)[nibble];
    const uint32_t byte = uint8_t(step[64 + k % 4 / 2 * 64 + n * 2 + k % 2]);
    const uint32_t bits = (byte >> 7 << 15 | exponent | (byte & 0x7f)) << 16;
    float x;
    __builtin_memcpy(&x, &bits, 4);
    return x;
  }
  if (f == Format::mxfp4) {
    const uint8_t* blocks = reinterpret_cast<const uint8_t*>(panel);
    const i64 groups = bytes / group_bytes(f), at = n * groups + k / kGroup;
    const int code = blocks[at * 16 + k % kGroup / 2] >> (k % 2 * 4) & 15;
    return __builtin_ldexpf(float(kMxfp4[code]), int(blocks[kPanel * groups * 16 + at]) - kMxfp4Bias);
  }
  const char* group = panel + k / kGroup * group_bytes(f);
  const float scale = widen_half(reinterpret_cast<const uint16_t*>(group) + n);
  const uint8_t* codes = reinterpret_cast<const uint8_t*>(group) + kPanel * 2;
  const i64 i = k % kGroup;
  if (f == Format::int8) return scale * float(int(codes[(i / 4 * kPanel + n) * 4 + i % 4]) - weight_offset(f));
  const uint8_t* nibbles = f == Format::int6 ? codes + 2 * kPanel * 4 : codes;
  const int low = nibbles[(i % 16 / 4 * kPanel + n) * 4 + i % 4] >> (i < 16 ? 0 : 4) & 15;
  if (f == Format::nf4) return scale * float(kNf4[low]);
  if (f == Format::q4) return scale * float(kQ4[low]);
  const int high = f == Format::int6 ? codes[(i / 16 * kPanel + n) * 4 + i % 4] >> (i % 16 / 4 * 2) & 3 : 0;
  return scale * float((high << 4 | low) - weight_offset(f));
}
static void embed(Format f, const char* matrix, i64 K, i64 n, float scale, const float* position, float* out) {
  const char* panel = matrix + n / kPanel * panel_bytes(f, K);
  const i64 bytes = panel_bytes(f, K), step = f == Format::f32 ? kPanel * 4 : 64;
  for (i64 i = n % kPanel * 4; i < bytes; i += step) __builtin_prefetch(panel + i, 0, 3);  // all lines it is in
  for (i64 k = 0; k < K; k++) out[k] = scale * weight_at(f, panel, bytes, n % kPanel, k) + position[k];
}

static int64_t read(const char* data, i64 bytes) {
  I s[4] = {iset(0), iset(0), iset(0), iset(0)};
  const i64 step = 4 * L * 4;
  for (i64 i = 0; i + step <= bytes; i += step) {
    prefetch_range(data + kAhead + i, step);
    UNROLL_FOR (int j = 0; j < 4; j++) s[j] = iadd(s[j], iload(data + i + j * L * 4));
  }
  alignas(64) uint32_t lanes[L];
  istore(lanes, iadd(iadd(s[0], s[1]), iadd(s[2], s[3])));
  int64_t total = 0;
  for (uint32_t x : lanes) total += x;
  return total;
}

static void fill(Kernels& k) {
  k.bf16_pairs = kPairs;
  k.quantize_activations = quantize_activations;
  k.layer_norm = layer_norm;
  k.epilogue = epilogue;
  k.embed = embed;
  k.read = read;
}
