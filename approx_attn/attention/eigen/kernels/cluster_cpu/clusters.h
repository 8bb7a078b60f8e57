// Runs of keys cut into clusters, and the moments of these.

#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "problem.h"
#include "products.h"

namespace {

struct Clusters {  // of all heads
  int32_t* members;    // (b·h, C, L): keys, −1 in empty slots, which stand last
  float *key, *value;  // (b·h, C, L, d) and (b·h, C, L, v): the members', zero in empty slots
  float *centre, *moments, *spread, *log_count;  // (b·h, C, d), (b·h, C, o, v), (b·h, C, f), (b·h, C)
  float* panels;  // (b·h, C / kPanel, d + f + 1, kPanel): centre, spread and log_count of kPanel clusters side by side
};

struct RunScratch {
  std::vector<float> coordinates, mean, deviations, along;
  std::vector<int32_t> upper;
};

// Coordinates (R × r) of the keys of a run; zeros beyond the last key.
const float* run_coordinates(const Problem& p, int64_t head, int64_t run, RunScratch& scratch) {
  float* z = resized(scratch.coordinates, p.R * p.s());
  const int64_t count = std::min(p.R, p.n - run * p.R);
  std::fill(z + count * p.s(), z + p.R * p.s(), 0.0f);
  product(
      count, p.s(), p.d, p.keys(head) + run * p.R * p.d, p.d, p.key_map + head % p.h * p.d * p.s(), p.s(), false, z, p.s());
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

// Copies the keys and values of a run in the order of its clusters.
void gather(const Problem& p, int64_t head, int64_t run, const Clusters& to) {
  const int64_t first = head * p.C() * p.L + run * p.R;
  for (int64_t slot = first; slot < first + p.R; ++slot) {
    const int64_t j = to.members[slot];
    float *key = to.key + slot * p.d, *value = to.value + slot * p.v;
    if (j < 0) {
      std::fill(key, key + p.d, 0.0f), std::fill(value, value + p.v, 0.0f);
    } else {
      std::copy_n(p.keys(head) + j * p.d, p.d, key), std::copy_n(p.values(head) + j * p.v, p.v, value);
    }
  }
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

void cluster_moments(const Problem& p, int64_t head, int64_t cluster, const float* z, int64_t first, const Clusters& to,
                     RunScratch& scratch) {
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
    const float *key = to.key + (index * p.L + l) * p.d, *value = to.value + (index * p.L + l) * p.v;
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
  float* out = to.panels + (head * p.panels() + panel) * rows * kPanel;
  for (int64_t c = 0; c < kPanel; ++c) {
    const int64_t cluster = panel * kPanel + c, index = head * p.C() + cluster;
    const bool there = cluster < p.C();
    for (int64_t x = 0; x < p.d; ++x) out[x * kPanel + c] = there ? to.centre[index * p.d + x] : 0.0f;
    for (int64_t x = 0; x < f; ++x) out[(p.d + x) * kPanel + c] = there ? to.spread[index * f + x] : 0.0f;
    out[(p.d + f) * kPanel + c] = there ? to.log_count[index] : kLowest;
  }
}

void pack_all(const Problem& p, const Clusters& to) {
  for_each_task<RunScratch>(p.b * p.h * p.panels(), [&](RunScratch&, int64_t task) {
    pack(p, task / p.panels(), task % p.panels(), to);
  });
}

void make_clusters(const Problem& p, const Clusters& to) {
  const int64_t runs = p.runs();
  for_each_task<RunScratch>(p.b * p.h * runs, [&](RunScratch& scratch, int64_t task) {
    const int64_t head = task / runs, run = task % runs, first = run * p.per_run();
    const float* z = run_coordinates(p, head, run, scratch);
    cut(p, head, run, z, scratch, to.members + (head * p.C() + first) * p.L);
    gather(p, head, run, to);
    for (int64_t cluster = first; cluster < first + p.per_run(); ++cluster)
      cluster_moments(p, head, cluster, z, run * p.R, to, scratch);
  });
}

}  // namespace
