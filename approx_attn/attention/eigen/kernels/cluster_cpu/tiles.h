// Products of matrices rounded to bfloat16, with float32 sums, in the tiles of AMX (Intel, from Sapphire Rapids on).
//
// A tile is 16 rows of 16 pairs of bfloat16, or of 16 float32. One instruction adds the product of two tiles of pairs to
// one of sums. Pairs run along the inner dimension k: a left factor (m × k) is tiles of (m × k / 2) pairs, a right factor
// (k × n) is tiles of (k / 2 × n) pairs, both with their tiles along k side by side, and zeros beyond m, n and k.

#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <utility>
#include <vector>

#include "vectors.h"

#if defined(__AVX512F__) && defined(__linux__) && __has_include(<amxbf16intrin.h>)
#define APPROX_ATTN_TILES 1
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

struct alignas(64) Tile {
  Lanes rows[16];
};

constexpr int64_t kDepth = 32;  // numbers along k in a tile

enum class Factor { kLeft, kRight };

inline int64_t tiles_along(int64_t n, int64_t size) { return (n + size - 1) / size; }

#ifndef APPROX_ATTN_TILES

constexpr bool kTiles = false;
inline bool tiles_available() { return false; }

struct TileState {
  explicit TileState(bool) {}
};

// Named where kTiles is false, never called.
template <Factor factor, bool transposed, typename Row>
void to_tiles(int64_t, int64_t, const Row&, Tile*) {}
inline void to_bfloat16(const float*, int64_t, void*) {}
inline void multiply_tiles(int64_t, int64_t, int64_t, const Tile*, const Tile*, bool, float*, int64_t) {}
template <bool a_transposed, bool b_transposed>
void multiply(int64_t, int64_t, int64_t, const float*, int64_t, const float*, int64_t, bool, float*, int64_t) {}

#else

constexpr bool kTiles = true;

// For processors that have all this, in a library that runs on those without.
#define TILES __attribute__((target("amx-tile,amx-bf16,avx512bf16,avx512bw")))

// Whether the processor has tiles and the system lets this process use them.
inline bool tiles_available() {
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  static const bool available = __builtin_cpu_supports("amx-bf16") && __builtin_cpu_supports("avx512bf16") &&
      syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  return available;
}

// The tiles of a thread are whole ones while this lives.
class TileState {
 public:
  TILES explicit TileState(bool used) : used_(used) {
    struct alignas(64) {
      uint8_t palette = 1, first_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } config;
    if (used_) asm volatile("ldtilecfg %0" : : "m"(config));
  }
  TILES ~TileState() {
    if (used_) asm volatile("tilerelease");
  }

 private:
  bool used_;
};

// -- from rows of float32 to tiles ----------------------------------------------------------------------------------------

inline __mmask16 first_lanes(int64_t n) { return n >= 16 ? 0xFFFF : n <= 0 ? 0 : (1u << n) - 1; }

// 16 rows of 32 numbers, pairs along the rows; zeros beyond `rows` and `columns`.
template <typename Row>
TILES inline void pairs_along(const Row& row, int64_t rows, int64_t columns, Lanes* to) {
  const __mmask16 low = first_lanes(columns), high = first_lanes(columns - 16);
  for (int i = 0; i < 16; ++i) {
    if (i >= rows) {
      to[i] = Lanes{};
      continue;
    }
    const float* x = row(i);
    to[i] = reinterpret_cast<Lanes>(_mm512_cvtne2ps_pbh(_mm512_maskz_loadu_ps(high, x + 16), _mm512_maskz_loadu_ps(low, x)));
  }
}

// 32 rows of 16 numbers, pairs of rows.
template <typename Row>
TILES inline void pairs_across(const Row& row, int64_t rows, int64_t columns, Lanes* to) {
  const __mmask16 mask = first_lanes(columns);
  alignas(64) constexpr auto kOrder = [] {
    std::array<uint16_t, 32> order{};
    for (int i = 0; i < 32; ++i) order[i] = i / 2 + i % 2 * 16;
    return order;
  }();
  const __m512i order = _mm512_load_si512(kOrder.data());
  for (int i = 0; i < 16; ++i) {
    if (2 * i >= rows) {
      to[i] = Lanes{};
      continue;
    }
    const __m512 even = _mm512_maskz_loadu_ps(mask, row(2 * i));
    const __m512 odd = 2 * i + 1 < rows ? _mm512_maskz_loadu_ps(mask, row(2 * i + 1)) : _mm512_setzero_ps();
    const __m512i both = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(odd, even));
    to[i] = reinterpret_cast<Lanes>(_mm512_permutexvar_epi16(order, both));
  }
}

// n numbers, in whole vectors
TILES void to_bfloat16(const float* x, int64_t n, void* to) {
  for (int64_t i = 0; i < n; i += kLanes) {
    const __m256bh y = _mm512_cvtneps_pbh(_mm512_loadu_ps(x + i));
    std::memcpy(static_cast<char*>(to) + 2 * i, &y, sizeof(y));
  }
}

// Of x and y, `width` rows apart: the lanes of x where y's would go, and those of y where x's would.
template <int width, size_t... lane>
inline void exchange(Lanes& x, Lanes& y, std::index_sequence<lane...>) {
  const Lanes first = {static_cast<int32_t>(lane & width ? lane - width + 16 : lane)...};
  const Lanes second = {static_cast<int32_t>(lane & width ? lane + 16 : lane + width)...};
  const Lanes old = x;
  x = __builtin_shuffle(old, y, first), y = __builtin_shuffle(old, y, second);
}

template <int width>
inline void exchange_all(Lanes* x) {
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i)
    if (!(i & width)) exchange<width>(x[i], x[i + width], std::make_index_sequence<16>());
}

inline void transpose(Lanes* x) { exchange_all<8>(x), exchange_all<4>(x), exchange_all<2>(x), exchange_all<1>(x); }

// A factor of `outer` rows (left) or columns (right) and k numbers along the inner dimension, from rows of a matrix that has
// it so, or transposed. `row(i)` is where row i of the matrix begins.
template <Factor factor, bool transposed, typename Row>
TILES void to_tiles(int64_t outer, int64_t k, const Row& row, Tile* to) {
  for (int64_t i = 0; i < outer; i += 16)
    for (int64_t x = 0; x < k; x += kDepth, ++to) {
      Lanes rows[16];
      if constexpr ((factor == Factor::kLeft) != transposed)
        pairs_along([&](int64_t y) { return row(i + y) + x; }, outer - i, k - x, rows);
      else
        pairs_across([&](int64_t y) { return row(x + y) + i; }, k - x, outer - i, rows);
      if constexpr (transposed) transpose(rows);
      for (int y = 0; y < 16; ++y) to->rows[y] = rows[y];
    }
}

// -- products of tiles ----------------------------------------------------------------------------------------------------

// Up to two by two tiles of sums; `stride`: floats between their rows.
template <bool two_rows, bool two_columns>
TILES inline void multiply_block(int64_t depth, const Tile* a, const Tile* b, bool add, float* c, int64_t stride) {
  const int64_t bytes = stride * sizeof(float);
  if (add) {
    _tile_loadd(0, c, bytes);
    if constexpr (two_columns) _tile_loadd(1, c + 16, bytes);
    if constexpr (two_rows) _tile_loadd(2, c + 16 * stride, bytes);
    if constexpr (two_rows && two_columns) _tile_loadd(3, c + 16 * stride + 16, bytes);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t x = 0; x < depth; ++x) {
    _tile_loadd(4, a + x, 64);
    _tile_loadd(6, b + x, 64);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (two_rows) _tile_loadd(5, a + depth + x, 64);
    if constexpr (two_columns) _tile_loadd(7, b + depth + x, 64);
    if constexpr (two_columns) _tile_dpbf16ps(1, 4, 7);
    if constexpr (two_rows) _tile_dpbf16ps(2, 5, 6);
    if constexpr (two_rows && two_columns) _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, c, bytes);
  if constexpr (two_columns) _tile_stored(1, c + 16, bytes);
  if constexpr (two_rows) _tile_stored(2, c + 16 * stride, bytes);
  if constexpr (two_rows && two_columns) _tile_stored(3, c + 16 * stride + 16, bytes);
}

TILES inline void multiply_block(
    bool two_rows, bool two_columns, int64_t depth, const Tile* a, const Tile* b, bool add, float* c, int64_t stride) {
  asm volatile("" ::: "memory");  // the compiler does not know what the instructions on tiles read and write
  if (two_rows && two_columns) multiply_block<true, true>(depth, a, b, add, c, stride);
  else if (two_rows) multiply_block<true, false>(depth, a, b, add, c, stride);
  else if (two_columns) multiply_block<false, true>(depth, a, b, add, c, stride);
  else multiply_block<false, false>(depth, a, b, add, c, stride);
  asm volatile("" ::: "memory");
}

// c (m × n) = a · b, or c + a · b
TILES void multiply_tiles(
    int64_t m, int64_t n, int64_t k, const Tile* a, const Tile* b, bool add, float* c, int64_t stride) {
  const int64_t depth = tiles_along(k, kDepth);
  alignas(64) float edge[32 * 32];
  for (int64_t j = 0; j < n; j += 32)
    for (int64_t i = 0; i < m; i += 32) {
      const int64_t rows = std::min<int64_t>(m - i, 32), columns = std::min<int64_t>(n - j, 32);
      const Tile *x = a + i / 16 * depth, *y = b + j / 16 * depth;
      float* to = c + i * stride + j;
      if (rows % 16 == 0 && columns % 16 == 0) {
        multiply_block(rows > 16, columns > 16, depth, x, y, add, to, stride);
        continue;
      }
      multiply_block(rows > 16, columns > 16, depth, x, y, false, edge, 32);
      for (int64_t row = 0; row < rows; ++row)
        for (int64_t column = 0; column < columns; ++column)
          to[row * stride + column] = (add ? to[row * stride + column] : 0.0f) + edge[row * 32 + column];
    }
}

// c (m × n) = a · b (+ c), of row-major matrices, or transposed ones.
template <bool a_transposed, bool b_transposed>
TILES void multiply(
    int64_t m, int64_t n, int64_t k, const float* a, int64_t a_stride, const float* b, int64_t b_stride, bool add, float* c,
    int64_t stride) {
  static thread_local std::vector<Tile> left, right;
  const size_t depth = tiles_along(k, kDepth), lefts = tiles_along(m, 16) * depth, rights = tiles_along(n, 16) * depth;
  if (left.size() < lefts) left.resize(lefts);
  if (right.size() < rights) right.resize(rights);
  to_tiles<Factor::kLeft, a_transposed>(m, k, [&](int64_t i) { return a + i * a_stride; }, left.data());
  to_tiles<Factor::kRight, b_transposed>(n, k, [&](int64_t i) { return b + i * b_stride; }, right.data());
  multiply_tiles(m, n, k, left.data(), right.data(), add, c, stride);
}

#endif

}  // namespace
