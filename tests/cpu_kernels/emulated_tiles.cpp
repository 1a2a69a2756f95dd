// See emulated_tiles.h.
#include "emulated_tiles.h"

#include <cfloat>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <initializer_list>

namespace gptfast::emulated {
namespace {

constexpr int kTiles = 8, kRows = 16, kRowBytes = 64;
constexpr uint8_t kPoison = 0xff;  // what a released register holds: nan

struct State {
  bool configured = false;
  int rows[kTiles] = {}, row_bytes[kTiles] = {};
  uint8_t data[kTiles][kRows][kRowBytes];
  Counts counts = {};
};
thread_local State state;

[[noreturn]] void fault(const char* what, int tile) {
  std::printf("FAULT tile %d: %s\n", tile, what);
  std::exit(3);
}
void expect(bool fact, const char* what, int tile = -1) {
  if (!fact) fault(what, tile);
}
void expect_usable(int tile) {
  expect(state.configured, "no configuration is loaded", tile);
  expect(tile >= 0 && tile < kTiles && state.rows[tile] > 0, "is not configured", tile);
}

float flushed(float x) { return std::fabs(x) < FLT_MIN ? std::copysign(0.f, x) : x; }
float element(int tile, int row, int i) {
  float x;
  std::memcpy(&x, state.data[tile][row] + 4 * i, 4);
  return x;
}
float half(int tile, int row, int i) {  // a bf16, denormals as 0
  uint16_t h;
  std::memcpy(&h, state.data[tile][row] + 2 * i, 2);
  const uint32_t bits = uint32_t(h) << 16;
  float x;
  std::memcpy(&x, &bits, 4);
  return flushed(x);
}
void expect_shapes(int c, int a, int b) {
  for (int tile : {c, a, b}) expect_usable(tile);
  expect(c != a && c != b && a != b, "is used twice in a product", c);
  expect(state.row_bytes[c] % 4 == 0 && state.row_bytes[a] % 4 == 0 && state.row_bytes[b] % 4 == 0, "has half a word",
         c);
  expect(state.rows[c] == state.rows[a], "has other rows than A", c);
  expect(state.row_bytes[a] / 4 == state.rows[b], "A's words are not B's rows", c);
  expect(state.row_bytes[c] == state.row_bytes[b], "has other columns than B", c);
  state.counts.multiplied++;
}

}  // namespace

void configure(const void* config) {
  uint8_t bytes[64];
  std::memcpy(bytes, config, 64);
  expect(bytes[0] == 1 && bytes[1] == 0, "palette or start row");
  for (int i = 2; i < 16; i++) expect(bytes[i] == 0, "a reserved byte");
  for (int t = 0; t < 16; t++) {
    uint16_t row_bytes;
    std::memcpy(&row_bytes, bytes + 16 + 2 * t, 2);
    const int rows = bytes[48 + t];
    expect(row_bytes <= kRowBytes && rows <= kRows && (t < kTiles || (!rows && !row_bytes)), "too large a shape", t);
    expect((rows == 0) == (row_bytes == 0), "half a shape", t);
    if (t < kTiles) state.rows[t] = rows, state.row_bytes[t] = row_bytes;
  }
  std::memset(state.data, 0, sizeof state.data);
  state.configured = true;
  state.counts.configured++;
}
void release() {
  std::memset(state.data, kPoison, sizeof state.data);
  state.configured = false;
}
void zero(int tile) {
  expect_usable(tile);
  std::memset(state.data[tile], 0, sizeof state.data[tile]);
}
void load(int tile, const void* data, int64_t row_bytes) {
  zero(tile);
  for (int r = 0; r < state.rows[tile]; r++)
    std::memcpy(state.data[tile][r], static_cast<const char*>(data) + r * row_bytes, size_t(state.row_bytes[tile]));
  state.counts.loaded++;
}
void store(int tile, void* data, int64_t row_bytes) {
  expect_usable(tile);
  for (int r = 0; r < state.rows[tile]; r++)
    std::memcpy(static_cast<char*>(data) + r * row_bytes, state.data[tile][r], size_t(state.row_bytes[tile]));
  state.counts.stored++;
}

// Fused multiply-adds of the even values along k and of the odd ones, then both sums, then C; each result rounded to the nearest
// and 0 below the smallest normal number, as are the inputs.
void multiply_pairs(int c, int a, int b) {
  expect_shapes(c, a, b);
  for (int m = 0; m < state.rows[c]; m++)
    for (int n = 0; n < state.row_bytes[c] / 4; n++) {
      float even = 0, odd = 0;
      for (int k = 0; k < state.row_bytes[a] / 4; k++) {
        even = flushed(std::fma(half(a, m, 2 * k), half(b, k, 2 * n), even));
        odd = flushed(std::fma(half(a, m, 2 * k + 1), half(b, k, 2 * n + 1), odd));
      }
      const float sum = flushed(flushed(element(c, m, n)) + flushed(even + odd));
      std::memcpy(state.data[c][m] + 4 * n, &sum, 4);
    }
}
void multiply_signed_bytes(int c, int a, int b) {
  expect_shapes(c, a, b);
  for (int m = 0; m < state.rows[c]; m++)
    for (int n = 0; n < state.row_bytes[c] / 4; n++) {
      uint32_t sum;
      std::memcpy(&sum, state.data[c][m] + 4 * n, 4);
      for (int k = 0; k < state.row_bytes[a]; k++)
        sum += uint32_t(int32_t(int8_t(state.data[a][m][k])) * int32_t(int8_t(state.data[b][k / 4][4 * n + k % 4])));
      std::memcpy(state.data[c][m] + 4 * n, &sum, 4);
    }
}

Counts counts() { return state.counts; }
Counts since(const Counts& then) {
  const Counts& now = state.counts;
  return {now.configured - then.configured, now.loaded - then.loaded, now.stored - then.stored,
          now.multiplied - then.multiplied};
}
bool in_use() { return state.configured; }

}  // namespace gptfast::emulated
