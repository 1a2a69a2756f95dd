// What the checks of the CPU kernels share: random numbers, arrays with guards, comparison with plain loops in double.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "../../csrc/cpu/kernels.h"
#include "emulated_tiles.h"

namespace gptfast::checks {

constexpr DType kTypes[] = {DType::f32, DType::bf16, DType::f16};
inline const char* name_of(DType t) { return t == DType::f32 ? "fp32" : t == DType::bf16 ? "bf16" : "fp16"; }

// Floats as bits, and the 16-bit types by their definition: without the code that is checked.
inline uint32_t bits_of(float x) {
  uint32_t u;
  std::memcpy(&u, &x, 4);
  return u;
}
inline float float_of(uint32_t u) {
  float x;
  std::memcpy(&x, &u, 4);
  return x;
}
inline double widened(DType t, uint16_t h) {
  if (t == DType::bf16) return float_of(uint32_t(h) << 16);
  const int exponent = h >> 10 & 31, fraction = h & 1023;
  const double magnitude = exponent == 31  ? (fraction ? NAN : INFINITY)
                           : exponent == 0 ? std::ldexp(fraction, -24)
                                           : std::ldexp(1024 + fraction, exponent - 25);
  return h & 0x8000 ? -magnitude : magnitude;
}
// The nearest, ties to even; nan is 0x7fc0 or 0x7e00.
inline uint16_t narrowed(DType t, float x) {
  const uint16_t sign = uint16_t(bits_of(x) >> 16 & 0x8000);
  if (std::isnan(x)) return t == DType::bf16 ? 0x7fc0 : uint16_t(sign | 0x7e00);
  const int digits = t == DType::bf16 ? 7 : 10, least = t == DType::bf16 ? -126 : -14,
            most = t == DType::bf16 ? 127 : 15;
  const double a = std::fabs(double(x));
  if (a >= std::ldexp(2 - std::ldexp(1, -digits - 1), most)) return uint16_t(sign | (most - least + 2) << digits);
  const int exponent = a == 0 ? least : std::max(std::ilogb(a), least);
  const double steps = std::nearbyint(std::ldexp(a, digits - exponent));     // in units of the last place
  return uint16_t(sign | ((i64(exponent - least) << digits) + i64(steps)));  // one too many carries into the exponent
}

// splitmix64: the same numbers everywhere.
struct Random {
  uint64_t state;
  explicit Random(uint64_t seed) : state(seed) {}
  uint64_t next() {
    uint64_t z = state += 0x9E3779B97F4A7C15u;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return z ^ (z >> 31);
  }
  double uniform() { return double(next() >> 11) * 0x1p-53; }
  i64 below(i64 n) { return i64(next() % uint64_t(n)); }
  double normal() {  // nearly, from sums alone
    double sum = -6;
    for (int i = 0; i < 12; i++) sum += uniform();
    return sum;
  }
};

// n values of a type between guards. It begins as nan, every bit set: what a kernel does not write, or reads beside, shows.
// The first value lies one value behind an address that is aligned to 64, but for `aligned`.
class Array {
 public:
  Array(DType type, i64 n, bool aligned = false)
      : type_(type), n_(n), bytes_(size_t(n * element_size(type) + 3 * kGuard), 0xff) {
    const size_t at = reinterpret_cast<uintptr_t>(bytes_.data()) % kGuard;
    first_ = kGuard + (kGuard - at) % kGuard + (aligned ? 0 : size_t(element_size(type)));
  }
  Array(const Array&) = delete;
  Array& operator=(const Array&) = delete;
  static constexpr size_t kGuard = 64;

  DType type() const { return type_; }
  i64 size() const { return n_; }
  void* data() { return bytes_.data() + first_; }
  float* floats() { return static_cast<float*>(data()); }
  const void* data() const { return bytes_.data() + first_; }
  double operator[](i64 i) const {
    const uint8_t* p = bytes_.data() + first_ + size_t(i * element_size(type_));
    uint32_t word = 0;
    std::memcpy(&word, p, size_t(element_size(type_)));
    return type_ == DType::f32 ? float_of(word) : widened(type_, uint16_t(word));
  }
  void set(i64 i, double x) {
    uint8_t* p = bytes_.data() + first_ + size_t(i * element_size(type_));
    const uint32_t word = type_ == DType::f32 ? bits_of(float(x)) : narrowed(type_, float(x));
    std::memcpy(p, &word, size_t(element_size(type_)));
  }
  // Normal numbers in columns [0, C) of rows `stride` apart.
  Array& fill(Random& random, double scale, i64 C = 0, i64 stride = 1) {
    if (C == 0) C = stride = n_;
    for (i64 r = 0; r * stride < n_; r++)
      for (i64 c = 0; c < C && r * stride + c < n_; c++) set(r * stride + c, scale * random.normal());
    return *this;
  }
  void forget() { std::fill(bytes_.begin(), bytes_.end(), 0xff); }
  // Whether the guards, and what lies between the rows, are as they were.
  bool intact(i64 C = 0, i64 stride = 1) const {
    const size_t size = size_t(element_size(type_)), end = first_ + size_t(n_) * size;
    for (size_t i = 0; i < bytes_.size(); i++) {
      if (i >= first_ && i < end && (C == 0 || i64((i - first_) / size) % stride < C)) continue;
      if (bytes_[i] != 0xff) return false;
    }
    return true;
  }

 private:
  DType type_;
  i64 n_;
  std::vector<uint8_t> bytes_;
  size_t first_;
};

struct Totals {
  i64 checks = 0, values = 0, failures = 0;
};
inline Totals totals;

// One comparison of many values; it reports when it ends.
class Check {
 public:
  template <class... Parts> explicit Check(const Parts&... parts) { (add(parts), ...); }
  ~Check() {
    totals.checks++;
    totals.values += values_;
    if (values_ == 0) fail("compared nothing");
    if (emulated::in_use()) fail("left AMX's tiles in use");
    if (wrong_) {
      totals.failures++;
      std::printf("FAILED %s: %lld of %lld values; %s\n", what_.c_str(), (long long)wrong_, (long long)values_,
                  first_.c_str());
    }
  }
  // |got - want| <= absolute + relative |want|; nan for nan, infinity for infinity.
  void near(double got, double want, double absolute, double relative = 0) {
    const bool same = std::isnan(want)   ? std::isnan(got)
                      : std::isinf(want) ? got == want
                                         : std::fabs(got - want) <= absolute + relative * std::fabs(want);
    if (!same) note("%.9g, expected %.9g", got, want);
    values_++;
  }
  // The result of an operation as it is stored in a type.
  void stored(DType type, double got, double want, double absolute, double relative = 0) {
    const double unit = type == DType::f32 ? 0 : type == DType::bf16 ? 0x1p-8 : 0x1p-10;
    const double tiny = type == DType::f16 ? 0x1p-24 : 0;
    near(got, want, absolute + tiny, relative + unit);
  }
  void equal(i64 got, i64 want) {
    if (got != want) note("%.0f, expected %.0f", double(got), double(want));
    values_++;
  }
  void holds(bool fact, const char* what) {
    if (!fact) fail(what);
    values_++;
  }

 private:
  void add(const char* text) { (what_.empty() ? what_ : what_ += ' ') += text; }
  void add(const std::string& text) { add(text.c_str()); }
  void add(DType t) { add(name_of(t)); }
  void add(i64 n) { what_ += std::to_string(n); }
  void add(int n) { what_ += std::to_string(n); }
  void fail(const char* what) {
    wrong_++;
    if (first_.empty()) first_ = what;
  }
  void note(const char* format, double got, double want) {
    char text[100];
    std::snprintf(text, sizeof text, format, got, want);
    if (first_.empty()) first_ = "value " + std::to_string(values_) + " is " + text;
    wrong_++;
  }
  std::string what_, first_;
  i64 values_ = 0, wrong_ = 0;
};

// What has been done with tiles since `then`.
inline void counted(Check& check, const emulated::Counts& then, const emulated::Counts& want) {
  const emulated::Counts seen = emulated::since(then);
  check.equal(seen.configured, want.configured), check.equal(seen.loaded, want.loaded);
  check.equal(seen.stored, want.stored), check.equal(seen.multiplied, want.multiplied);
}

// Rows of an array, to read or to write.
struct ArrayRows {
  void* data;
  i64 stride;
  DType type;
  operator Rows() const { return {data, stride, type}; }
  operator MutRows() const { return {data, stride, type}; }
};
inline ArrayRows rows(const Array& x, i64 stride) { return {const_cast<void*>(x.data()), stride, x.type()}; }
inline Vector vector(const Array& x) { return {x.data(), x.type()}; }

// Philox4x32-10 by its definition, and the bits of dropout by the contract.
struct Philox {
  uint32_t word[4];
  Philox(uint64_t seed, uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3) : word{c0, c1, c2, c3} {
    uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
    for (int round = 0; round < 10; round++) {
      const uint64_t a = uint64_t(0xD2511F53u) * word[0], b = uint64_t(0xCD9E8D57u) * word[2];
      const uint32_t next[4] = {uint32_t(b >> 32) ^ word[1] ^ k0, uint32_t(b), uint32_t(a >> 32) ^ word[3] ^ k1,
                                uint32_t(a)};
      std::memcpy(word, next, sizeof word);
      k0 += 0x9E3779B9u;
      k1 += 0xBB67AE85u;
    }
  }
};
inline bool kept(uint64_t seed, uint32_t offset, uint32_t threshold, i64 m, i64 i, i64 j) {
  const Philox p(seed, uint32_t(j >> 5 << 2 | (j >> 1 & 3)), uint32_t(i), uint32_t(m), offset);
  const i64 lane = (j >> 3 & 3) << 1 | (j & 1);
  return (p.word[lane >> 1] >> (lane & 1) * 16 & 0xffff) >= threshold;
}
inline double kept_scale(uint32_t threshold) { return threshold >= 65536 ? 0 : 65536. / double(65536 - threshold); }

// The checks, a file each. `isa` is the instruction set in use.
void check_rows();
void check_norm();
void check_gates();
void check_loss();
void check_products();
void check_quantized();
void check_attention();
void check_sample();
void check_engine(const char* isa);
void check_tiles();  // of AMX, elsewhere nothing
void print_tokens(const char* isa);

}  // namespace gptfast::checks
