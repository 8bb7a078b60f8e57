// Runs of keys cut into clusters, and the moments of these.

#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <vector>

#include "problem.h"
#include "products.h"

namespace {

// Keys or values (n numbers each) in the order of the clusters, zero in empty slots: rows of float32, or what `narrow`
// products take.
struct Sorted {
  float* rows = nullptr;          // (b·h, C, L, n)
  Tile* for_scores = nullptr;     // of each cluster (n × L), a right factor
  Tile* for_sums = nullptr;       // of each cluster (L × n), a right factor
};

// What logits are computed from, of kPanel clusters side by side; for `narrow` products right factors that are split.
// Choices follow from logits: of numbers rounded to bfloat16, many would be others.
struct Panels {
  float* wide = nullptr;  // (b·h, C / kPanel, d + f + 1, kPanel): centre, spread and log_count
  Tile *centre = nullptr, *spread = nullptr;
  float* log_count = nullptr;
};

struct Clusters {  // of all heads
  int32_t* members;  // (b·h, C, L): keys, −1 in empty slots, which stand last
  Sorted key, value;
  float *centre, *moments, *spread, *log_count;  // (b·h, C, d), (b·h, C, o, v), (b·h, C, f), (b·h, C)
  Panels panels;
};

// Tiles of a panel with n numbers per cluster.
int64_t panel_tiles(int64_t n) { return kPanel / 16 * tiles_along(3 * n, kDepth); }

struct RunScratch {
  std::vector<float> coordinates, mean, deviations, along, keys, values, zeros, parts;
  std::vector<int32_t> upper;
};

// Coordinates (R × r) of the keys of a run; zeros beyond the last key.
const float* run_coordinates(const Problem& p, int64_t head, int64_t run, RunScratch& scratch) {
  float* z = resized(scratch.coordinates, p.R * p.s());
  const int64_t count = std::min(p.R, p.n - run * p.R);
  std::fill(z + count * p.s(), z + p.R * p.s(), 0.0f);
  product(
      false, count, p.s(), p.d, p.keys(head, run * p.R, count, scratch.keys), p.d, p.key_map + head % p.h * p.d * p.s(), p.s(),
      false, z, p.s());
  return z;
}

// Halves a run at the median of one coordinate after the other until clusters of L are left; empty slots go last, equal
// coordinates by position. Members of a half are those that fewer than half of its members come before: comparing all
// with all needs no branches that a processor cannot foresee, and keeps members in the order of their positions.
void cut(const Problem& p, int64_t head, int64_t run, const float* z, RunScratch& scratch, int32_t* members) {
  const int64_t R = p.R, most = (R + kLanes - 1) / kLanes * kLanes;
  constexpr float kNever = std::numeric_limits<float>::infinity();
  float* along = resized(scratch.along, most);
  scratch.upper.resize(R);
  for (int64_t j = 0; j < R; ++j) members[j] = j;
  for (int64_t size = R, axis = 0; size > p.L; size /= 2, axis = (axis + 1) % p.r) {
    for (int64_t start = 0; start < R; start += size) {
      int32_t* part = members + start;
      for (int64_t j = 0; j < size; ++j) {
        const float x = z[part[j] * p.s() + axis];
        along[j] = !p.open(head, run * R + part[j]) ? kNever : x == x ? x : 0.0f;
      }
      std::fill(along + size, along + (size + kLanes - 1) / kLanes * kLanes, kNever);
      int64_t low = 0, high = 0;
      for (int64_t j = 0; j < size; ++j) {
        if (before(along, size, j) < size / 2) {
          part[low++] = part[j];
        } else {
          scratch.upper[high++] = part[j];
        }
      }
      std::copy_n(scratch.upper.begin(), high, part + low);
    }
  }
  for (int64_t start = 0; start < R; start += p.L)  // no cut, or one cluster of open and empty slots: empty ones last
    std::stable_partition(members + start, members + start + p.L, [&](int32_t j) { return p.open(head, run * R + j); });
  for (int64_t j = 0; j < R; ++j) members[j] = p.open(head, run * R + members[j]) ? run * R + members[j] : -1;
}

int64_t score_tiles(const Problem& p, int64_t n) { return tiles_along(p.L, 16) * tiles_along(n, kDepth); }
int64_t sum_tiles(const Problem& p, int64_t n) { return tiles_along(n, 16) * tiles_along(p.L, kDepth); }

// Copies what keys have (n numbers each, `source` from the first key of the run on) in the order of the run's clusters.
void gather(
    const Problem& p, int64_t head, int64_t run, const int32_t* members, const float* source, int64_t n,
    RunScratch& scratch, const Sorted& to) {
  const float* zeros = resized(scratch.zeros, n);
  const int64_t first = head * p.C() + run * p.per_run();
  for (int64_t cluster = first; cluster < first + p.per_run(); ++cluster) {
    const auto row = [&](int64_t l) {
      const int64_t j = members[cluster * p.L + l];
      return j < 0 ? zeros : source + (j - run * p.R) * n;
    };
    for (int64_t l = 0; to.rows && l < p.L; ++l) std::copy_n(row(l), n, to.rows + (cluster * p.L + l) * n);
    if constexpr (kTiles) {
      if (to.for_scores) to_tiles<Factor::kRight, true>(p.L, n, row, to.for_scores + cluster * score_tiles(p, n));
      if (to.for_sums) to_tiles<Factor::kRight, false>(n, p.L, row, to.for_sums + cluster * sum_tiles(p, n));
    }
  }
}

void gather(const Problem& p, int64_t head, int64_t run, const Clusters& to, RunScratch& scratch) {
  const int64_t first = run * p.R, count = std::min(p.R, p.n - first);
  gather(p, head, run, to.members, p.keys(head, first, count, scratch.keys), p.d, scratch, to.key);
  gather(p, head, run, to.members, p.values(head, first, count, scratch.values), p.v, scratch, to.value);
}

// Deviations (L × r) of the members' coordinates from their mean; returns how many members there are.
int64_t cluster_deviations(const Problem& p, const int32_t* members, int64_t first, const float* z, RunScratch& scratch) {
  scratch.mean.assign(p.r, 0.0f);
  float *mean = scratch.mean.data(), *deviations = resized(scratch.deviations, p.L * p.r);
  int64_t count = 0;
  for (int64_t l = 0; l < p.L; ++l) {
    if (members[l] < 0) continue;
    ++count;
    for (int64_t x = 0; x < p.r; ++x) mean[x] += z[(members[l] - first) * p.s() + x];
  }
  for (int64_t l = 0; l < p.L; ++l)
    for (int64_t x = 0; x < p.r; ++x)
      deviations[l * p.r + x] = members[l] < 0 ? 0.0f : z[(members[l] - first) * p.s() + x] - mean[x] / count;
  return count;
}

// keys, values, z: what the keys from `first` on have.
void cluster_moments(
    const Problem& p, int64_t head, int64_t cluster, const float* all_keys, const float* all_values, const float* z, int64_t first,
    const Clusters& to, RunScratch& scratch) {
  const int64_t index = head * p.C() + cluster, f = p.f(), o = p.o();
  const int32_t* members = to.members + index * p.L;
  const int64_t count = cluster_deviations(p, members, first, z, scratch);
  const float* deviations = scratch.deviations.data();
  float *centre = to.centre + index * p.d, *values = to.moments + index * o * p.v, *spread = to.spread + index * f;
  std::fill(centre, centre + p.d, 0.0f), std::fill(values, values + o * p.v, 0.0f), std::fill(spread, spread + f, 0.0f);
  to.log_count[index] = count ? std::log(static_cast<float>(count)) : kLowest;
  if (!count) return;
  const float share = 1.0f / count;
  for (int64_t l = 0; l < count; ++l) {
    const float *key = all_keys + (members[l] - first) * p.d, *value = all_values + (members[l] - first) * p.v;
    const float* deviation = deviations + l * p.r;
    for (int64_t i = 0; i < p.d; ++i) centre[i] += share * key[i];
    for (int64_t i = 0; i < p.v; ++i) values[i] += share * value[i];
    for (int64_t x = 1; x < o; ++x)
      for (int64_t i = 0; i < p.v; ++i) values[x * p.v + i] += share * deviation[x - 1] * value[i];
    for (int64_t x = 0, pair = 0; f && x < p.r; ++x)
      for (int64_t y = x; y < p.r; ++y, ++pair) spread[pair] += (x == y ? 0.5f : 1.0f) * share * deviation[x] * deviation[y];
  }
}

// Lays out what the logits of clusters are computed from as `logits_tile` reads it.
void pack(const Problem& p, int64_t head, int64_t panel, const Clusters& to) {
  const int64_t f = p.f(), rows = p.d + f + 1;
  float* out = to.panels.wide + (head * p.panels() + panel) * rows * kPanel;
  for (int64_t c = 0; c < kPanel; ++c) {
    const int64_t cluster = panel * kPanel + c, index = head * p.C() + cluster;
    const bool there = cluster < p.C();
    for (int64_t x = 0; x < p.d; ++x) out[x * kPanel + c] = there ? to.centre[index * p.d + x] : 0.0f;
    for (int64_t x = 0; x < f; ++x) out[(p.d + x) * kPanel + c] = there ? to.spread[index * f + x] : 0.0f;
    out[(p.d + f) * kPanel + c] = there ? to.log_count[index] : kLowest;
  }
}

// The numbers of a row in three parts that bfloat16 holds: for the left factor high, high and low, for the right one high,
// low and high, so that their products are those of float32 but for low · low. `to`: 3 n numbers.
template <Factor factor>
void split(const float* x, int64_t n, float* to) {
  float *high = to, *again = to + (factor == Factor::kLeft ? n : 2 * n), *low = to + (factor == Factor::kLeft ? 2 * n : n);
  for (int64_t i = 0; i < n; ++i) {
    high[i] = again[i] = std::bit_cast<float>(std::bit_cast<uint32_t>(x[i]) & 0xFFFF0000u);
    low[i] = x[i] - high[i];
  }
}

// `count` rows of n numbers, split.
template <Factor factor>
void split_to_tiles(const float* x, int64_t count, int64_t n, std::vector<float>& parts, Tile* to) {
  float* split_rows = resized(parts, 3 * count * n);
  for (int64_t i = 0; i < count; ++i) split<factor>(x + i * n, n, split_rows + 3 * i * n);
  if constexpr (kTiles)
    to_tiles<factor, factor == Factor::kRight>(count, 3 * n, [&](int64_t i) { return split_rows + 3 * i * n; }, to);
}

void narrow_pack(const Problem& p, int64_t head, int64_t panel, const Clusters& to, std::vector<float>& parts) {
  const int64_t d = p.d, f = p.f(), first = panel * kPanel, count = std::min(kPanel, p.C() - first);
  const int64_t at = head * p.C() + first, place = head * p.panels() + panel;
  split_to_tiles<Factor::kRight>(to.centre + at * d, count, d, parts, to.panels.centre + place * panel_tiles(d));
  split_to_tiles<Factor::kRight>(to.spread + at * f, count, f, parts, to.panels.spread + place * panel_tiles(f));
  float* log_count = to.panels.log_count + place * kPanel;
  std::copy_n(to.log_count + at, count, log_count), std::fill(log_count + count, log_count + kPanel, kLowest);
}

void pack_all(const Problem& p, const Clusters& to) {
  for_each_task<RunScratch>(p, p.b * p.h * p.panels(), [&](RunScratch& scratch, int64_t task) {
    const int64_t head = task / p.panels(), panel = task % p.panels();
    return p.narrow ? narrow_pack(p, head, panel, to, scratch.parts) : pack(p, head, panel, to);
  });
}

void make_clusters(const Problem& p, const Clusters& to) {
  const int64_t runs = p.runs();
  for_each_task<RunScratch>(p, p.b * p.h * runs, [&](RunScratch& scratch, int64_t task) {
    const int64_t head = task / runs, run = task % runs, first = run * p.per_run();
    const float* z = run_coordinates(p, head, run, scratch);
    cut(p, head, run, z, scratch, to.members + (head * p.C() + first) * p.L);
    gather(p, head, run, to, scratch);
    const int64_t start = run * p.R, count = std::min(p.R, p.n - start);
    const float *keys = p.keys(head, start, count, scratch.keys), *values = p.values(head, start, count, scratch.values);
    for (int64_t cluster = first; cluster < first + p.per_run(); ++cluster)
      cluster_moments(p, head, cluster, keys, values, z, start, to, scratch);
  });
}

Tile* tiles(Tensor& storage, int64_t count) {
  storage = at::empty({count * static_cast<int64_t>(sizeof(Tile))}, at::kByte);  // ATen aligns to 64 bytes
  return static_cast<Tile*>(storage.data_ptr());
}

// Where `Panels` are kept, as long as this is.
class PanelStorage {
 public:
  explicit PanelStorage(const Problem& p) {
    const int64_t count = p.b * p.h * p.panels();
    if (!p.narrow) {
      first_ = numbers({count, p.d + p.f() + 1, kPanel}), panels.wide = first_.data_ptr<float>();
      return;
    }
    panels.centre = tiles(first_, count * panel_tiles(p.d)), panels.spread = tiles(second_, count * panel_tiles(p.f()));
    third_ = numbers({count, kPanel}), panels.log_count = third_.data_ptr<float>();
  }

  Panels panels;

 private:
  Tensor first_, second_, third_;
};

// Where `Sorted` is kept, as long as this is.
class SortedStorage {
 public:
  SortedStorage(const Problem& p, int64_t n, bool scores, bool sums) {
    const int64_t clusters = p.b * p.h * p.C();
    if (!p.narrow) {
      rows_ = numbers({clusters, p.L, n}), sorted.rows = rows_.data_ptr<float>();
      return;
    }
    if (scores) sorted.for_scores = tiles(scores_, clusters * score_tiles(p, n));
    if (sums) sorted.for_sums = tiles(sums_, clusters * sum_tiles(p, n));
  }

  Sorted sorted;

 private:
  Tensor rows_, scores_, sums_;
};

}  // namespace
