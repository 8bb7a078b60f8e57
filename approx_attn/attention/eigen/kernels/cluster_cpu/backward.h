// The backward pass.

#pragma once

#include <algorithm>
#include <vector>

#include "own_clusters.h"
#include "query_block.h"

namespace {

// Where the gradients of one head (or of part of its queries) go; zeros before, but for the queries'.
struct Gradients {
  float *query, *key, *value, *query_map, *key_map;
};

struct Backward {
  Block block;
  Own own;
  RunScratch scratch;
  std::vector<float> key, value, centre, moments, spread;  // gradients of members and moments of all clusters
  std::vector<float> queries_, keys, values, outputs, grads;
  std::vector<float> delta, own_flow, near_flow, far_flow, tilted, sums, pair_grads, coordinate_grads, run_grads;

  // Query blocks first..last-1 of one head.
  void run(
      const Problem& p, int64_t head, Range blocks, const Clusters& clusters, const int32_t* chosen, int64_t most,
      const Numbers& all_outputs, const float* lse, const Numbers& all_grads, const Gradients& to) {
    const int64_t C = p.C();
    key.assign(C * p.L * p.d, 0.0f), value.assign(C * p.L * p.v, 0.0f);
    centre.assign(C * p.d, 0.0f), moments.assign(C * p.o() * p.v, 0.0f), spread.assign(C * p.f(), 0.0f);
    for (int64_t index = blocks.first; index < blocks.last; ++index) {
      block.place(p, head * p.Q + index);
      const int64_t row = block.row(), size = block.count * p.v;
      const float* grad = all_grads.read(row * p.v, size, grads);
      differences(block.count, p.v, all_outputs.read(row * p.v, size, outputs), grad);
      one_block(p, clusters, chosen + row * most, most, lse + row, grad, to);
    }
    for (int64_t index = blocks.first; most && index < blocks.last; index += kTogether) {
      block.place(p, head * p.Q + index);
      const int64_t row = block.row();
      block.place(p, head * p.Q + std::min(index + kTogether, blocks.last) - 1);
      const int64_t count = block.row() + block.count - row, size = count * p.v;
      const float* grad = all_grads.read(row * p.v, size, grads);
      differences(count, p.v, all_outputs.read(row * p.v, size, outputs), grad);
      own_clusters(p, head, row, count, clusters, chosen + row * most, most, lse + row, grad, to);
    }
    for (int64_t run = 0; run < p.runs(); ++run) to_keys(p, head, run, clusters, to);
  }

 private:
  void one_block(
      const Problem& p, const Clusters& clusters, const int32_t* chosen, int64_t most, const float* lse, const float* grad,
      const Gradients& to) {
    block.scores(clusters);
    const int64_t count = block.count, d = p.d;
    float* query_grads = to.query + (block.head * p.n_q + block.first) * d;
    std::fill(query_grads, query_grads + count * d, 0.0f);
    for (int64_t i = 0; block.own && i < count; ++i) block.leave_out(i, chosen + i * most);
    weigh(block.far_weights, count, block.width, lse), weigh(block.near_weights, count, block.near_size(), lse);
    near_keys(p, grad, query_grads, to);
    if (!p.drops_rest) far_clusters(p, clusters, grad, query_grads, to);
  }

  // Through a softmax with weights P: dS = P∘(dP − Σ P dP), and Σ P dP = output · grad.
  void differences(int64_t count, int64_t v, const float* output, const float* grad) {
    resized(delta, count);
    for (int64_t i = 0; i < count; ++i) delta[i] = dot(grad + i * v, output + i * v, v);
  }

  void weigh(float* x, int64_t count, int64_t size, const float* lse) const {
    for (int64_t i = 0; i < count; ++i) {
      float* row = x + i * size;
      const float sum = lse[i];
      if (sum <= kLowest / 2) {  // no usable key
        std::fill(row, row + size, 0.0f);
        continue;
      }
#pragma omp simd
      for (int64_t j = 0; j < size; ++j) row[j] = exp_nonpositive(row[j] < sum ? row[j] - sum : 0.0f);
    }
  }

  void own_clusters(
      const Problem& p, int64_t head, int64_t row, int64_t count, const Clusters& clusters, const int32_t* chosen,
      int64_t most, const float* lse, const float* grad, const Gradients& to) {
    const float* queries = p.query.read(row * p.d, count * p.d, queries_);
    own.sort_pairs(p, head, count, chosen, most);
    own.scores(queries, clusters);
    weigh(own.weights, count, own.stride, lse);
    float* ds = resized(own_flow, count * own.stride);
    std::fill(ds, ds + count * own.stride, 0.0f);
    own.products(grad, clusters.value, p.v, ds);
    for (int64_t i = 0; i < count; ++i)
      own.for_each_of(chosen + i * most, most, clusters, [&](int64_t place, const int32_t* keys) {
        const int64_t at = i * own.stride + place;
        p.dropout.back(own.weights + at, ds + at, p.L, delta[i], row + i, [&](int64_t l) { return keys[l]; });
      });
    own.add_transposed(own.weights, grad, p.v, value.data());
    own.add_transposed(ds, queries, p.d, key.data());
    own.add_products(ds, clusters.key, p.d, to.query + row * p.d);
  }

  void near_keys(const Problem& p, const float* grad, float* query_grads, const Gradients& to) {
    const int64_t count = block.count, total = block.near_size(), d = p.d, v = p.v;
    float *ds = resized(near_flow, count * total), *weights = block.near_weights;
    for (const Range& range : block.near) {
      const int64_t size = range.size();
      if (!size) continue;
      product_bt(p.narrow, count, size, v, grad, v, p.values(block.head, range.first, size, values), v, false, ds, size);
      for (int64_t i = 0; i < count; ++i)
        p.dropout.back(weights + i * total, ds + i * size, size, delta[i], block.row() + i, [&](int64_t j) {
          return range.first + j;
        });
      product_at(p.narrow, size, v, count, weights, total, grad, v, true, to.value + range.first * v, v);
      product(p.narrow, count, d, size, ds, size, p.keys(block.head, range.first, size, keys), d, true, query_grads, d);
      product_at(p.narrow, size, d, count, ds, size, block.queries, d, true, to.key + range.first * d, d);
      weights += size;
    }
  }

  void far_clusters(
      const Problem& p, const Clusters& clusters, const float* grad, float* query_grads, const Gradients& to) {
    const int64_t count = block.count, size = block.far.size(), d = p.d, v = p.v, o = p.o(), f = p.f(), r = p.r;
    if (!size) return;
    const int64_t at = block.head * p.C() + block.far.first, first = block.far.first;
    const float* moment = clusters.moments + at * o * v;
    const int64_t width = block.width, skipped = first - block.base;
    float* weights = block.far_weights + skipped;
    const float* bonus = block.bonus + skipped;
    float* ds = resized(far_flow, count * size);
    float* da = resized(coordinate_grads, count * r);
    std::fill(da, da + count * r, 0.0f);
    const float* pulled = grad;  // (count, o · v): the gradient times 1 and the coordinates
    if (o > 1) {
      float* x = resized(tilted, count * o * v);
      for (int64_t i = 0; i < count; ++i)
        for (int64_t y = 0; y < o; ++y)
          for (int64_t t = 0; t < v; ++t)
            x[(i * o + y) * v + t] = (y ? block.coordinates[i * p.s() + y - 1] : 1.0f) * grad[i * v + t];
      pulled = x;
    }
    product_bt(p.narrow, count, size, o * v, pulled, o * v, moment, o * v, false, ds, size);
    for (int64_t i = 0; i < count; ++i)
      p.dropout.back(weights + i * width, ds + i * size, size, delta[i], block.row() + i, [&](int64_t c) {
        return block.cluster_id(first + c);
      });
    product_at(p.narrow, size, o * v, count, weights, width, pulled, o * v, true, moments.data() + first * o * v, o * v);
    if (o > 1) {
      float* tilts = resized(sums, count * o * v);
      product(p.narrow, count, o * v, size, weights, width, moment, o * v, false, tilts, o * v);
      for (int64_t i = 0; i < count; ++i)
        for (int64_t y = 1; y < o; ++y) da[i * r + y - 1] = dot(grad + i * v, tilts + (i * o + y) * v, v);
    }
    product(p.narrow, count, d, size, ds, size, clusters.centre + at * d, d, true, query_grads, d);
    product_at(p.narrow, size, d, count, ds, size, block.queries, d, true, centre.data() + first * d, d);
    if (!f) return;
    for (int64_t i = 0; i < count; ++i)
      for (int64_t c = 0; c < size; ++c)
        ds[i * size + c] = bonus[i * width + c] < kSpreadLimit ? ds[i * size + c] : 0.0f;
    product_at(p.narrow, size, f, count, ds, size, block.pairs, f, true, spread.data() + first * f, f);
    float* dp = resized(pair_grads, count * f);
    product(p.narrow, count, f, size, ds, size, clusters.spread + at * f, f, false, dp, f);
    for (int64_t i = 0; i < count; ++i) {
      const float* a = block.coordinates + i * p.s();
      for (int64_t x = 0, pair = i * f; x < r; ++x)
        for (int64_t y = x; y < r; ++y, ++pair) da[i * r + x] += dp[pair] * a[y], da[i * r + y] += dp[pair] * a[x];
    }
    const float* map = p.query_map + block.head % p.h * d * p.s();
    product_bt(false, count, d, r, da, r, map, p.s(), true, query_grads, d);
    product_at(false, d, r, count, block.queries, d, da, r, true, to.query_map, r);
  }

  // From the members and the moments of a run's clusters to its keys, its values and the key map.
  void to_keys(const Problem& p, int64_t head, int64_t run, const Clusters& clusters, const Gradients& to) {
    const int64_t r = p.r, d = p.d, v = p.v, o = p.o(), f = p.f(), first = run * p.R;
    const float* z = f ? run_coordinates(p, head, run, scratch) : nullptr;
    float *dz = resized(run_grads, p.R * r), *deviations = resized(scratch.deviations, p.L * r);
    std::fill(dz, dz + p.R * r, 0.0f);
    const int64_t count = std::min(p.R, p.n - first);
    const float* values = p.values(head, first, count, scratch.values);
    for (int64_t cluster = run * p.per_run(); cluster < (run + 1) * p.per_run(); ++cluster) {
      const int64_t index = head * p.C() + cluster;
      const int32_t* members = clusters.members + index * p.L;
      const float *mean = clusters.moments + index * o * v, *dv = moments.data() + cluster * o * v;
      const int64_t filled = std::count_if(members, members + p.L, [](int32_t j) { return j >= 0; });
      if (f) cluster_deviations(p, members, first, z, scratch);
      const float share = 1.0f / std::max<int64_t>(filled, 1);
      for (int64_t l = 0; l < filled; ++l) {
        const int64_t slot = cluster * p.L + l;
        float *dk = to.key + members[l] * d, *value_grad = to.value + members[l] * v, *to_z = dz + (members[l] - first) * r;
        const float *row = values + (members[l] - first) * v, *deviation = deviations + l * r;
        for (int64_t i = 0; i < d; ++i) dk[i] += key[slot * d + i] + share * centre[cluster * d + i];
        for (int64_t i = 0; i < v; ++i) value_grad[i] += value[slot * v + i] + share * dv[i];
        for (int64_t x = 1; x < o; ++x) {
          const float weight = share * deviation[x - 1];
          for (int64_t i = 0; i < v; ++i) value_grad[i] += weight * dv[x * v + i];
          to_z[x - 1] += share * (dot(dv + x * v, row, v) - dot(dv + x * v, mean, v));
        }
        const float* pair = spread.data() + cluster * f;
        for (int64_t x = 0; f && x < r; ++x)
          for (int64_t y = x; y < r; ++y, ++pair) {
            to_z[x] += (x == y ? 0.5f : 1.0f) * share * *pair * deviation[y];
            to_z[y] += (x == y ? 0.5f : 1.0f) * share * *pair * deviation[x];
          }
      }
    }
    if (!f) return;
    const float* map = p.key_map + head % p.h * d * p.s();
    product_bt(false, count, d, r, dz, r, map, p.s(), true, to.key + first * d, d);
    product_at(false, d, r, count, p.keys(head, first, count, scratch.keys), d, dz, r, true, to.key_map, r);
  }
};

// Gradients of query, key, value, query_map and key_map, in parts to be added up over dimension 2 of each: one per head
// that shares a key head and per part of the queries.
std::vector<Tensor> backward(
    const Tensor& grad, const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& query_map,
    const Tensor& key_map, const optional<Tensor>& key_open, const Tensor& plan, const Tensor& output, const Tensor& lse,
    const Tensor& own, const Tensor& members, const Tensor& centre, const Tensor& moments, const Tensor& spread,
    const Tensor& log_count, bool causal, int64_t offset, int64_t window, int64_t run, int64_t cluster, int64_t order,
    bool drops_rest, double dropout_p, int64_t seed) {
  const Problem p = unpack(
      query, key, value, query_map, key_map, key_open, plan, causal, offset, window, run, cluster, order, drops_rest,
      dropout_p, seed);
  const int64_t heads = p.b * p.h, groups = p.h / p.h_kv, threads = at::get_num_threads();
  // Whole heads where they are enough to keep the threads busy: parts of a head cost a copy of its gradients each.
  const int64_t parts = heads >= 2 * threads || threads == 1 ? 1 : std::min(p.Q, (2 * threads + heads - 1) / heads);
  Tensor query_grads = numbers({p.b, p.h, p.n_q, p.d});
  Tensor key_grads = at::zeros({p.b, p.h_kv, groups * parts, p.n, p.d}, at::kFloat);
  Tensor value_grads = at::zeros({p.b, p.h_kv, groups * parts, p.n, p.v}, at::kFloat);
  Tensor map_grads = at::zeros({2, p.b * parts, p.h, p.d, p.r}, at::kFloat);
  const SortedStorage sorted_key(p, p.d, true, true), sorted_value(p, p.v, true, false);
  const PanelStorage panels(p);
  const Clusters clusters{
      const_cast<int32_t*>(members.const_data_ptr<int32_t>()), sorted_key.sorted, sorted_value.sorted,
      const_cast<float*>(floats(centre)), const_cast<float*>(floats(moments)),
      const_cast<float*>(floats(spread)), const_cast<float*>(floats(log_count)), panels.panels};
  pack_all(p, clusters);
  for_each_task<RunScratch>(p, heads * p.runs(), [&](RunScratch& scratch, int64_t task) {
    gather(p, task / p.runs(), task % p.runs(), clusters, scratch);
  });
  const Numbers out(output), flow(grad);
  const float* sums = floats(lse);
  const int32_t* chosen = own.const_data_ptr<int32_t>();
  float *to_query = query_grads.data_ptr<float>(), *to_key = key_grads.data_ptr<float>();
  float *to_value = value_grads.data_ptr<float>(), *to_maps = map_grads.data_ptr<float>();
  const int64_t most = own.size(3), map = p.d * p.r;
  for_each_task<Backward>(p, heads * parts, [&](Backward& worker, int64_t task) {
    const int64_t head = task / parts, part = task % parts, sample = head / p.h;
    const int64_t slot = (p.key_head(head) * groups + head % groups) * parts + part;
    const int64_t place = (sample * parts + part) * p.h + head % p.h;
    const Gradients to{
        to_query, to_key + slot * p.n * p.d, to_value + slot * p.n * p.v, to_maps + place * map,
        to_maps + (p.b * parts * p.h + place) * map};
    const Range blocks{part * p.Q / parts, (part + 1) * p.Q / parts};
    worker.run(p, head, blocks, clusters, chosen, most, out, sums, flow, to);
  });
  return {query_grads, key_grads, value_grads, map_grads};
}

}  // namespace
