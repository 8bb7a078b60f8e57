// The clusters that queries chose for themselves: scores of their keys, and products with these.

#pragma once

#include <algorithm>
#include <vector>

#include "clusters.h"

namespace {

constexpr int64_t kTogether = 8;  // blocks of queries that visit their own clusters together

// The pairs of some queries of one head and their own clusters, and their scores. More queries than a block has, so that
// the keys of a cluster are fetched once for many of them: they are what does not fit into the cache of a core.
struct Own {
  const Problem* p = nullptr;
  int64_t head, count, stride;  // stride: between the rows of queries in weights
  std::vector<int32_t> owned, starts, next_, pair_queries, pair_places;  // see sort_pairs
  std::vector<float> weights_;
  float* weights;  // (count, stride)

  // chosen: (count, most), −1 where a query has fewer.
  void sort_pairs(const Problem& problem, int64_t of_head, int64_t queries, const int32_t* chosen, int64_t most) {
    p = &problem, head = of_head, count = queries, stride = rounded(most * p->L);
    const int64_t C = p->C();
    starts.assign(C + 1, 0), owned.clear();
    for (int64_t i = 0; i < count * most; ++i)
      if (chosen[i] >= 0) ++starts[chosen[i] + 1];
    for (int64_t c = 0; c < C; ++c) {
      if (starts[c + 1]) owned.push_back(c);
      starts[c + 1] += starts[c];
    }
    pair_places.resize(starts[C]), pair_queries.resize(starts[C]);
    next_.assign(starts.begin(), starts.end() - 1);
    for (int64_t i = 0; i < count; ++i)
      for (int64_t m = 0; m < most && chosen[i * most + m] >= 0; ++m) {
        const int32_t pair = next_[chosen[i * most + m]]++;
        pair_queries[pair] = i, pair_places[pair] = i * stride + m * p->L;
      }
    weights = resized(weights_, count * stride);
  }

  // Calls body(what is at `data` of the cluster, first pair, last pair) for every cluster that is somebody's own, and
  // fetches what is there of the next one: `size` of it per cluster of all heads.
  template <typename Data, typename Body>
  void for_each(Data* data, int64_t size, const Body& body) const {
    data += head * p->C() * size;
    for (size_t c = 0; c < owned.size(); ++c) {
      if (c + 1 < owned.size()) {
        const char* next = reinterpret_cast<const char*>(data + owned[c + 1] * size);
        for (size_t i = 0; i < size * sizeof(Data); i += 64) __builtin_prefetch(next + i);
      }
      body(data + owned[c] * size, starts[owned[c]], starts[owned[c] + 1]);
    }
  }

  // Calls body(place in the row of weights, members) for every own cluster of one query.
  template <typename Body>
  void for_each_of(const int32_t* chosen, int64_t most, const Clusters& clusters, const Body& body) const {
    for (int64_t m = 0; m < most && chosen[m] >= 0; ++m)
      body(m * p->L, clusters.members + (head * p->C() + chosen[m]) * p->L);
  }

  // Products of rows of queries (n numbers each) with the rows of their own clusters, to the places of the pairs in `to`.
  void products(const float* queries, const Sorted& sorted, int64_t n, float* to) {
    if constexpr (kTiles)
      if (p->narrow) return narrow_products(queries, sorted.for_scores, n, to);
    by_width(n / kLanes, [&](auto width) {
      by_group(p->L, [&](auto group) {
        constexpr int64_t size = kLanes / group;
        alignas(64) float found[kLanes];
        const float* x[group];
        for_each(sorted.rows, p->L * n, [&](const float* row, int64_t first, int64_t last) {
          for (int64_t pair = first; pair < last; pair += group) {
            const int64_t pairs = std::min<int64_t>(group, last - pair);
            for (int64_t g = 0; g < group; ++g) x[g] = queries + pair_queries[pair + std::min(g, pairs - 1)] * n;
            for (int64_t l = 0; l < p->L; l += size) {
              const Vector all = dots<width, group>(x, row + l * n, p->L - l, n);
              if (group == 1 && l + size <= p->L) {
                store(to + pair_places[pair] + l, all);
                continue;
              }
              store(found, all);
              const int64_t keys = std::min(size, p->L - l);
              for (int64_t g = 0; g < pairs; ++g)
                for (int64_t j = 0; j < keys; ++j) to[pair_places[pair + g] + l + j] = found[g * size + j];
            }
          }
        });
      });
    });
  }

  void scores(const float* queries, const Clusters& clusters) {
    std::fill(weights, weights + count * stride, kLowest);
    products(queries, clusters.key, p->d, weights);
    if (!p->key_open && p->n % p->R == 0) return;
    for_each(clusters.members, p->L, [&](const int32_t* members, int64_t first, int64_t last) {
      for (int64_t l = 0; l < p->L; ++l)
        for (int64_t pair = first; members[l] < 0 && pair < last; ++pair) weights[pair_places[pair] + l] = kLowest;
    });
  }

  // to (count, n): each query's row += its weights (laid out as `weights` is) times the rows of its own clusters.
  void add_products(const float* x, const Sorted& sorted, int64_t n, float* to) {
    if constexpr (kTiles)
      if (p->narrow) return narrow_add_products(x, sorted.for_sums, n, to);
    by_width(n / kLanes, [&](auto width) {
      for_each(sorted.rows, p->L * n, [&](const float* row, int64_t first, int64_t last) {
        for (int64_t pair = first; pair < last; ++pair)
          add_rows<width>(
              to + pair_queries[pair] * n, p->L, n, [&](int64_t l) { return x[pair_places[pair] + l]; },
              [&](int64_t l) { return row + l * n; });
      });
    });
  }

  // to (C, L, n) of this head: each key's row += its weights times the rows (n numbers) of the queries.
  void add_transposed(const float* x, const float* queries, int64_t n, float* to) {
    if constexpr (kTiles)
      if (p->narrow) return narrow_add_transposed(x, queries, n, to);
    by_width(n / kLanes, [&](auto width) {
      for_each(to - head * p->C() * p->L * n, p->L * n, [&](float* row, int64_t first, int64_t last) {
        for (int64_t l = 0; l < p->L; ++l)
          add_rows<width>(
              row + l * n, last - first, n, [&](int64_t pair) { return x[pair_places[first + pair] + l]; },
              [&](int64_t pair) { return queries + pair_queries[first + pair] * n; });
      });
    });
  }

 private:
  // The same three of bfloat16, for up to kPairs pairs of a cluster at a time.
  static constexpr int64_t kPairs = 32;
  std::vector<Tile> left_, right_;
  std::vector<float> found_;

  void narrow_products(const float* queries, const Tile* rows, int64_t n, float* to) {
    const int64_t columns = rounded(p->L);
    Tile* left = resized(left_, 2 * tiles_along(n, kDepth));
    float* found = resized(found_, kPairs * columns);
    for_each(rows, score_tiles(*p, n), [&](const Tile* right, int64_t first, int64_t last) {
      for (; first < last; first += kPairs) {
        const int64_t pairs = std::min(last - first, kPairs);
        to_tiles<Factor::kLeft, false>(pairs, n, [&](int64_t i) { return queries + pair_queries[first + i] * n; }, left);
        multiply_tiles(rounded(pairs), columns, n, left, right, false, found, columns);
        for (int64_t i = 0; i < pairs; ++i) {
          float *place = to + pair_places[first + i], *x = found + i * columns;
          int64_t l = 0;
          for (; l + kLanes <= p->L; l += kLanes) store(place + l, load(x + l));
          for (; l < p->L; ++l) place[l] = x[l];
        }
      }
    });
  }

  void narrow_add_products(const float* x, const Tile* rows, int64_t n, float* to) {
    Tile* left = resized(left_, 2 * tiles_along(p->L, kDepth));
    float* found = resized(found_, kPairs * n);
    for_each(rows, sum_tiles(*p, n), [&](const Tile* right, int64_t first, int64_t last) {
      for (; first < last; first += kPairs) {
        const int64_t pairs = std::min(last - first, kPairs);
        to_tiles<Factor::kLeft, false>(pairs, p->L, [&](int64_t i) { return x + pair_places[first + i]; }, left);
        multiply_tiles(rounded(pairs), n, p->L, left, right, false, found, n);
        for (int64_t i = 0; i < pairs; ++i) {
          float* row = to + pair_queries[first + i] * n;
          for (int64_t t = 0; t < n; t += kLanes) store(row + t, load(row + t) + load(found + i * n + t));
        }
      }
    });
  }

  void narrow_add_transposed(const float* x, const float* queries, int64_t n, float* to) {
    for_each(to - head * p->C() * p->L * n, p->L * n, [&](float* rows, int64_t first, int64_t last) {
      const int64_t pairs = last - first, depth = tiles_along(pairs, kDepth);
      Tile *left = resized(left_, tiles_along(p->L, 16) * depth), *right = resized(right_, tiles_along(n, 16) * depth);
      to_tiles<Factor::kLeft, true>(p->L, pairs, [&](int64_t i) { return x + pair_places[first + i]; }, left);
      to_tiles<Factor::kRight, false>(n, pairs, [&](int64_t i) { return queries + pair_queries[first + i] * n; }, right);
      multiply_tiles(p->L, n, pairs, left, right, true, rows, n);
    });
  }
};

}  // namespace
