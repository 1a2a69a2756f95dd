#include "pack.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

namespace gptfast::engine {

uint16_t to_bf16(float x) {
  uint32_t u;
  std::memcpy(&u, &x, 4);
  if ((u & 0x7fffffffu) > 0x7f800000u) return 0x7fc0;
  return uint16_t((u + 0x7fff + (u >> 16 & 1)) >> 16);
}

namespace {

float from_half(uint16_t h) {  // finite and not negative
  const uint32_t u = uint32_t(h) << 13;
  float x;
  std::memcpy(&x, &u, 4);
  return x * 0x1p112f;  // exponent bias 15 -> 127; also of subnormals
}
uint16_t to_half(float x) {  // of a finite value >= 0, to the nearest; beyond the largest half: that
  if (x >= 65504.f) return 0x7bff;
  uint32_t u;
  if (x < 0x1p-14f) {  // subnormal: let the adder round at bit 2^-24
    x += 0.5f;
    std::memcpy(&u, &x, 4);
    return uint16_t(u - 0x3f000000u);
  }
  std::memcpy(&u, &x, 4);
  u += 0xc8000fffu + (u >> 13 & 1);
  return uint16_t(u >> 13);
}
float nearest(float x) { return (x + 12582912.f) - 12582912.f; }  // of |x| < 2^22, ties to even; vectorises everywhere

float clamp(float x, float low, float high) {  // in a form that vectorises, as fmin with its care for nan does not
  x = x < low ? low : x;
  return x > high ? high : x;
}
// sum a b over a group, in eight sums side by side
float dot(const float* a, const float* b) {
  float sums[8] = {};
  for (int i = 0; i < kGroup; i += 8)
    for (int j = 0; j < 8; j++) sums[j] += a[i + j] * b[i + j];
  for (int j = 0; j < 4; j++) sums[j] += sums[j + 4];
  return (sums[0] + sums[2]) + (sums[1] + sums[3]);
}

// Values that a code stands for are levels[code] * scale. Codes for a given 1 / scale:
struct Int4Levels {
  static constexpr float kMost = 8.f;
  static float level(float x) { return clamp(nearest(x), -8.f, 7.f); }
  static uint8_t code(float level) { return uint8_t(int(level) + 8); }
};
struct Int6Levels {
  static constexpr float kMost = 32.f;
  static float level(float x) { return clamp(nearest(x), -32.f, 31.f); }
  static uint8_t code(float level) { return uint8_t(int(level) + 32); }
};
template <const int8_t (&LEVELS)[16]> struct TableLevels {
  static constexpr float kMost = 127.f;
  static float level(float x) {  // the nearest: the lowest, and a step for each midpoint that x is above
    float level = LEVELS[0];
    for (int i = 1; i < 16; i++)
      level += x > 0.5f * float(LEVELS[i - 1] + LEVELS[i]) ? float(LEVELS[i] - LEVELS[i - 1]) : 0.f;
    return level;
  }
  static uint8_t code(float level) {
    int i = 0;
    while (float(LEVELS[i]) < level) i++;
    return uint8_t(i);
  }
};

// For each of a few guesses of the scale: the codes, then the scale that fits these codes best, sum v q / sum q^2,
// which leaves the error sum v^2 - (sum v q)^2 / sum q^2. The least wins. The largest value goes to -kMost: there are
// levels that reach further to that side.
template <class Levels> void few_bits(const float* v, uint16_t* half_scale, uint8_t* codes) {
  constexpr int kGuesses = 9;
  constexpr float kStep = Levels::kMost == 32.f ? 0.004f : 0.01375f;  // of the range, from a guess to the next
  float most = 0.f;
  for (int i = 0; i < kGroup; i++)
    if (std::fabs(v[i]) > std::fabs(most)) most = v[i];
  float best = -1.f, best_scale = 0.f, best_levels[kGroup] = {};
  for (int guess = -kGuesses; most != 0.f && guess <= kGuesses; guess++) {
    const float inverse = -Levels::kMost * (1.f + float(guess) * kStep) / most;
    float levels[kGroup];
    for (int i = 0; i < kGroup; i++) levels[i] = Levels::level(v[i] * inverse);
    const float product = dot(v, levels), norm = dot(levels, levels);
    if (norm == 0.f || product * product <= best * norm) continue;
    best = product * product / norm;
    best_scale = product / norm;
    std::memcpy(best_levels, levels, sizeof levels);
  }
  *half_scale = uint16_t(to_half(std::fabs(best_scale)) | (best_scale < 0 ? 0x8000 : 0));
  for (int i = 0; i < kGroup; i++) codes[i] = Levels::code(best_levels[i]);
}
void eight_bits(const float* v, uint16_t* half_scale, uint8_t* codes) {
  float most = 0.f;
  for (int i = 0; i < kGroup; i++) most = std::fmax(most, std::fabs(v[i]));
  *half_scale = to_half(most / 127.f);
  const float scale = from_half(*half_scale), inverse = scale > 0 ? 1.f / scale : 0.f;
  for (int i = 0; i < kGroup; i++) codes[i] = uint8_t(128 + int(clamp(nearest(v[i] * inverse), -127.f, 127.f)));
}

// MXFP4: of its specification's scale, which brings the largest value to 4 up to 8 and cuts off at 6, and the next one the one
// that leaves less error. Numbers that come from MXFP4 come out as they are.
void microscaled(const float* v, uint8_t* scale_byte, uint8_t* codes) {
  float most = 0.f, least_error = -1.f;
  for (int i = 0; i < kGroup; i++) most = std::fmax(most, std::fabs(v[i]));
  *scale_byte = kMxfp4Bias;
  std::memset(codes, 0, kGroup);
  for (int more = 0; most > 0.f && more < 2; more++) {
    const int exponent =
        std::max(1 - kMxfp4Bias, std::ilogb(most) - 3 + more);  // a byte of 0 is less than fp32 multiplies
    const float inverse = std::ldexp(1.f, -exponent), scale = std::ldexp(1.f, exponent);
    uint8_t own[kGroup];
    float error = 0.f;
    for (int i = 0; i < kGroup; i++) {
      const float size = std::fabs(v[i]) * inverse;
      int level = 7;
      while (level > 0 && size <= 0.5f * float(kMxfp4[level] + kMxfp4[level - 1])) level--;
      const float off = (size - float(kMxfp4[level])) * scale / most;
      error += off * off;
      own[i] = uint8_t(level | (level && v[i] < 0 ? 8 : 0));
    }
    if (least_error >= 0.f && error >= least_error) continue;
    least_error = error;
    *scale_byte = uint8_t(exponent + kMxfp4Bias);
    std::memcpy(codes, own, kGroup);
  }
}
void pack_mxfp4(const float* rows, i64 K, char* out) {
  uint8_t *blocks = reinterpret_cast<uint8_t*>(out), *scales = blocks + kPanel * K / 2, codes[kGroup];
  for (i64 at = 0; at < kPanel * K / kGroup; at++) {
    microscaled(rows + at * kGroup, scales + at, codes);
    for (int i = 0; i < 16; i++) blocks[at * 16 + i] = uint8_t(codes[2 * i] | codes[2 * i + 1] << 4);
  }
}

void group_codes(Format format, const float* v, uint16_t* half_scale, uint8_t* codes) {
  switch (format) {
    case Format::int8: return eight_bits(v, half_scale, codes);
    case Format::int6: return few_bits<Int6Levels>(v, half_scale, codes);
    case Format::int4: return few_bits<Int4Levels>(v, half_scale, codes);
    case Format::nf4: return few_bits<TableLevels<kNf4>>(v, half_scale, codes);
    default: return few_bits<TableLevels<kQ4>>(v, half_scale, codes);
  }
}
void pack_groups(Format format, const float* rows, i64 K, char* out) {
  for (i64 k = 0; k < K; k += kGroup, out += group_bytes(format)) {
    uint16_t* scales = reinterpret_cast<uint16_t*>(out);
    uint8_t* bytes = reinterpret_cast<uint8_t*>(out) + 2 * kPanel;
    uint8_t* nibbles = format == Format::int6 ? bytes + 2 * kPanel * 4 : bytes;
    std::memset(bytes, 0, size_t(group_bytes(format) - 2 * kPanel));
    for (i64 n = 0; n < kPanel; n++) {
      uint8_t codes[kGroup];
      group_codes(format, rows + n * K + k, scales + n, codes);
      for (i64 i = 0; i < kGroup; i++) {
        if (format == Format::int8) {
          bytes[(i / 4 * kPanel + n) * 4 + i % 4] = codes[i];
          continue;
        }
        nibbles[(i % 16 / 4 * kPanel + n) * 4 + i % 4] |= uint8_t((codes[i] & 15) << (i < 16 ? 0 : 4));
        if (format == Format::int6)
          bytes[(i / 16 * kPanel + n) * 4 + i % 4] |= uint8_t(codes[i] >> 4 << i % 16 / 4 * 2);
      }
    }
  }
}

// bf16 values of a panel in 12 bits: sign, 7 bits of fraction, and which of 16 exponents: the 15 from the largest of the
// panel down, or 0. Values that are too small for these, less than 2^-14 of the largest, become 0 or the smallest that
// there is; that is less than the rounding of the large ones.
void pack_bf16(const float* rows, i64 K, char* out) {
  constexpr int kSmall = 15;
  uint16_t* exponents = reinterpret_cast<uint16_t*>(out);
  int largest = 0;
  for (i64 i = 0; i < kPanel * K; i++) largest = std::max(largest, to_bf16(rows[i]) >> 7 & 255);
  for (int i = 0; i < 32; i++) exponents[i] = uint16_t(i % 16 == kSmall ? 0 : std::max(largest - i % 16, 0) << 7);
  for (i64 k = 0; k < K; k++) {
    char* step = out + header_bytes(Format::bf16) + k / 4 * group_bytes(Format::bf16) / 8;
    for (i64 n = 0; n < kPanel; n++) {
      const int bits = to_bf16(rows[n * K + k]), exponent = bits >> 7 & 255, below = largest - exponent;
      int sign_and_fraction = (bits >> 8 & 128) | (bits & 127), nibble = below;
      if (below >= kSmall) {
        nibble = below == kSmall && exponent ? kSmall - 1 : kSmall;
        sign_and_fraction &= 128;
      }
      reinterpret_cast<uint16_t*>(step)[n % 16 * 2 + k % 2] |= uint16_t(nibble << (k % 4 / 2 * 8 + n / 16 * 4));
      step[64 + k % 4 / 2 * 64 + n * 2 + k % 2] = char(sign_and_fraction);
    }
  }
}
void pack_panel(Format format, const float* rows, i64 K, char* out) {
  if (format == Format::f32) {
    float* to = reinterpret_cast<float*>(out);
    for (i64 k = 0; k < K; k++)
      for (i64 n = 0; n < kPanel; n++) to[k * kPanel + n] = rows[n * K + k];
  } else if (format == Format::bf16) {
    std::memset(out, 0, size_t(panel_bytes(format, K)));
    pack_bf16(rows, K, out);
  } else if (format == Format::mxfp4) {
    pack_mxfp4(rows, K, out);
  } else {
    pack_groups(format, rows, K, out);
  }
}

}  // namespace

void pack(Format format, const float* W, i64 ld, i64 N, i64 K, float factor, i64 first, i64 last, char* matrix) {
  const i64 depth = padded_depth(format, K);
  std::vector<float> rows(size_t(kPanel * depth));
  for (i64 p = first; p < last; p++) {
    std::fill(rows.begin(), rows.end(), 0.f);
    for (i64 n = 0; n < kPanel && p * kPanel + n < N; n++)
      for (i64 k = 0; k < K; k++) rows[size_t(n * depth + k)] = W[(p * kPanel + n) * ld + k] * (1 / factor);
    pack_panel(format, rows.data(), depth, matrix + p * panel_bytes(format, K));
  }
}

}  // namespace gptfast::engine
