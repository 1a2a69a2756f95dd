// A mark of 64 bits of a stretch of bytes: 32 lanes of words side by side, each h = shifted((h ^ word) * odd).
//
// A step is a bijection of h for any word, and gives another h for any other word: a single word that changes, by one
// bit or many, always changes the mark. What changes in several words escapes it as rarely as chance has it (2^-64);
// places count, so that values that change places do too. Not for adversaries.
//
// Floor: one read of the bytes. What a step costs is hidden behind it where a vector of 64-bit words has a product
// (AVX-512); with AVX2 a product is made of three, and a core keeps up with about 20 GB/s.
static constexpr i64 kMarkBlock = 256;
static constexpr i64 kMarkAhead = 2048;  // asked for ahead: a core's own prefetcher stops at the end of a page
static constexpr uint64_t kMarkFactor = 0x9E3779B97F4A7C15u;

#if defined(__AVX512F__)
static constexpr int kMarkBytes = 64;
#elif defined(__AVX2__)
static constexpr int kMarkBytes = 32;
#else
static constexpr int kMarkBytes = 16;
#endif
typedef uint64_t MarkWords __attribute__((vector_size(kMarkBytes)));
static constexpr int kMarkVectors = kMarkBlock / kMarkBytes;

static inline uint64_t mark_step(uint64_t h, uint64_t word) {
  h = (h ^ word) * kMarkFactor;
  return h ^ (h >> 32);
}

static uint64_t checksum(const char* data, i64 bytes, uint64_t seed) {
  union {
    MarkWords v[kMarkVectors];
    uint64_t word[kMarkBlock / 8];
  } lanes;
  for (uint64_t i = 0; i < kMarkBlock / 8; i++)
    lanes.word[i] = (seed ^ uint64_t(bytes)) + (i + 1) * 0xD1B54A32D192ED03u;
  MarkWords h[kMarkVectors];
  __builtin_memcpy(h, lanes.v, sizeof h);
  auto block = [&](const char* p) __attribute__((always_inline)) {
    for (int i = 0; i < kMarkVectors; i++) {
      MarkWords x;  // one at a time: a copy of the block is made in halves, which the loads then wait for
      __builtin_memcpy(&x, p + i * kMarkBytes, sizeof x);
      h[i] = (h[i] ^ x) * kMarkFactor;
      h[i] ^= h[i] >> 32;
    }
  };
  i64 done = 0;
  for (; done + kMarkBlock <= bytes; done += kMarkBlock) {
    for (i64 line = 0; line < kMarkBlock; line += 64) __builtin_prefetch(data + done + kMarkAhead + line);
    block(data + done);
  }
  if (done < bytes) {
    char rest[kMarkBlock] = {};
    __builtin_memcpy(rest, data + done, size_t(bytes - done));
    block(rest);
  }
  __builtin_memcpy(lanes.v, h, sizeof h);
  uint64_t mark = seed;
  for (uint64_t word : lanes.word) mark = mark_step(mark, word);
  return mark;
}

static void fill(Kernels& k) { k.checksum = checksum; }
