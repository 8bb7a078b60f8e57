// One block of queries: its scores of far clusters and near keys.

#pragma once

#include <algorithm>
#include <vector>

#include "clusters.h"

namespace {

constexpr float kSpreadLimit = 2.0f;  // SPREAD_LIMIT of kernels/cluster_torch.py

// Logits of `rows` queries (d numbers, and f products of coordinates, each) and the kPanel clusters of a panel, and the
// part of them that the spread is, before its limit. `stride`: between rows of the results.
template <int rows>
inline void logits_tile(
    const float* query, int64_t d, const float* pairs, int64_t f, const float* panel, float* logits, float* bonus,
    int64_t stride) {
  constexpr int vectors = kPanel / kLanes;
  Vector sums[rows][vectors] = {}, spreads[rows][vectors] = {};
  for (int64_t x = 0; x < d; ++x, panel += kPanel)
    for (int i = 0; i < rows; ++i)
      for (int w = 0; w < vectors; ++w) sums[i][w] += query[i * d + x] * load(panel + w * kLanes);
  for (int64_t x = 0; x < f; ++x, panel += kPanel)
    for (int i = 0; i < rows; ++i)
      for (int w = 0; w < vectors; ++w) spreads[i][w] += pairs[i * f + x] * load(panel + w * kLanes);
  const Vector limit = Vector{} + kSpreadLimit;
  for (int i = 0; i < rows; ++i)
    for (int w = 0; w < vectors; ++w) {
      const Vector spread = spreads[i][w], added = spread < limit ? spread : limit;
      store(logits + i * stride + w * kLanes, sums[i][w] + added + load(panel + w * kLanes));
      if (f) store(bonus + i * stride + w * kLanes, spread);
    }
}

// -- weights of a block of queries ---------------------------------------------------------------------------------------

struct Range {
  int64_t first, last;
  int64_t size() const { return std::max<int64_t>(last - first, 0); }
};

// One block of queries of one head, and the arrays of its scores, rows of queries each.
struct Block {
  const Problem* p = nullptr;
  int64_t head, first, count;  // of the queries
  Range far, near[2];          // clusters; keys before and after the far runs, by position: what follows a query moves none
  int64_t base, width;         // the first cluster in the rows of far_weights, and how many there are: whole panels
  int64_t own;                 // clusters per query
  std::vector<Tile> left_, spread_left_;
  std::vector<float> parts_, queries_, keys_, coordinates_, pairs_, far_, bonus_, near_;
  const float* queries;        // (count, d), from scores() on
  float *coordinates, *pairs;  // (count, r), (count, f): aₓ·a_y
  float *far_weights, *bonus, *near_weights;  // (count, width) twice, (count, near)

  int64_t row() const { return head * p->n_q + first; }  // of the first query among all
  int64_t near_size() const { return near[0].size() + near[1].size(); }

  void place(const Problem& problem, int64_t task) {
    p = &problem;
    head = task / p->Q;
    const int64_t block = task % p->Q, aligned = (p->offset >= 0 ? p->offset : p->offset - p->R + 1) / p->R * p->R;
    const int64_t start = aligned + block * p->R - p->offset;
    first = std::max<int64_t>(start, 0), count = std::min(start + p->R, p->n_q) - first;
    const int64_t* plan = p->plan + ((p->plan_samples == 1 ? 0 : head / p->h) * p->Q + block) * 5;
    far = {plan[0] * p->per_run(), plan[1] * p->per_run()};
    near[0] = {plan[2] * p->R, std::min(plan[0] * p->R, p->n)}, near[1] = {plan[1] * p->R, std::min(plan[3] * p->R, p->n)};
    own = plan[4];
    base = far.first / kPanel * kPanel;
    width = far.size() ? (far.last + kPanel - 1) / kPanel * kPanel - base : 0;
    coordinates = resized(coordinates_, count * p->s()), pairs = resized(pairs_, count * p->f());
    far_weights = resized(far_, count * width), bonus = resized(bonus_, count * width);
    near_weights = resized(near_, count * near_size());
  }

  // Scores of all far clusters and of the near keys, not yet of own clusters.
  void scores(const Clusters& clusters) {
    const int64_t f = p->f(), r = p->r;
    queries = p->query.read(row() * p->d, count * p->d, queries_);
    const float* map = p->query_map + head % p->h * p->d * p->s();
    product(false, count, p->s(), p->d, queries, p->d, map, p->s(), false, coordinates, p->s());
    for (int64_t i = 0; f && i < count; ++i) {
      const float* a = coordinates + i * p->s();
      float* to = pairs + i * f;
      for (int64_t x = 0; x < r; ++x)
        for (int64_t y = x; y < r; ++y) *to++ = a[x] * a[y];
    }
    if (p->narrow) {
      narrow_logits(clusters);
    } else {
      logits(clusters);
    }
    for (int64_t i = 0; width && i < count; ++i) {  // what whole panels have beside the far clusters: chosen after empty ones
      float* x = far_weights + i * width;
      std::fill(x, x + far.first - base, 2 * kLowest), std::fill(x + far.last - base, x + width, 2 * kLowest);
    }
    int64_t column = 0;
    for (const Range& range : near) {
      if (!range.size()) continue;
      product_bt(
          p->narrow, count, range.size(), p->d, queries, p->d,
          p->keys(head, range.first, range.size(), keys_), p->d, false, near_weights + column, near_size());
      close(range, near_weights + column);
      column += range.size();
    }
  }

  void logits(const Clusters& clusters) const {
    const int64_t f = p->f();
    for (int64_t c = 0; c < width; c += kPanel) {
      const float* panel = clusters.panels.wide + (head * p->panels() + (base + c) / kPanel) * (p->d + f + 1) * kPanel;
      constexpr int kRows = 6;
      const int64_t step = count < kRows ? 1 : kRows;
      for (int64_t start = 0; start < count; start += step) {
        const int64_t i = std::min(start, count - step);  // the last rows twice where they do not fill a tile
        const auto tile = step == 1 ? logits_tile<1> : logits_tile<kRows>;
        tile(queries + i * p->d, p->d, pairs + i * f, f, panel, far_weights + i * width + c, bonus + i * width + c, width);
      }
    }
  }

  void narrow_logits(const Clusters& clusters) {
    const int64_t f = p->f(), d = p->d, rows = rounded(count), groups = rows / 16;
    Tile* left = resized(left_, groups * tiles_along(3 * d, kDepth));
    Tile* spread_left = resized(spread_left_, groups * tiles_along(3 * f, kDepth));
    split_to_tiles<Factor::kLeft>(queries, count, d, parts_, left);
    split_to_tiles<Factor::kLeft>(pairs, count, f, parts_, spread_left);
    float *x = resized(parts_, 2 * rows * kPanel), *spreads = x + rows * kPanel;
    for (int64_t c = 0; c < width; c += kPanel) {
      const int64_t panel = head * p->panels() + (base + c) / kPanel;
      const Tile *centre = clusters.panels.centre + panel * panel_tiles(d), *spread = clusters.panels.spread + panel * panel_tiles(f);
      if constexpr (kTiles) {
        multiply_tiles(rows, kPanel, 3 * d, left, centre, false, x, kPanel);
        multiply_tiles(rows, kPanel, 3 * f, spread_left, spread, false, spreads, kPanel);
      }
      add_up(x, spreads, clusters.panels.log_count + panel * kPanel, far_weights + c, bonus + c);
    }
  }

  // Logits of a panel from their parts, of which the spread is kept too.
  void add_up(const float* x, const float* spreads, const float* log_counts, float* logits, float* bonuses) const {
    const Vector limit = Vector{} + kSpreadLimit;
    for (int64_t i = 0; i < count; ++i, x += kPanel, spreads += kPanel, logits += width, bonuses += width)
      for (int64_t c = 0; c < kPanel; c += kLanes) {
        const Vector spread = load(spreads + c);
        store(bonuses + c, spread);
        store(logits + c, load(x + c) + load(log_counts + c) + (spread < limit ? spread : limit));
      }
  }

  void close(const Range& range, float* x) {
    for (int64_t i = 0; i < count; ++i, x += near_size()) {
      const int64_t position = first + i + p->offset;
      const int64_t last = p->causal ? position : p->window ? position + p->window - 1 : p->n;
      const int64_t least = p->window ? position - p->window + 1 : 0;
      for (int64_t j = range.first; j < range.last; ++j)
        if (j < least || j > last || !p->open(head, j)) x[j - range.first] = kLowest;
    }
  }

  uint32_t cluster_id(int64_t cluster) const { return p->n + cluster; }

  // What dropout leaves of the weights of a query.
  void drop(int64_t i) const {
    const int64_t row = this->row() + i;
    p->dropout.drop(far_weights + i * width, width, row, [&](int64_t c) { return cluster_id(base + c); });
    int64_t column = i * near_size();
    for (const Range& range : near) {
      p->dropout.drop(near_weights + column, range.size(), row, [&](int64_t j) { return range.first + j; });
      column += range.size();
    }
  }

  void leave_out(int64_t i, const int32_t* chosen) const {
    for (int64_t m = 0; m < own; ++m) far_weights[i * width + chosen[m] - base] = kLowest;
  }
};

}  // namespace
