// Products of row-major matrices: c (m × n) = a · b + beta · c.

#pragma once

#include "tiles.h"
#include "vectors.h"

// Column-major, as every BLAS has it; PyTorch's library exports the one that it was built with.
extern "C" void sgemm_(
    const char*, const char*, const int*, const int*, const int*, const float*, const float*, const int*, const float*,
    const int*, const float*, float*, const int*);

namespace {

void gemm(
    char a_order, char b_order, int64_t m, int64_t n, int64_t k, const float* a, int64_t a_stride, const float* b,
    int64_t b_stride, bool add, float* c, int64_t c_stride) {
  if (m == 0 || n == 0 || k == 0) return;
  const int rows = m, columns = n, inner = k, lda = a_stride, ldb = b_stride, ldc = c_stride;
  const float one = 1.0f, beta = add;
  sgemm_(&b_order, &a_order, &columns, &rows, &inner, &one, b, &ldb, a, &lda, &beta, c, &ldc);
}

// `rows` rows of a, `vectors` vectors of columns of b.
template <int rows, int vectors>
inline void product_tile(
    int64_t k, const float* a, int64_t a_stride, const float* b, int64_t b_stride, bool add, float* c, int64_t c_stride) {
  Vector sums[rows][vectors] = {};
  for (int64_t x = 0; x < k; ++x, b += b_stride)
    for (int i = 0; i < rows; ++i)
      for (int w = 0; w < vectors; ++w) sums[i][w] += a[i * a_stride + x] * load(b + w * kLanes);
  for (int i = 0; i < rows; ++i)
    for (int w = 0; w < vectors; ++w) {
      float* to = c + i * c_stride + w * kLanes;
      store(to, add ? load(to) + sums[i][w] : sums[i][w]);
    }
}

// a (m × k) · b (k × n): the BLAS is not made for few columns. `narrow`, here and below: of factors rounded to bfloat16.
void product(
    bool narrow, int64_t m, int64_t n, int64_t k, const float* a, int64_t a_stride, const float* b, int64_t b_stride,
    bool add, float* c, int64_t c_stride) {
  if constexpr (kTiles)
    if (narrow) return multiply<false, false>(m, n, k, a, a_stride, b, b_stride, add, c, c_stride);
  if (n % kLanes) return gemm('N', 'N', m, n, k, a, a_stride, b, b_stride, add, c, c_stride);
  const auto columns = [&](auto vectors, int64_t j) {
    int64_t i = 0;
    const auto tiles = [&](auto rows) {
      for (; i + rows <= m; i += rows)
        product_tile<rows, vectors>(k, a + i * a_stride, a_stride, b + j, b_stride, add, c + i * c_stride + j, c_stride);
    };
    tiles(std::integral_constant<int, 6>()), tiles(std::integral_constant<int, 4>()), tiles(std::integral_constant<int, 1>());
  };
  int64_t j = 0;
  for (; j + 4 * kLanes <= n; j += 4 * kLanes) columns(std::integral_constant<int, 4>(), j);
  for (; j + 2 * kLanes <= n; j += 2 * kLanes) columns(std::integral_constant<int, 2>(), j);
  for (; j < n; j += kLanes) columns(std::integral_constant<int, 1>(), j);
}

// a (m × k) · b (n × k)ᵀ
void product_bt(
    bool narrow, int64_t m, int64_t n, int64_t k, const float* a, int64_t a_stride, const float* b, int64_t b_stride,
    bool add, float* c, int64_t c_stride) {
  if constexpr (kTiles)
    if (narrow) return multiply<false, true>(m, n, k, a, a_stride, b, b_stride, add, c, c_stride);
  gemm('N', 'T', m, n, k, a, a_stride, b, b_stride, add, c, c_stride);
}

// a (k × m)ᵀ · b (k × n)
void product_at(
    bool narrow, int64_t m, int64_t n, int64_t k, const float* a, int64_t a_stride, const float* b, int64_t b_stride,
    bool add, float* c, int64_t c_stride) {
  if constexpr (kTiles)
    if (narrow) return multiply<true, false>(m, n, k, a, a_stride, b, b_stride, add, c, c_stride);
  gemm('T', 'N', m, n, k, a, a_stride, b, b_stride, add, c, c_stride);
}

}  // namespace
