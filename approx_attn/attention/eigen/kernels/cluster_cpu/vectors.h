// Vectors of 16 numbers, and what is computed with them: exponentials, sums, rows of few features, comparisons.

#pragma once

#ifdef __AVX512F__
#include <immintrin.h>
#endif

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>

namespace {

constexpr int64_t kLanes = 16;
constexpr float kLowest = std::numeric_limits<float>::lowest() / 4;

int64_t rounded(int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }

typedef float Vector __attribute__((vector_size(64), aligned(4), may_alias));
typedef int32_t Lanes __attribute__((vector_size(64)));

inline Vector load(const float* x) { return *reinterpret_cast<const Vector*>(x); }
inline void store(float* x, Vector y) { *reinterpret_cast<Vector*>(x) = y; }

// exp(x) for x <= 0, as 2^n · 2^f with a polynomial for 2^f; relative error below 3e-7. A call of the library's
// exponential would keep the compiler from using vectors.
inline float exp_nonpositive(float exponent) {
  const float x = std::max(exponent, -87.0f) * 1.44269504088896f;
  const float n = std::floor(x + 0.5f);
  const float f = x - n;
  float p = 1.535336188319500e-4f;
  p = p * f + 1.339887440266574e-3f;
  p = p * f + 9.618437357674640e-3f;
  p = p * f + 5.550332471162809e-2f;
  p = p * f + 2.402264791363012e-1f;
  p = p * f + 6.931472028550421e-1f;
  p = p * f + 1.0f;
  const int32_t bits = (static_cast<int32_t>(n) + 127) << 23;
  float power;
  std::memcpy(&power, &bits, sizeof(power));
  // Exactly zero where it is closed: numbers below the normal ones would slow all products down.
  return exponent <= -87.0f ? 0.0f : p * power;
}

// Square roots of positive numbers to a relative 1e-7, about zero for others; the processor's own take twice as long.
inline Vector square_root(Vector x) {
  const Vector least = Vector{} + 1e-30f;
  x = x > least ? x : least;
#ifdef __AVX512F__
  const Vector y = reinterpret_cast<Vector>(_mm512_rsqrt14_ps(reinterpret_cast<__m512>(x)));
  return x * y * (1.5f - 0.5f * x * y * y);
#else
  for (int i = 0; i < kLanes; ++i) x[i] = std::sqrt(x[i]);
  return x;
#endif
}

inline float maximum(const float* x, int64_t n) {
  float highest = kLowest;
#pragma omp simd reduction(max : highest)
  for (int64_t i = 0; i < n; ++i) highest = x[i] > highest ? x[i] : highest;  // std::max would not use vectors
  return highest;
}

// What the weights of a query without a usable score are: nothing, or not a number where a score is none either.
inline float no_weight(const float* x, int64_t n) {
  return std::any_of(x, x + n, [](float score) { return std::isnan(score); }) ? NAN : 0.0f;
}

// Turns x into exp(x − highest); returns the sum of these.
inline float exponentials(float* x, int64_t n, float highest) {
  float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) {
    x[i] = exp_nonpositive(x[i] - highest);
    sum += x[i];
  }
  return sum;
}

inline float dot(const float* x, const float* y, int64_t n) {
  float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) sum += x[i] * y[i];
  return sum;
}

// Two vectors of groups of `width` lanes into one of groups of half the width: each group's halves are added.
template <int width, size_t... lane>
inline Vector fold(Vector x, Vector y, std::index_sequence<lane...>) {
  constexpr int half = width / 2;
  const Lanes low = {static_cast<int32_t>((lane / half) % 2 * 16 + lane / width * width + lane % half)...};
  return __builtin_shuffle(x, y, low) + __builtin_shuffle(x, y, low + half);
}

// Products of `group` rows x with 16 / group rows from y on (of n numbers each; the last of `rows` again where there are
// fewer), by x and then by y.
template <int width, int group>
inline Vector dots(const float* const* x, const float* y, int64_t rows, int64_t n) {
  const int64_t w = width ? width : n / kLanes;
  constexpr int size = 16 / group;
  Vector sums[16];
  for (int g = 0; g < group; ++g) {
    for (int j = 0; j < size; ++j) {
      const float* row = y + (j < rows ? j : rows - 1) * n;
      Vector sum = load(x[g]) * load(row);
      for (int64_t i = 1; i < w; ++i) sum += load(x[g] + 16 * i) * load(row + 16 * i);
      sums[g * size + j] = sum;
    }
  }
  constexpr auto lanes = std::make_index_sequence<16>();
  for (int j = 0; j < 8; ++j) sums[j] = fold<16>(sums[j], sums[j + 8], lanes);
  for (int j = 0; j < 4; ++j) sums[j] = fold<8>(sums[j], sums[j + 4], lanes);
  for (int j = 0; j < 2; ++j) sums[j] = fold<4>(sums[j], sums[j + 2], lanes);
  return fold<2>(sums[0], sums[1], lanes);
}

// to += Σ_j weights(j) · row(j), all of n numbers
template <int width, typename Weights, typename Rows>
inline void add_rows(float* to, int64_t count, int64_t n, const Weights& weights, const Rows& row) {
  if constexpr (width > 0) {
    Vector sums[width];
    for (int i = 0; i < width; ++i) sums[i] = load(to + 16 * i);
    for (int64_t j = 0; j < count; ++j) {
      const float weight = weights(j);
      const float* x = row(j);
      for (int i = 0; i < width; ++i) sums[i] += weight * load(x + 16 * i);
    }
    for (int i = 0; i < width; ++i) store(to + 16 * i, sums[i]);
  } else {
    for (int64_t j = 0; j < count; ++j)
      for (int64_t i = 0; i < n; i += 16) store(to + i, load(to + i) + weights(j) * load(row(j) + i));
  }
}

// Bit i says whether x[i] reaches `least` (is above it), for 16 numbers.
inline uint32_t reaching(const float* x, float least) {
#ifdef __AVX512F__
  return _mm512_cmp_ps_mask(_mm512_loadu_ps(x), _mm512_set1_ps(least), _CMP_GE_OQ);
#else
  uint32_t bits = 0;
  for (int i = 0; i < 16; ++i) bits |= static_cast<uint32_t>(x[i] >= least) << i;
  return bits;
#endif
}

inline uint32_t above(const float* x, float least) {
#ifdef __AVX512F__
  return _mm512_cmp_ps_mask(_mm512_loadu_ps(x), _mm512_set1_ps(least), _CMP_GT_OQ);
#else
  uint32_t bits = 0;
  for (int i = 0; i < 16; ++i) bits |= static_cast<uint32_t>(x[i] > least) << i;
  return bits;
#endif
}

// Writes those of 16 numbers that reach `least`, and their places from `first` on, before others; returns how many do.
inline int64_t pick(const float* x, float least, int32_t first, float* values, int32_t* places) {
#ifdef __AVX512F__
  const Lanes lanes = first + Lanes{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  const __mmask16 mask = reaching(x, least);
  _mm512_storeu_ps(values, _mm512_maskz_compress_ps(mask, _mm512_loadu_ps(x)));
  _mm512_storeu_si512(places, _mm512_maskz_compress_epi32(mask, reinterpret_cast<__m512i>(lanes)));
  return __builtin_popcount(mask);
#else
  int64_t found = 0;
  for (int i = 0; i < 16; ++i)
    if (x[i] >= least) values[found] = x[i], places[found++] = first + i;
  return found;
#endif
}

// How many of 16 or 32 numbers are higher than each of them, or as high and before it: as numbers below zero.
template <int vectors>
inline void ranks(const float* x, float* rank) {
  for (int w = 0; w < vectors; ++w) {
    const Vector mine = load(x + w * kLanes);
    Lanes count = {};
    for (int j = 0; j < vectors * kLanes; ++j) {
      const Vector other = Vector{} + x[j];
      const Lanes lanes = w * 16 + Lanes{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
      count += (other > mine) | ((other == mine) & (lanes > j));
    }
    store(rank + w * kLanes, __builtin_convertvector(count, Vector));
  }
}

// How many of n numbers come before number i in ascending order, equal ones by place. Read in whole vectors.
inline int64_t before(const float* x, int64_t n, int64_t i) {
  int64_t count = 0;
  for (int64_t j = 0; j < n; j += kLanes) {
    const uint32_t lower = ~reaching(x + j, x[i]) & 0xFFFF, equal = reaching(x + j, x[i]) & ~above(x + j, x[i]);
    const uint32_t earlier = j > i ? 0 : i - j >= kLanes ? 0xFFFF : (1u << (i - j)) - 1;
    count += __builtin_popcount(lower | (equal & earlier));
  }
  return count;
}

// Calls `body` with the number of vectors in a row as a constant where it is a usual one, else with 0.
template <typename Body>
inline void by_width(int64_t vectors, const Body& body) {
  if (vectors == 1) return body(std::integral_constant<int, 1>());
  if (vectors == 2) return body(std::integral_constant<int, 2>());
  if (vectors == 4) return body(std::integral_constant<int, 4>());
  if (vectors == 8) return body(std::integral_constant<int, 8>());
  body(std::integral_constant<int, 0>());
}

// Calls `body` with how many queries fill a vector with their products with the keys of a cluster.
template <typename Body>
inline void by_group(int64_t cluster, const Body& body) {
  if (cluster == 8) return body(std::integral_constant<int, 2>());
  if (cluster == 4) return body(std::integral_constant<int, 4>());
  if (cluster == 2) return body(std::integral_constant<int, 8>());
  if (cluster == 1) return body(std::integral_constant<int, 16>());
  body(std::integral_constant<int, 1>());
}

}  // namespace
