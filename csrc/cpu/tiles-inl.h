// AMX: eight tile registers of up to 16 rows of 64 bytes, and the products of two of them. Linux gives a process leave to use
// them (amx.cpp); a thread configures their shapes before it uses them and releases them afterwards.
//
//   0  1     sums: 32 rows by 32 columns         4, 5  16 rows of A each, with 16 words along k
//   2  3     in four tiles                       6, 7  16 words of B each, with 16 columns
//
// The instructions are written out: g++ 12's own _tile_loadconfig says that it reads 8 of its 64 bytes, and its _tile_loadd
// that it reads no memory, so stores before them may be left out or moved behind them. A compiler knows nothing of these
// registers here, so it cannot spill them.
//
// Tests compile the kernels with the registers in C++ instead (tests/cpu_kernels/emulated_tiles.h).
#pragma once

constexpr i64 kTile = 16;  // rows of a tile, and words of a row

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

#ifdef GPTFAST_EMULATED_TILES
INL void tile_config(const TileConfig& config) { emulated::configure(&config); }
INL void tile_release() { emulated::release(); }
template <int T> INL void tile_zero() { emulated::zero(T); }
template <int T> INL void tile_load(const void* p, i64 row_bytes) { emulated::load(T, p, row_bytes); }
template <int T> INL void tile_store(void* p, i64 row_bytes) { emulated::store(T, p, row_bytes); }
template <int C, int A, int B> INL void tile_pairs() { emulated::multiply_pairs(C, A, B); }
template <int C, int A, int B> INL void tile_signed_bytes() { emulated::multiply_signed_bytes(C, A, B); }
#else
INL void tile_config(const TileConfig& config) { asm volatile("ldtilecfg %0" ::"m"(config)); }
INL void tile_release() { asm volatile("tilerelease"); }
template <int T> INL void tile_zero() { asm volatile("tilezero %%tmm%c0" ::"i"(T)); }
template <int T> INL void tile_load(const void* p, i64 row_bytes) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(row_bytes), "i"(T) : "memory");
}
template <int T> INL void tile_store(void* p, i64 row_bytes) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(p), "r"(row_bytes), "i"(T) : "memory");
}
// C += A B: pairs of bf16, in fp32; signed bytes, in 32 bits.
template <int C, int A, int B> INL void tile_pairs() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}
template <int C, int A, int B> INL void tile_signed_bytes() {
  asm volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}
#endif

// The shapes in use. To configure them is slow and clears the registers, so it is done where a shape changes; who multiplies
// last calls end().
struct Tiles {
  i64 rows = 0, words = 0;  // of tiles 0, 1, 4, and of A along k; 2, 3 and 5 have 16 rows. 0: not configured

  INL_MEMBER void use(i64 m, i64 k) {
    if (rows == m && words == k) return;
    rows = m, words = k;
    TileConfig config;
    for (int t = 0; t < 8; t++) {
      config.rows[t] = uint8_t(t >= 6 ? k : t == 0 || t == 1 || t == 4 ? m : kTile);
      config.row_bytes[t] = uint16_t(t == 4 || t == 5 ? 4 * k : 64);
    }
    tile_config(config);
  }
  INL_MEMBER void end() {
    if (rows) tile_release();
    rows = words = 0;
  }
};

// The sums of 16 R rows and 16 V columns begin as 0 or as C; c_row, a_row, b_row: bytes from row to row.
template <int R, int V> INL void tiles_begin(const float* c, i64 c_row, bool add) {
  if (!add) {
    tile_zero<0>();
    if constexpr (V > 1) tile_zero<1>();
    if constexpr (R > 1) tile_zero<2>();
    if constexpr (R > 1 && V > 1) tile_zero<3>();
    return;
  }
  tile_load<0>(c, c_row);
  if constexpr (V > 1) tile_load<1>(c + kTile, c_row);
  if constexpr (R > 1) tile_load<2>(c + kTile * c_row / 4, c_row);
  if constexpr (R > 1 && V > 1) tile_load<3>(c + kTile * c_row / 4 + kTile, c_row);
}
// 16 words along k, or as many as the tiles are configured for.
template <int R, int V> INL void tiles_step(const void* a, i64 a_row, const void* b, i64 b_row) {
  tile_load<6>(b, b_row);
  tile_load<4>(a, a_row);
  tile_pairs<0, 4, 6>();
  if constexpr (V > 1) {
    tile_load<7>(static_cast<const char*>(b) + 64, b_row);
    tile_pairs<1, 4, 7>();
  }
  if constexpr (R > 1) {
    tile_load<5>(static_cast<const char*>(a) + kTile * a_row, a_row);
    tile_pairs<2, 5, 6>();
    if constexpr (V > 1) tile_pairs<3, 5, 7>();
  }
}
template <int R, int V> INL void tiles_end(float* c, i64 c_row) {
  tile_store<0>(c, c_row);
  if constexpr (V > 1) tile_store<1>(c + kTile, c_row);
  if constexpr (R > 1) tile_store<2>(c + kTile * c_row / 4, c_row);
  if constexpr (R > 1 && V > 1) tile_store<3>(c + kTile * c_row / 4 + kTile, c_row);
}
