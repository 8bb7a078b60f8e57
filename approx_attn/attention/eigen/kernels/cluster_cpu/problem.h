// What is computed, and how its tasks are shared among threads.

#pragma once

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <optional>
#include <vector>

#include "dropout.h"
#include "tiles.h"
#include "vectors.h"

namespace {

using at::Tensor;
using std::optional;

constexpr int64_t kPanel = 32;  // clusters whose logits are computed side by side

const float* floats(const Tensor& x) {
  TORCH_CHECK(x.is_contiguous() && x.scalar_type() == at::kFloat, "cluster attention takes contiguous float32");
  return x.const_data_ptr<float>();
}

template <typename T>
T* resized(std::vector<T>& x, int64_t n) {
  if (static_cast<int64_t>(x.size()) < n) x.resize(n);
  return x.data();
}

// A tensor of float32 or bfloat16, read as float32.
struct Numbers {
  const float* wide = nullptr;
  const at::BFloat16* narrow = nullptr;

  Numbers() = default;
  explicit Numbers(const Tensor& x) {
    if (x.scalar_type() != at::kBFloat16) {
      wide = floats(x);
      return;
    }
    TORCH_CHECK(x.is_contiguous(), "cluster attention takes contiguous bfloat16");
    narrow = x.const_data_ptr<at::BFloat16>();
  }

  // `count` numbers from `first` on: where they are, or in `scratch`.
  const float* read(int64_t first, int64_t count, std::vector<float>& scratch) const {
    if (wide) return wide + first;
    float* to = resized(scratch, count);
    for (int64_t i = 0; i < count; ++i) to[i] = static_cast<float>(narrow[first + i]);
    return to;
  }
};

struct Problem {
  Tensor query_maps, key_maps;  // (h, d, s)
  Numbers query, key, value;
  bool narrow;  // keys and values are bfloat16, and so are the factors of products
  const float *query_map, *key_map;
  const bool* key_open;  // (b, n), null if all are
  const int64_t* plan;   // (b | 1, Q, 5): far_first, far_last, near_first, near_last (runs), own (clusters)
  int64_t b, h, h_kv, n_q, n, d, v, r, Q, plan_samples;
  int64_t R, L, order, offset, window;
  bool causal, drops_rest;  // drops_rest: clusters that are not own do not enter the softmax
  Dropout dropout;

  int64_t runs() const { return (n + R - 1) / R; }
  int64_t per_run() const { return R / L; }
  int64_t C() const { return runs() * per_run(); }
  int64_t panels() const { return (C() + kPanel - 1) / kPanel; }
  int64_t f() const { return order > 0 ? r * (r + 1) / 2 : 0; }
  int64_t o() const { return order > 1 ? 1 + r : 1; }
  const float* keys(int64_t head, int64_t first, int64_t count, std::vector<float>& scratch) const {
    return key.read((key_head(head) * n + first) * d, count * d, scratch);
  }
  const float* values(int64_t head, int64_t first, int64_t count, std::vector<float>& scratch) const {
    return value.read((key_head(head) * n + first) * v, count * v, scratch);
  }
  int64_t key_head(int64_t head) const { return head / h * h_kv + head % h / (h / h_kv); }  // head counts samples too
  int64_t s() const { return (r + kLanes - 1) / kLanes * kLanes; }  // between rows of maps and of coordinates
  bool open(int64_t head, int64_t j) const { return j < n && (!key_open || key_open[head / h * n + j]); }
};

Problem unpack(
    const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& query_map, const Tensor& key_map,
    const optional<Tensor>& key_open, const Tensor& plan, bool causal, int64_t offset, int64_t window, int64_t run,
    int64_t cluster, int64_t order, bool drops_rest, double dropout_p, int64_t seed) {
  Problem p;
  p.dropout = {static_cast<float>(dropout_p), static_cast<uint64_t>(seed)};
  p.narrow = key.scalar_type() == at::kBFloat16;
  p.query = Numbers(query), p.key = Numbers(key), p.value = Numbers(value);
  TORCH_CHECK(plan.is_contiguous() && plan.scalar_type() == at::kLong, "cluster attention takes a contiguous plan");
  p.plan = plan.const_data_ptr<int64_t>();
  if (key_open.has_value()) TORCH_CHECK(key_open->is_contiguous(), "cluster attention takes contiguous masks");
  p.key_open = key_open.has_value() ? key_open->const_data_ptr<bool>() : nullptr;
  p.b = query.size(0), p.h = query.size(1), p.n_q = query.size(2), p.d = query.size(3);
  p.h_kv = key.size(1), p.n = key.size(2), p.v = value.size(3), p.r = query_map.size(2);
  p.query_maps = at::constant_pad_nd(query_map, {0, p.s() - p.r}), p.key_maps = at::constant_pad_nd(key_map, {0, p.s() - p.r});
  p.query_map = floats(p.query_maps), p.key_map = floats(p.key_maps);
  p.plan_samples = plan.size(0), p.Q = plan.size(1);
  p.causal = causal, p.offset = offset, p.window = window, p.R = run, p.L = cluster, p.order = order;
  p.drops_rest = drops_rest;
  TORCH_CHECK(p.d % kLanes == 0 && p.v % kLanes == 0, "cluster attention takes features in multiples of 16");
  return p;
}

// Runs `body(state, task)` for all tasks, each thread with a state of its own, in any order.
template <typename State, typename Body>
void for_each_task(const Problem& p, int64_t tasks, const Body& body) {
  std::atomic<int64_t> next{0};
  at::parallel_for(0, std::min<int64_t>(at::get_num_threads(), tasks), 1, [&](int64_t, int64_t) {
    const TileState tiles(p.narrow);
    State state;
    for (int64_t task = next++; task < tasks; task = next++) body(state, task);
  });
}

Tensor numbers(std::initializer_list<int64_t> shape) { return at::empty(shape, at::kFloat); }

}  // namespace
