// The forward pass.

#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "highest.h"
#include "own_clusters.h"
#include "query_block.h"

namespace {

struct Forward {
  Block block;
  Own own;
  Highest highest;
  std::vector<float> rating, moments, values, queries, wide;

  // Blocks first..last-1 of one head.
  void run(
      const Problem& p, int64_t head, Range blocks, const Clusters& clusters, int32_t* chosen, int64_t most,
      float* output, at::BFloat16* narrow_output, float* lse) {
    block.place(p, head * p.Q + blocks.first);
    const int64_t start = block.row();
    float* to = p.narrow ? resized(wide, blocks.size() * p.R * p.v) : output + start * p.v;
    for (int64_t index = blocks.first; index < blocks.last; ++index) {
      block.place(p, head * p.Q + index);
      const int64_t row = block.row();
      others(p, clusters, chosen + row * most, most, to + (row - start) * p.v, lse + row);
    }
    const int64_t count = block.row() + block.count - start;
    if (most) own_clusters(p, head, start, count, clusters, chosen + start * most, most, to, lse + start);
    if constexpr (kTiles)
      if (p.narrow) to_bfloat16(to, count * p.v, narrow_output + start * p.v);
  }

 private:
  // Output and log-sum-exp of a block over far clusters and near keys, without the own clusters, which are chosen here.
  void others(const Problem& p, const Clusters& clusters, int32_t* chosen, int64_t most, float* output, float* lse) {
    block.scores(clusters);
    const int64_t size = block.far.size(), width = block.width, v = p.v, o = p.o();
    std::fill(output, output + block.count * v, 0.0f);
    for (int64_t i = 0; i < block.count; ++i) {
      int32_t* own = chosen + i * most;
      std::fill(own + block.own, own + most, -1);
      if (block.own) choose(i, own), block.leave_out(i, own);
      if (p.drops_rest) std::fill(block.far_weights + i * block.width, block.far_weights + (i + 1) * block.width, kLowest);
      lse[i] = softmax(i);
    }
    int64_t column = 0;
    for (const Range& range : block.near) {
      product(
          p.narrow, block.count, v, range.size(), block.near_weights + column, block.near_size(),
          p.values(block.head, range.first, range.size(), values), v, true, output, v);
      column += range.size();
    }
    const float* far = clusters.moments + (block.head * p.C() + block.far.first) * o * v;
    if (!size || p.drops_rest) return;
    const float* weights = block.far_weights + block.far.first - block.base;
    if (o == 1) return product(p.narrow, block.count, v, size, weights, width, far, v, true, output, v);
    float* sums = resized(moments, block.count * o * v);
    product(p.narrow, block.count, o * v, size, weights, width, far, o * v, false, sums, o * v);
    for (int64_t i = 0; i < block.count; ++i) {
      for (int64_t x = 0; x < o; ++x) {
        const float a = x ? block.coordinates[i * p.s() + x - 1] : 1.0f;
        for (int64_t t = 0; t < v; ++t) output[i * v + t] += a * sums[(i * o + x) * v + t];
      }
    }
  }

  // Adds what own clusters give to the output and log-sum-exp of the others.
  void own_clusters(
      const Problem& p, int64_t head, int64_t row, int64_t count, const Clusters& clusters, const int32_t* chosen,
      int64_t most, float* output, float* lse) {
    own.sort_pairs(p, head, count, chosen, most);
    own.scores(p.query.read(row * p.d, count * p.d, queries), clusters);
    for (int64_t i = 0; i < count; ++i) {
      float* x = own.weights + i * own.stride;
      const float highest = std::max(maximum(x, own.stride), lse[i]);
      if (highest <= kLowest / 2) {  // no usable key
        const float none = no_weight(x, own.stride);
        std::fill(x, x + own.stride, none);
        lse[i] += none;
        continue;
      }
      const float others = exp_nonpositive(lse[i] - highest), sum = others + exponentials(x, own.stride, highest);
      const float share = 1.0f / sum;
      for (int64_t j = 0; j < own.stride; ++j) x[j] *= share;
      own.for_each_of(chosen + i * most, most, clusters, [&](int64_t at, const int32_t* keys) {
        p.dropout.drop(x + at, p.L, row + i, [&](int64_t l) { return keys[l]; });
      });
      for (int64_t t = 0; t < p.v; ++t) output[i * p.v + t] *= others * share;
      lse[i] = highest + std::log(sum);
    }
    own.add_products(own.weights, clusters.value, p.v, output);
  }

  // The own clusters of a query: by score plus the standard deviation of the scores within.
  void choose(int64_t i, int32_t* own) {
    const int64_t width = block.width;
    const float *x = block.far_weights + i * width, *g = block.bonus + i * width;
    if (block.p->f()) {
      float* to = resized(rating, width);
      for (int64_t c = 0; c < width; c += kLanes) store(to + c, load(x + c) + square_root(2.0f * load(g + c)));
      x = to;
    }
    highest.find(x, width, block.own, own);
    for (int64_t m = 0; m < block.own; ++m)  // of NaN ratings any place may be said to be the highest
      own[m] = std::clamp<int64_t>(block.base + own[m], block.far.first, block.far.last - 1);
  }

  // Turns scores into weights; returns the logarithm of the sum of their exponentials, kLowest without any.
  float softmax(int64_t i) {
    const int64_t size = block.width;
    float *far = block.far_weights + i * size, *near = block.near_weights + i * block.near_size();
    const float most = std::max(maximum(far, size), maximum(near, block.near_size()));
    if (most <= kLowest / 2) {  // no usable key
      const float none = no_weight(far, size) + no_weight(near, block.near_size());
      std::fill(far, far + size, none), std::fill(near, near + block.near_size(), none);
      return kLowest + none;
    }
    const float sum = exponentials(far, size, most) + exponentials(near, block.near_size(), most);
    const float share = 1.0f / sum;
    for (int64_t c = 0; c < size; ++c) far[c] *= share;
    for (int64_t j = 0; j < block.near_size(); ++j) near[j] *= share;
    block.drop(i);
    return most + std::log(sum);
  }
};

// Output (b, h, n_q, v), then what backward needs: log-sum-exp, own clusters, members, centre, moments, spread, log_count.
std::vector<Tensor> forward(
    const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& query_map, const Tensor& key_map,
    const optional<Tensor>& key_open, const Tensor& plan, bool causal, int64_t offset, int64_t window, int64_t run,
    int64_t cluster, int64_t order, bool drops_rest, double dropout_p, int64_t seed, int64_t most) {
  const Problem p = unpack(
      query, key, value, query_map, key_map, key_open, plan, causal, offset, window, run, cluster, order, drops_rest,
      dropout_p, seed);
  const int64_t heads = p.b * p.h, C = p.C();
  Tensor output = at::empty({p.b, p.h, p.n_q, p.v}, value.options()), lse = numbers({p.b, p.h, p.n_q});
  Tensor own = at::empty({p.b, p.h, p.n_q, most}, at::kInt), members = at::empty({heads, C, p.L}, at::kInt);
  Tensor centre = numbers({heads, C, p.d}), moments = numbers({heads, C, p.o(), p.v});
  Tensor spread = numbers({heads, C, p.f()}), log_count = numbers({heads, C});
  const SortedStorage sorted_key(p, p.d, true, false), sorted_value(p, p.v, false, true);
  const PanelStorage panels(p);
  const Clusters clusters{
      members.data_ptr<int32_t>(), sorted_key.sorted, sorted_value.sorted, centre.data_ptr<float>(),
      moments.data_ptr<float>(), spread.data_ptr<float>(), log_count.data_ptr<float>(), panels.panels};
  make_clusters(p, clusters), pack_all(p, clusters);
  int32_t* chosen = own.data_ptr<int32_t>();
  float *out = p.narrow ? nullptr : output.data_ptr<float>(), *sums = lse.data_ptr<float>();
  at::BFloat16* narrow_out = p.narrow ? output.data_ptr<at::BFloat16>() : nullptr;
  const int64_t parts = (p.Q + kTogether - 1) / kTogether;
  for_each_task<Forward>(p, heads * parts, [&](Forward& forward, int64_t task) {
    const int64_t part = task % parts * kTogether;
    forward.run(p, task / parts, {part, std::min(part + kTogether, p.Q)}, clusters, chosen, most, out, narrow_out, sums);
  });
  return {output, lse, own, members, centre, moments, spread, log_count};
}

}  // namespace
