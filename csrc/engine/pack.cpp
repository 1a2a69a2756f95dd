#include "pack.h"

#include <cmath>
#include <cstring>
#include <vector>

namespace gptfast::engine {
namespace {

uint16_t to_bf16(float x) {
  uint32_t u;
  std::memcpy(&u, &x, 4);
  if ((u & 0x7fffffffu) > 0x7f800000u) return 0x7fc0;
  return uint16_t((u + 0x7fff + (u >> 16 & 1)) >> 16);
}
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
struct Nf4Levels {
  static constexpr float kMost = 127.f;
  static float level(float x) {  // the nearest of kNf4: the lowest, and a step for each midpoint that x is above
    float level = kNf4[0];
    for (int i = 1; i < 16; i++) level += x > 0.5f * float(kNf4[i - 1] + kNf4[i]) ? float(kNf4[i] - kNf4[i - 1]) : 0.f;
    return level;
  }
  static uint8_t code(float level) {
    int i = 0;
    while (float(kNf4[i]) < level) i++;
    return uint8_t(i);
  }
};

// For each of a few guesses of the scale: the codes, then the scale that fits these codes best, sum v q / sum q^2,
// which leaves the error sum v^2 - (sum v q)^2 / sum q^2. The least wins.
template <class Levels>
void four_bits(const float* v, uint16_t* half_scale, uint8_t* codes) {
  float most = 0.f;
  for (int i = 0; i < kGroup; i++)
    if (std::fabs(v[i]) > std::fabs(most)) most = v[i];
  constexpr int kGuesses = 9;
  float best = -1.f, best_scale = 0.f, best_levels[kGroup] = {};
  for (int guess = -kGuesses; most != 0.f && guess <= kGuesses; guess++) {
    const float range = Levels::kMost + float(guess) * (0.11f / 8.f) * Levels::kMost;
    const float inverse = (Levels::kMost == 8.f ? -range : range) / most;  // int4 reaches -8 but only +7
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

void pack_groups(Format format, const float* rows, i64 K, char* out) {
  for (i64 k = 0; k < K; k += kGroup, out += group_bytes(format)) {
    uint16_t* scales = reinterpret_cast<uint16_t*>(out);
    uint8_t* bytes = reinterpret_cast<uint8_t*>(out) + 2 * kPanel;
    std::memset(bytes, 0, size_t(group_bytes(format) - 2 * kPanel));
    for (i64 n = 0; n < kPanel; n++) {
      const float* v = rows + n * K + k;
      uint8_t codes[kGroup];
      if (format == Format::int8)
        eight_bits(v, scales + n, codes);
      else if (format == Format::int4)
        four_bits<Int4Levels>(v, scales + n, codes);
      else
        four_bits<Nf4Levels>(v, scales + n, codes);
      for (i64 i = 0; i < kGroup; i++) {
        if (format == Format::int8)
          bytes[(i / 4 * kPanel + n) * 4 + i % 4] = codes[i];
        else
          bytes[(i % 16 / 4 * kPanel + n) * 4 + i % 4] |= uint8_t(codes[i] << (i < 16 ? 0 : 4));
      }
    }
  }
}
void pack_panel(Format format, const float* rows, i64 K, char* out) {
  if (format == Format::f32) {
    float* to = reinterpret_cast<float*>(out);
    for (i64 k = 0; k < K; k++)
      for (i64 n = 0; n < kPanel; n++) to[k * kPanel + n] = rows[n * K + k];
  } else if (format == Format::bf16) {
    uint16_t* to = reinterpret_cast<uint16_t*>(out);
    for (i64 k = 0; k < K; k++)
      for (i64 n = 0; n < kPanel; n++) to[(k / 2 * kPanel + n) * 2 + k % 2] = to_bf16(rows[n * K + k]);
  } else {
    pack_groups(format, rows, K, out);
  }
}

}  // namespace

void pack(Format format, const float* W, i64 ld, i64 N, i64 K, i64 first, i64 last, char* matrix) {
  const i64 depth = padded_depth(format, K);
  std::vector<float> rows(size_t(kPanel * depth));
  for (i64 p = first; p < last; p++) {
    std::fill(rows.begin(), rows.end(), 0.f);
    for (i64 n = 0; n < kPanel && p * kPanel + n < N; n++)
      std::memcpy(rows.data() + n * depth, W + (p * kPanel + n) * ld, size_t(K) * 4);
    pack_panel(format, rows.data(), depth, matrix + p * panel_bytes(format, K));
  }
}

}  // namespace gptfast::engine
