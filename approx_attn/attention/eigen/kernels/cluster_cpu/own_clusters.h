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

  // Calls body(cluster, first pair, last pair) for every cluster that is somebody's own, and fetches the rows (n numbers
  // per key) of the next one.
  template <typename Body>
  void for_each(const float* rows, int64_t n, const Body& body) const {
    const int64_t numbers = p->L * n;
    for (size_t c = 0; c < owned.size(); ++c) {
      if (c + 1 < owned.size()) {
        const float* next = rows + (head * p->C() + owned[c + 1]) * numbers;
        for (int64_t i = 0; i < numbers; i += kLanes) __builtin_prefetch(next + i);
      }
      body(owned[c], starts[owned[c]], starts[owned[c] + 1]);
    }
  }

  // Calls body(place in the row of weights, members) for every own cluster of one query.
  template <typename Body>
  void for_each_of(const int32_t* chosen, int64_t most, const Clusters& clusters, const Body& body) const {
    for (int64_t m = 0; m < most && chosen[m] >= 0; ++m)
      body(m * p->L, clusters.members + (head * p->C() + chosen[m]) * p->L);
  }

  // Products of rows of queries (n numbers each) with the rows of their own clusters, to the places of the pairs in `to`.
  void products(const float* queries, const float* rows, int64_t n, float* to) const {
    by_width(n / kLanes, [&](auto width) {
      by_group(p->L, [&](auto group) {
        constexpr int64_t size = kLanes / group;
        alignas(64) float found[kLanes];
        const float* x[group];
        for_each(rows, n, [&](int64_t cluster, int64_t first, int64_t last) {
          const float* row = rows + (head * p->C() + cluster) * p->L * n;
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

  void scores(const float* queries, const Clusters& clusters) const {
    std::fill(weights, weights + count * stride, kLowest);
    products(queries, clusters.key, p->d, weights);
    if (!p->key_open && p->n % p->R == 0) return;
    for_each(nullptr, 0, [&](int64_t cluster, int64_t first, int64_t last) {
      const int32_t* members = clusters.members + (head * p->C() + cluster) * p->L;
      for (int64_t l = 0; l < p->L; ++l)
        for (int64_t pair = first; members[l] < 0 && pair < last; ++pair) weights[pair_places[pair] + l] = kLowest;
    });
  }

  // to (count, n): each query's row += its weights (laid out as `weights` is) times the rows of its own clusters.
  void add_products(const float* x, const float* rows, int64_t n, float* to) const {
    by_width(n / kLanes, [&](auto width) {
      for_each(rows, n, [&](int64_t cluster, int64_t first, int64_t last) {
        const float* row = rows + (head * p->C() + cluster) * p->L * n;
        for (int64_t pair = first; pair < last; ++pair)
          add_rows<width>(
              to + pair_queries[pair] * n, p->L, n, [&](int64_t l) { return x[pair_places[pair] + l]; },
              [&](int64_t l) { return row + l * n; });
      });
    });
  }

  // to (C, L, n) of this head: each key's row += its weights times the rows (n numbers) of the queries.
  void add_transposed(const float* x, const float* queries, int64_t n, float* to) const {
    by_width(n / kLanes, [&](auto width) {
      for_each(to - head * p->C() * p->L * n, n, [&](int64_t cluster, int64_t first, int64_t last) {
        for (int64_t l = 0; l < p->L; ++l)
          add_rows<width>(
              to + (cluster * p->L + l) * n, last - first, n,
              [&](int64_t pair) { return x[pair_places[first + pair] + l]; },
              [&](int64_t pair) { return queries + pair_queries[first + pair] * n; });
      });
    });
  }
};

}  // namespace
