// A few last queries over stored moments of clusters and few keys: a step of decoding. `Step` of kernels/cluster_step.py
// says what its arguments are. What it reads of clusters it reads once, for all queries that share them.

#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <vector>

#include "highest.h"
#include "problem.h"
#include "query_block.h"

namespace {

// Keys or values as they are cached: (b, h_kv, n, size) with room between heads and samples.
struct Cached {
  const char* data;
  int64_t sample, head, row, bytes, size;  // strides in numbers, bytes of a number, numbers of a row
  bool narrow;

  explicit Cached(const Tensor& x)
      : data(static_cast<const char*>(x.const_data_ptr())), sample(x.stride(0)), head(x.stride(1)), row(x.stride(2)),
        bytes(x.element_size()), size(x.size(3)), narrow(x.scalar_type() == at::kBFloat16) {
    TORCH_CHECK(narrow || x.scalar_type() == at::kFloat, "a step takes float32 or bfloat16 keys and values");
    TORCH_CHECK(size < 2 || x.stride(3) == 1, "a step takes keys and values with contiguous rows");
  }

  const float* read(int64_t s, int64_t h, int64_t j, std::vector<float>& scratch) const {
    const char* from = data + (s * sample + h * head + j * row) * bytes;
    if (!narrow) return reinterpret_cast<const float*>(from);
    const auto* x = reinterpret_cast<const at::BFloat16*>(from);
    float* to = resized(scratch, size);
    for (int64_t i = 0; i < size; ++i) to[i] = static_cast<float>(x[i]);
    return to;
  }
};

inline void add_scaled(float weight, const float* x, int64_t n, float* to) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) to[i] += weight * x[i];
}

struct StepProblem {
  Cached key, value;
  const float *query, *query_map, *centre, *values, *spread, *log_count;
  const int32_t* members;
  const bool* key_open;   // (b, n), null if all are
  const int64_t* spans;   // (b | 1, 7): clusters [first, last), keys [start, stop) before and after them, own clusters
  int64_t b, h, h_kv, heads, m, n, d, v, r, f, o, C, L, maps, span_samples, position, first, window;
  float* output;

  int64_t rows() const { return h / heads * m; }  // queries that share clusters
  const int64_t* span(int64_t sample) const { return spans + (span_samples == 1 ? 0 : sample) * 7; }
  bool open(int64_t sample, int64_t j, int64_t query_position) const {
    if (j > query_position || (window && query_position - j >= window)) return false;
    return !key_open || key_open[sample * n + j - first];
  }
};

// All queries of one sample that share clusters.
class StepTask {
 public:
  void run(const StepProblem& p, int64_t sample, int64_t head) {
    const int64_t* span = p.span(sample);
    first_ = span[0], size_ = std::max<int64_t>(span[1] - span[0], 0), width_ = rounded(size_), own_ = std::min(span[6], size_);
    clusters_ = (sample * p.heads + head) * p.C + first_;
    const int64_t query = (sample * p.h + head * (p.h / p.heads)) * p.m;
    logits(p, query);
    const int64_t sums = p.o * p.v;
    std::fill_n(resized(sums_, p.rows() * sums), p.rows() * sums, 0.0f);
    for (int64_t i = 0; i < p.rows(); ++i) exact(p, sample, query + i, i, span);
    for (int64_t c = 0; c < size_; ++c)
      for (int64_t i = 0; i < p.rows(); ++i) {
        const float weight = logits_[i * width_ + c];
        if (weight != 0.0f) add_scaled(weight, p.values + (clusters_ + c) * sums, sums, sums_.data() + i * sums);
      }
    for (int64_t i = 0; i < p.rows(); ++i) {
      float* output = p.output + (query + i) * p.v;
      for (int64_t x = 0; x < p.o; ++x)
        add_scaled(x ? coordinates_[i * p.r + x - 1] : 1.0f, sums_.data() + i * sums + x * p.v, p.v, output);
    }
  }

 private:
  // Logits and ratings of all clusters; kLowest beyond them.
  void logits(const StepProblem& p, int64_t query) {
    const int64_t rows = p.rows(), f = p.f;
    float *a = resized(coordinates_, rows * p.r), *pairs = resized(pairs_, rows * f);
    for (int64_t i = 0; i < rows; ++i, a += p.r) {
      const float* map = p.query_map + (p.maps == 1 ? 0 : (query + i) / p.m % p.h) * p.d * p.r;
      std::fill_n(a, p.r, 0.0f);
      for (int64_t x = 0; x < p.d; ++x) add_scaled(p.query[(query + i) * p.d + x], map + x * p.r, p.r, a);
      for (int64_t x = 0; f && x < p.r; ++x)
        for (int64_t y = x; y < p.r; ++y) *pairs++ = a[x] * a[y];
    }
    float *to = resized(logits_, rows * width_), *rating = resized(ratings_, rows * width_);
    std::fill_n(to, rows * width_, kLowest), std::fill_n(rating, rows * width_, 2 * kLowest);
    for (int64_t c = 0; c < size_; ++c)
      for (int64_t i = 0; i < rows; ++i) {
        const float x = dot(p.query + (query + i) * p.d, p.centre + (clusters_ + c) * p.d, p.d) + p.log_count[clusters_ + c];
        const float spread = f ? dot(pairs_.data() + i * f, p.spread + (clusters_ + c) * f, f) : 0.0f;
        to[i * width_ + c] = x + std::min(spread, kSpreadLimit);
        rating[i * width_ + c] = to[i * width_ + c] + std::sqrt(std::max(2.0f * spread, 0.0f));
      }
  }

  // Output of one query (number `index` of those of the task) over near keys and own clusters; leaves the weights of the
  // others where their logits were.
  void exact(const StepProblem& p, int64_t sample, int64_t query, int64_t index, const int64_t* span) {
    const int64_t head = query / p.m % p.h / (p.h / p.h_kv), position = p.position + query % p.m;
    const float* q = p.query + query * p.d;
    float* far = logits_.data() + index * width_;
    keys_.clear(), scores_.clear();
    const auto add = [&](int64_t j) { keys_.push_back(j - p.first), scores_.push_back(dot(q, p.key.read(sample, head, j - p.first, row_), p.d)); };
    for (int side = 0; side < 2; ++side)
      for (int64_t j = span[2 + 2 * side]; j < span[3 + 2 * side]; ++j)
        if (p.open(sample, j, position)) add(j);
    if (own_) highest_.find(ratings_.data() + index * width_, width_, own_, resized(own_places_, own_));
    for (int64_t t = 0; t < own_; ++t) {
      const int64_t c = std::clamp<int64_t>(own_places_[t], 0, size_ - 1);  // of NaN ratings any place may be the highest
      const int32_t* members = p.members + (clusters_ + c) * p.L;
      for (int64_t l = 0; l < p.L && far[c] > kLowest; ++l)
        if (members[l] >= 0) add(members[l]);
      far[c] = kLowest;
    }
    const int64_t exact = scores_.size();
    const float most = std::max(maximum(far, width_), maximum(scores_.data(), exact));
    float* output = p.output + query * p.v;
    if (most <= kLowest / 2) {  // no usable key
      std::fill_n(output, p.v, no_weight(far, width_) + no_weight(scores_.data(), exact));
      std::fill_n(far, width_, 0.0f);
      return;
    }
    const float share = 1.0f / (exponentials(far, width_, most) + exponentials(scores_.data(), exact, most));
    for (int64_t c = 0; c < size_; ++c) far[c] *= share;
    std::fill_n(output, p.v, 0.0f);
    for (int64_t j = 0; j < exact; ++j) add_scaled(scores_[j] * share, p.value.read(sample, head, keys_[j], row_), p.v, output);
  }

  int64_t first_, size_, width_, own_, clusters_;  // far clusters; numbers between rows; the first one among all
  std::vector<float> logits_, ratings_, coordinates_, pairs_, sums_, scores_, row_;
  std::vector<int64_t> keys_;
  std::vector<int32_t> own_places_;
  Highest highest_;
};

// Output (b, h, m, v) in float32.
Tensor step(
    const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& query_map, const optional<Tensor>& key_open,
    const Tensor& members, const Tensor& centre, const Tensor& values, const Tensor& spread, const Tensor& log_count,
    const Tensor& spans, int64_t position, int64_t first, int64_t window) {
  TORCH_CHECK(members.is_contiguous() && spans.is_contiguous(), "a step takes contiguous members and spans");
  if (key_open.has_value()) TORCH_CHECK(key_open->is_contiguous(), "a step takes a contiguous mask");
  Tensor output = numbers({query.size(0), query.size(1), query.size(2), value.size(3)});
  const StepProblem p{
      Cached(key), Cached(value), floats(query), floats(query_map), floats(centre), floats(values), floats(spread),
      floats(log_count), members.const_data_ptr<int32_t>(), key_open.has_value() ? key_open->const_data_ptr<bool>() : nullptr,
      spans.const_data_ptr<int64_t>(), query.size(0), query.size(1), key.size(1), centre.size(1), query.size(2), key.size(2),
      query.size(3), value.size(3), query_map.size(2), spread.size(3), values.size(3), centre.size(2), members.size(3),
      query_map.size(0), spans.size(0), position, first, window, output.data_ptr<float>()};
  std::atomic<int64_t> next{0};
  const int64_t tasks = p.b * p.heads;
  at::parallel_for(0, std::min<int64_t>(at::get_num_threads(), tasks), 1, [&](int64_t, int64_t) {
    StepTask task;
    for (int64_t index = next++; index < tasks; index = next++) task.run(p, index / p.heads, index % p.heads);
  });
  return output;
}

}  // namespace
