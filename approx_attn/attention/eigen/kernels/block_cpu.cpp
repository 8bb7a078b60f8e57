// Block-wise attention on the CPU: `block_attention` of kernels/block.py as one operator, forward and backward.
//
// Query blocks of one row (one head of one sample) are processed in spans that fit into the cache of a core; spans
// (forward) and rows of keys (backward) run on ATen's threads. Products are ATen's, which run alone inside of a
// parallel region; what stands between them is fused here: masks, softmax and the combination of moments by a query's
// coordinates. Measured before, at 4,096 tokens on two cores: by PyTorch operators the products were a third of the
// time, calls, threads that wait for each other and passes over memory the rest; here they are three quarters.
//
// Letters as in `BlockInputs`: R rows, R_kv rows of keys, Q blocks of b_q queries, K blocks of b_k keys, T exact
// blocks per query block, r coordinates, o = 1 + r orders, d and v features of keys and values.

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <c10/core/InferenceMode.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <optional>
#include <vector>

namespace {

using at::Tensor;
using std::optional;

constexpr float kSpreadLimit = 2.0f;  // SPREAD_LIMIT of kernels/block_inputs.py
constexpr float kLowest = std::numeric_limits<float>::lowest() / 4;
constexpr int64_t kSpanNumbers = 1 << 18;  // numbers in the arrays of a span: 1 MiB, half of a common second-level cache

// exp(x) for x <= 0, as 2^n · 2^f with a polynomial for 2^f; relative error below 3e-7. A call of the library's
// exponential would keep the compiler from using vectors.
inline float exp_nonpositive(float exponent) {
  const float x = std::max(exponent, -87.0f) * 1.44269504088896f;
  const float n = std::floor(x + 0.5f);
  const float f = x - n;
  float p = 1.535336188319500e-4f;
  p = p * f + 1.339887440266574e-3f;
  p = p * f + 9.618437357674640e-3f;
  p = p * f + 5.550332471162809e-2f;
  p = p * f + 2.402264791363012e-1f;
  p = p * f + 6.931472028550421e-1f;
  p = p * f + 1.0f;
  const int32_t bits = (static_cast<int32_t>(n) + 127) << 23;
  float power;
  std::memcpy(&power, &bits, sizeof(power));
  // Exactly zero where it is closed: numbers below the normal ones would slow all products down.
  return exponent <= -87.0f ? 0.0f : p * power;
}

inline float maximum(const float* x, int64_t n) {
  float highest = kLowest;
#pragma omp simd reduction(max : highest)
  for (int64_t i = 0; i < n; ++i) highest = x[i] > highest ? x[i] : highest;  // std::max would not use vectors
  return highest;
}

// Turns x into exp(x − highest); returns the sum of these.
inline float exponentials(float* x, int64_t n, float highest) {
  float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) {
    x[i] = exp_nonpositive(x[i] - highest);
    sum += x[i];
  }
  return sum;
}

inline float dot(const float* x, const float* y, int64_t n) {
  float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) sum += x[i] * y[i];
  return sum;
}

struct Inputs {
  const float *query, *key, *value, *centre, *tilt, *moments, *spread, *log_count;
  const int64_t* chosen;
  const bool *slot_open, *far_open, *key_open;  // slot_open, key_open: null if all are open
  int64_t R, R_kv, Q, b_q, K, b_k, T, d, v, o, r2;
  bool causal;
  int64_t offset;

  int64_t groups() const { return R / R_kv; }
};

const float* floats(const Tensor& x) {
  TORCH_CHECK(x.is_contiguous() && x.scalar_type() == at::kFloat, "block attention takes contiguous float32");
  return x.const_data_ptr<float>();
}

const bool* bools(const optional<Tensor>& x) {
  if (!x.has_value()) return nullptr;
  TORCH_CHECK(x->is_contiguous() && x->scalar_type() == at::kBool, "block attention takes contiguous masks");
  return x->const_data_ptr<bool>();
}

Inputs unpack(
    const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& centre, const Tensor& tilt,
    const Tensor& moments, const Tensor& spread, const Tensor& log_count, const Tensor& chosen,
    const optional<Tensor>& slot_open, const Tensor& far_open, const optional<Tensor>& key_open, bool causal,
    int64_t offset) {
  Inputs in;
  in.query = floats(query), in.key = floats(key), in.value = floats(value), in.centre = floats(centre);
  in.tilt = floats(tilt), in.moments = floats(moments), in.spread = floats(spread), in.log_count = floats(log_count);
  TORCH_CHECK(chosen.is_contiguous() && chosen.scalar_type() == at::kLong, "block attention takes contiguous indices");
  in.chosen = chosen.const_data_ptr<int64_t>();
  in.slot_open = bools(slot_open), in.far_open = bools(far_open), in.key_open = bools(key_open);
  in.R = query.size(0), in.Q = query.size(1), in.b_q = query.size(2), in.d = query.size(3);
  in.R_kv = key.size(0), in.K = key.size(1), in.b_k = key.size(2), in.v = value.size(3);
  in.T = chosen.size(2), in.o = tilt.size(3), in.r2 = spread.size(2);
  in.causal = causal, in.offset = offset;
  return in;
}

// A view of numbers as a tensor: (rows, columns), rows `stride` apart; or a batch of contiguous matrices.
Tensor matrix(const float* data, int64_t rows, int64_t columns, int64_t stride = 0) {
  return at::from_blob(const_cast<float*>(data), {rows, columns}, {stride ? stride : columns, 1}, at::kFloat);
}

Tensor matrices(const float* data, int64_t count, int64_t rows, int64_t columns) {
  return at::from_blob(const_cast<float*>(data), {count, rows, columns}, at::kFloat);
}

// Query blocks first..last-1 of one row, and what they can see.
struct Span {
  int64_t row, first, last;
  int64_t slots;  // exact blocks per query block that any of them can use
  int64_t limit;  // key blocks before which all their far blocks lie
};

int64_t blocks_per_span(const Inputs& in) {
  const int64_t near = in.T * in.b_k;
  const int64_t per_block = in.b_q * (near + 2 * in.K + in.o * in.v) + 2 * near * in.d;
  return std::clamp<int64_t>(kSpanNumbers / per_block, 1, in.Q);
}

Span span_at(const Inputs& in, int64_t row, int64_t first, int64_t step) {
  Span span{row, first, std::min(first + step, in.Q), in.T, in.K};
  if (in.causal) {
    const int64_t seen = (span.last * in.b_q - 1 + in.offset) / in.b_k + 1;
    span.limit = std::clamp<int64_t>(seen, 1, in.K);
    span.slots = std::min(in.T, span.limit);
  }
  return span;
}

// The softmax of one span after the other, with all arrays that it needs.
class Weights {
 public:
  std::vector<float> keys;    // (c, T'·b_k, d) of the exact blocks
  std::vector<float> values;  // (c, T'·b_k, v)
  std::vector<float> near;    // (c, b_q, T'·b_k), exponentials of the scores less their maximum
  std::vector<float> far;     // (c·b_q, K')
  std::vector<float> bonus;   // (c·b_q, K'), what the spread adds to a logit, before its limit
  std::vector<float> pairs;   // (c·b_q, r²), products of the coordinates
  std::vector<float> total;   // (c·b_q), what the exponentials add up to

  explicit Weights(const Inputs& in) : in_(in) {
    const int64_t c = blocks_per_span(in), n = c * in.b_q, near_keys = in.T * in.b_k;
    keys.resize(c * near_keys * in.d), values.resize(c * near_keys * in.v), near.resize(n * near_keys);
    far.resize(n * in.K), total.resize(n), size_.resize(in.K);
    if (in.r2) bonus.resize(n * in.K), pairs.resize(n * in.r2);
  }

  void compute(const Span& span) {
    const int64_t c = span.last - span.first, n = c * in_.b_q, near_keys = span.slots * in_.b_k;
    const int64_t key_row = span.row / in_.groups();
    const float* query = in_.query + (span.row * in_.Q + span.first) * in_.b_q * in_.d;
    gather(span, in_.key + key_row * in_.K * in_.b_k * in_.d, in_.b_k * in_.d, keys.data());
    gather(span, in_.value + key_row * in_.K * in_.b_k * in_.v, in_.b_k * in_.v, values.data());
    Tensor scores = matrices(near.data(), c, in_.b_q, near_keys);
    at::bmm_out(
        scores, matrices(query, c, in_.b_q, in_.d), matrices(keys.data(), c, near_keys, in_.d).transpose(1, 2));
    Tensor logits = matrix(far.data(), n, span.limit);
    at::mm_out(logits, matrix(query, n, in_.d), matrix(in_.centre + key_row * in_.K * in_.d, span.limit, in_.d).t());
    if (in_.r2) {
      multiply_pairs(span);
      Tensor added = matrix(bonus.data(), n, span.limit);
      const float* spread = in_.spread + span.row * in_.K * in_.r2;
      at::mm_out(added, matrix(pairs.data(), n, in_.r2), matrix(spread, span.limit, in_.r2).t());
    }
    for (int64_t block = span.first; block < span.last; ++block) {
      close(span, block);
      exponentiate(span, block);
    }
  }

  // Copies the exact blocks of each query block, `numbers` each, one after the other.
  void gather(const Span& span, const float* blocks, int64_t numbers, float* out) const {
    for (int64_t block = span.first; block < span.last; ++block) {
      const int64_t* chosen = in_.chosen + (span.row * in_.Q + block) * in_.T;
      for (int64_t slot = 0; slot < span.slots; ++slot, out += numbers) {
        std::memcpy(out, blocks + chosen[slot] * numbers, numbers * sizeof(float));
      }
    }
  }

 private:
  void multiply_pairs(const Span& span) {
    const int64_t n = (span.last - span.first) * in_.b_q, r = in_.o - 1;
    const float* tilt = in_.tilt + (span.row * in_.Q + span.first) * in_.b_q * in_.o;
    for (int64_t i = 0; i < n; ++i) {
      const float* a = tilt + i * in_.o + 1;
      float* out = pairs.data() + i * in_.r2;
      for (int64_t x = 0; x < r; ++x) {
        for (int64_t y = 0; y < r; ++y) out[x * r + y] = a[x] * a[y];
      }
    }
  }

  // Fills the scores of padding, of unused slots and of later keys.
  void close(const Span& span, int64_t block) {
    const int64_t key_row = span.row / in_.groups(), near_keys = span.slots * in_.b_k;
    const int64_t* chosen = in_.chosen + (span.row * in_.Q + block) * in_.T;
    const bool* slot_open = in_.slot_open ? in_.slot_open + (span.row * in_.Q + block) * in_.T : nullptr;
    float* scores = near.data() + (block - span.first) * in_.b_q * near_keys;
    const int64_t first_query = block * in_.b_q + in_.offset;
    for (int64_t slot = 0; slot < span.slots; ++slot) {
      const int64_t left = chosen[slot] * in_.b_k;
      const bool whole = slot_open && !slot_open[slot];
      const bool* key_open = in_.key_open ? in_.key_open + key_row * in_.K * in_.b_k + left : nullptr;
      const bool later = in_.causal && left + in_.b_k - 1 > first_query;
      if (!whole && !key_open && !later) continue;
      for (int64_t i = 0; i < in_.b_q; ++i) {
        float* x = scores + i * near_keys + slot * in_.b_k;
        int64_t open = in_.b_k;
        if (whole) open = 0;
        else if (later) open = std::clamp<int64_t>(first_query + i - left + 1, 0, in_.b_k);
        for (int64_t j = open; j < in_.b_k; ++j) x[j] = kLowest;
        if (key_open) {
          for (int64_t j = 0; j < open; ++j) x[j] = key_open[j] ? x[j] : kLowest;
        }
      }
    }
  }

  void exponentiate(const Span& span, int64_t block) {
    const int64_t near_keys = span.slots * in_.b_k, limit = span.limit;
    const bool* far_open = in_.far_open + (span.row * in_.Q + block) * in_.K;
    const float* log_count = in_.log_count + span.row * in_.K;
    for (int64_t k = 0; k < limit; ++k) size_[k] = far_open[k] ? log_count[k] : kLowest;
    for (int64_t i = 0; i < in_.b_q; ++i) {
      const int64_t n = (block - span.first) * in_.b_q + i;
      float* x = near.data() + n * near_keys;
      float* y = far.data() + n * limit;
      if (in_.r2) {
        const float* added = bonus.data() + n * limit;
        for (int64_t k = 0; k < limit; ++k) y[k] += std::min(added[k], kSpreadLimit);
      }
      for (int64_t k = 0; k < limit; ++k) y[k] += size_[k];
      const float highest = std::max(maximum(y, limit), maximum(x, near_keys));
      total[n] = exponentials(y, limit, highest) + exponentials(x, near_keys, highest);
    }
  }

  const Inputs& in_;
  std::vector<float> size_;  // (K'), logarithm of the keys of a far block
};

// (K', o·v) of one row, from (o, K, v): the moments of all orders of a block side by side.
void by_block(const Inputs& in, int64_t row, std::vector<float>& out) {
  for (int64_t order = 0; order < in.o; ++order) {
    for (int64_t k = 0; k < in.K; ++k) {
      const float* from = in.moments + ((row * in.o + order) * in.K + k) * in.v;
      std::memcpy(out.data() + (k * in.o + order) * in.v, from, in.v * sizeof(float));
    }
  }
}

Tensor forward(
    const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& centre, const Tensor& tilt,
    const Tensor& moments, const Tensor& spread, const Tensor& log_count, const Tensor& chosen,
    const optional<Tensor>& slot_open, const Tensor& far_open, const optional<Tensor>& key_open, bool causal,
    int64_t offset) {
  const Inputs in = unpack(
      query, key, value, centre, tilt, moments, spread, log_count, chosen, slot_open, far_open, key_open, causal,
      offset);
  Tensor output = at::empty({in.R, in.Q, in.b_q, in.v}, value.options());
  float* out = output.data_ptr<float>();
  const int64_t step = blocks_per_span(in), spans = (in.Q + step - 1) / step;
  at::parallel_for(0, in.R * spans, 1, [&](int64_t begin, int64_t end) {
    c10::InferenceMode no_autograd;
    Weights weights(in);
    std::vector<float> row_moments(in.K * in.o * in.v), combined(step * in.b_q * in.o * in.v);
    int64_t row_of_moments = -1;
    for (int64_t index = begin; index < end; ++index) {
      const Span span = span_at(in, index / spans, index % spans * step, step);
      if (span.row != row_of_moments) by_block(in, row_of_moments = span.row, row_moments);
      weights.compute(span);
      const int64_t c = span.last - span.first, n = c * in.b_q, near_keys = span.slots * in.b_k;
      float* span_out = out + (span.row * in.Q + span.first) * in.b_q * in.v;
      Tensor near_out = matrices(span_out, c, in.b_q, in.v);
      at::bmm_out(
          near_out, matrices(weights.near.data(), c, in.b_q, near_keys),
          matrices(weights.values.data(), c, near_keys, in.v));
      Tensor far_out = matrix(combined.data(), n, in.o * in.v);
      at::mm_out(
          far_out, matrix(weights.far.data(), n, span.limit), matrix(row_moments.data(), span.limit, in.o * in.v));
      const float* a = in.tilt + (span.row * in.Q + span.first) * in.b_q * in.o;
      for (int64_t i = 0; i < n; ++i) {
        float* y = span_out + i * in.v;
        for (int64_t order = 0; order < in.o; ++order) {
          const float* x = combined.data() + (i * in.o + order) * in.v;
          const float factor = a[i * in.o + order];
          for (int64_t f = 0; f < in.v; ++f) y[f] += factor * x[f];
        }
        const float scale = 1.0f / weights.total[i];
        for (int64_t f = 0; f < in.v; ++f) y[f] *= scale;
      }
    }
  });
  return output;
}

// Where the gradients go, and what one thread needs to find them.
struct Gradients {
  float *query, *key, *value, *centre, *tilt, *moments, *spread;
};

class Backward {
 public:
  Backward(const Inputs& in, const float* output, const float* grad, const Gradients& grads)
      : in_(in), output_(output), grad_(grad), grads_(grads), weights_(in), moments_(in.K * in.o * in.v),
        moment_grads_(in.K * in.o * in.v) {
    const int64_t n = blocks_per_span(in) * in.b_q, near_keys = in.T * in.b_k;
    flow_.resize(n * near_keys), far_flow_.resize(n * in.K), delta_.resize(n);
    gathered_.resize(n / in.b_q * near_keys * std::max(in.d, in.v));
    tilted_.resize(n * in.o * in.v), product_.resize(n * in.o * in.K), pair_grads_.resize(n * in.r2);
  }

  void row(int64_t row) {
    const int64_t step = blocks_per_span(in_);
    for (int64_t first = 0; first < in_.Q; first += step) span(span_at(in_, row, first, step));
  }

 private:
  void span(const Span& span) {
    weights_.compute(span);
    const int64_t n = (span.last - span.first) * in_.b_q, start = (span.row * in_.Q + span.first) * in_.b_q;
    const float *grad = grad_ + start * in_.v, *output = output_ + start * in_.v;
    // Through a softmax with weights P: dS = P∘(dP − Σ P dP), and Σ P dP = output · grad.
    for (int64_t i = 0; i < n; ++i) delta_[i] = dot(grad + i * in_.v, output + i * in_.v, in_.v);
    normalise(span);
    exact_blocks(span, grad);
    far_blocks(span, grad);
  }

  void normalise(const Span& span) {
    const int64_t n = (span.last - span.first) * in_.b_q, near_keys = span.slots * in_.b_k;
    for (int64_t i = 0; i < n; ++i) {
      const float scale = 1.0f / weights_.total[i];
      float *x = weights_.near.data() + i * near_keys, *y = weights_.far.data() + i * span.limit;
      for (int64_t j = 0; j < near_keys; ++j) x[j] *= scale;
      for (int64_t k = 0; k < span.limit; ++k) y[k] *= scale;
    }
  }

  void exact_blocks(const Span& span, const float* grad) {
    const int64_t c = span.last - span.first, near_keys = span.slots * in_.b_k, key_row = span.row / in_.groups();
    const int64_t start = (span.row * in_.Q + span.first) * in_.b_q;
    const Tensor grads = matrices(grad, c, in_.b_q, in_.v);
    Tensor flow = matrices(flow_.data(), c, in_.b_q, near_keys);
    at::bmm_out(flow, grads, matrices(weights_.values.data(), c, near_keys, in_.v).transpose(1, 2));
    for (int64_t i = 0; i < c * in_.b_q; ++i) {
      const float* p = weights_.near.data() + i * near_keys;
      float* x = flow_.data() + i * near_keys;
      for (int64_t j = 0; j < near_keys; ++j) x[j] = p[j] * (x[j] - delta_[i]);
    }
    const Tensor near = matrices(weights_.near.data(), c, in_.b_q, near_keys);
    Tensor gathered = matrices(gathered_.data(), c, near_keys, in_.v);
    at::bmm_out(gathered, near.transpose(1, 2), grads);
    scatter(span, grads_.value + key_row * in_.K * in_.b_k * in_.v, in_.b_k * in_.v);
    Tensor query_grads = matrices(grads_.query + start * in_.d, c, in_.b_q, in_.d);
    at::bmm_out(query_grads, flow, matrices(weights_.keys.data(), c, near_keys, in_.d));
    gathered = matrices(gathered_.data(), c, near_keys, in_.d);
    at::bmm_out(gathered, flow.transpose(1, 2), matrices(in_.query + start * in_.d, c, in_.b_q, in_.d));
    scatter(span, grads_.key + key_row * in_.K * in_.b_k * in_.d, in_.b_k * in_.d);
  }

  // Adds what `gathered_` holds for each exact block, `numbers` each, to the blocks of the row.
  void scatter(const Span& span, float* blocks, int64_t numbers) const {
    const float* from = gathered_.data();
    for (int64_t block = span.first; block < span.last; ++block) {
      const int64_t* chosen = in_.chosen + (span.row * in_.Q + block) * in_.T;
      for (int64_t slot = 0; slot < span.slots; ++slot, from += numbers) {
        float* to = blocks + chosen[slot] * numbers;
        for (int64_t i = 0; i < numbers; ++i) to[i] += from[i];
      }
    }
  }

  void far_blocks(const Span& span, const float* grad) {
    const int64_t n = (span.last - span.first) * in_.b_q, start = (span.row * in_.Q + span.first) * in_.b_q;
    const int64_t limit = span.limit, key_row = span.row / in_.groups();
    const float* tilt = in_.tilt + start * in_.o;
    float* tilt_grads = grads_.tilt + start * in_.o;

    for (int64_t i = 0; i < n; ++i) {
      for (int64_t order = 0; order < in_.o; ++order) {
        float* x = tilted_.data() + (i * in_.o + order) * in_.v;
        for (int64_t f = 0; f < in_.v; ++f) x[f] = tilt[i * in_.o + order] * grad[i * in_.v + f];
      }
    }
    Tensor moment_grads = matrix(moment_grads_.data(), limit, in_.o * in_.v);
    at::mm_out(moment_grads, matrix(weights_.far.data(), n, limit).t(), matrix(tilted_.data(), n, in_.o * in_.v));
    for (int64_t order = 0; order < in_.o; ++order) {
      for (int64_t k = 0; k < limit; ++k) {
        const float* from = moment_grads_.data() + (k * in_.o + order) * in_.v;
        float* to = grads_.moments + ((span.row * in_.o + order) * in_.K + k) * in_.v;
        for (int64_t f = 0; f < in_.v; ++f) to[f] += from[f];
      }
    }

    // Products of the gradient with the moments of every order: (n, o, K').
    const Tensor grads = matrix(grad, n, in_.v);
    for (int64_t order = 0; order < in_.o; ++order) {
      Tensor product = matrix(product_.data() + order * limit, n, limit, in_.o * limit);
      const float* moments = in_.moments + (span.row * in_.o + order) * in_.K * in_.v;
      at::mm_out(product, grads, matrix(moments, limit, in_.v).t());
    }
    for (int64_t i = 0; i < n; ++i) {
      const float* p = weights_.far.data() + i * limit;
      float* flow = far_flow_.data() + i * limit;
      for (int64_t k = 0; k < limit; ++k) flow[k] = -delta_[i];
      for (int64_t order = 0; order < in_.o; ++order) {
        const float* x = product_.data() + (i * in_.o + order) * limit;
        const float a = tilt[i * in_.o + order];
        tilt_grads[i * in_.o + order] = dot(p, x, limit);
        for (int64_t k = 0; k < limit; ++k) flow[k] += a * x[k];
      }
      for (int64_t k = 0; k < limit; ++k) flow[k] *= p[k];
    }

    const Tensor flow = matrix(far_flow_.data(), n, limit);
    Tensor centre_grads = matrix(grads_.centre + key_row * in_.K * in_.d, limit, in_.d);
    centre_grads.addmm_(flow.t(), matrix(in_.query + start * in_.d, n, in_.d));
    Tensor query_grads = matrix(grads_.query + start * in_.d, n, in_.d);
    query_grads.addmm_(flow, matrix(in_.centre + key_row * in_.K * in_.d, limit, in_.d));
    if (in_.r2) spread(span, flow, tilt, tilt_grads);
  }

  void spread(const Span& span, const Tensor& flow, const float* tilt, float* tilt_grads) {
    const int64_t n = flow.size(0), limit = span.limit, r = in_.o - 1;
    for (int64_t i = 0; i < n * limit; ++i) {
      if (weights_.bonus[i] >= kSpreadLimit) far_flow_[i] = 0.0f;
    }
    Tensor spread_grads = matrix(grads_.spread + span.row * in_.K * in_.r2, limit, in_.r2);
    spread_grads.addmm_(flow.t(), matrix(weights_.pairs.data(), n, in_.r2));
    Tensor pair_grads = matrix(pair_grads_.data(), n, in_.r2);
    at::mm_out(pair_grads, flow, matrix(in_.spread + span.row * in_.K * in_.r2, limit, in_.r2));
    for (int64_t i = 0; i < n; ++i) {
      const float *a = tilt + i * in_.o + 1, *g = pair_grads_.data() + i * in_.r2;
      for (int64_t x = 0; x < r; ++x) {
        float sum = 0.0f;
        for (int64_t y = 0; y < r; ++y) sum += (g[x * r + y] + g[y * r + x]) * a[y];
        tilt_grads[i * in_.o + 1 + x] += sum;
      }
    }
  }

  const Inputs& in_;
  const float *output_, *grad_;
  const Gradients& grads_;
  Weights weights_;
  std::vector<float> moments_, moment_grads_, flow_, far_flow_, delta_, gathered_, tilted_, product_, pair_grads_;
};

std::vector<Tensor> backward(
    const Tensor& output, const Tensor& grad, const Tensor& query, const Tensor& key, const Tensor& value,
    const Tensor& centre, const Tensor& tilt, const Tensor& moments, const Tensor& spread, const Tensor& log_count,
    const Tensor& chosen, const optional<Tensor>& slot_open, const Tensor& far_open, const optional<Tensor>& key_open,
    bool causal, int64_t offset) {
  const Inputs in = unpack(
      query, key, value, centre, tilt, moments, spread, log_count, chosen, slot_open, far_open, key_open, causal,
      offset);
  std::vector<Tensor> results;
  for (const Tensor& x : {query, key, value, centre, tilt, moments, spread}) results.push_back(at::zeros_like(x));
  Gradients grads;
  float** places[] = {&grads.query, &grads.key, &grads.value, &grads.centre, &grads.tilt, &grads.moments, &grads.spread};
  for (size_t i = 0; i < results.size(); ++i) *places[i] = results[i].data_ptr<float>();
  const float *out = floats(output), *out_grad = floats(grad);
  // By rows of keys: no two threads add to the gradient of one key.
  at::parallel_for(0, in.R_kv, 1, [&](int64_t begin, int64_t end) {
    c10::InferenceMode no_autograd;
    Backward worker(in, out, out_grad, grads);
    for (int64_t row = begin * in.groups(); row < end * in.groups(); ++row) worker.row(row);
  });
  return results;
}

// Share of the weight that mean queries (b, h, Q, g, d) put on each block of keys (b, h_kv, K, b_k, d): (b, h, Q, g, K).
// Blocks count where far_open (b | 1, Q | 1, K) allows, keys where key_open (b | 1, K, b_k) does.
Tensor probe_mass(const Tensor& probes, const Tensor& key, const optional<Tensor>& key_open, const Tensor& far_open) {
  const int64_t b = probes.size(0), h = probes.size(1), Q = probes.size(2), g = probes.size(3), d = probes.size(4);
  const int64_t h_kv = key.size(1), K = key.size(2), b_k = key.size(3), n_k = K * b_k;
  const float *probe = floats(probes), *keys = floats(key);
  const bool *open = bools(key_open), *far = bools(far_open);
  Tensor mass = at::empty({b, h, Q, g, K}, probes.options());
  float* out = mass.data_ptr<float>();
  const int64_t step = std::clamp<int64_t>(kSpanNumbers / (g * n_k), 1, Q), parts = (Q + step - 1) / step;
  at::parallel_for(0, b * h * parts, 1, [&](int64_t begin, int64_t end) {
    c10::InferenceMode no_autograd;
    std::vector<float> scores(step * g * n_k);
    for (int64_t index = begin; index < end; ++index) {
      const int64_t row = index / parts, sample = row / h, first = index % parts * step;
      const int64_t count = std::min(step, Q - first) * g, key_row = sample * h_kv + row % h / (h / h_kv);
      Tensor part = matrix(scores.data(), count, n_k);
      at::mm_out(part, matrix(probe + (row * Q + first) * g * d, count, d), matrix(keys + key_row * n_k * d, n_k, d).t());
      for (int64_t i = 0; i < count; ++i) {
        const int64_t block = far_open.size(1) == 1 ? 0 : first + i / g;
        const bool* usable = far + ((far_open.size(0) == 1 ? 0 : sample) * far_open.size(1) + block) * K;
        const bool* key_usable = open ? open + (key_open->size(0) == 1 ? 0 : sample) * n_k : nullptr;
        float* x = scores.data() + i * n_k;
        for (int64_t k = 0; k < K; ++k) {
          float* y = x + k * b_k;
          if (!usable[k]) std::fill(y, y + b_k, kLowest);
          for (int64_t j = 0; key_usable && j < b_k; ++j) y[j] = key_usable[k * b_k + j] ? y[j] : kLowest;
        }
        const float highest = maximum(x, n_k);
        float* shares = out + ((row * Q + first) * g + i) * K;
        float sum = 0.0f;
        for (int64_t k = 0; k < K; ++k) sum += shares[k] = exponentials(x + k * b_k, b_k, highest);
        for (int64_t k = 0; k < K; ++k) shares[k] /= sum;
      }
    }
  });
  return mass;
}

}  // namespace

TORCH_LIBRARY(approx_attn_cpu, library) {
  library.def(
      "forward(Tensor query, Tensor key, Tensor value, Tensor centre, Tensor tilt, Tensor moments, Tensor spread, "
      "Tensor log_count, Tensor chosen, Tensor? slot_open, Tensor far_open, Tensor? key_open, bool causal, int offset) "
      "-> Tensor",
      &forward);
  library.def(
      "backward(Tensor output, Tensor grad, Tensor query, Tensor key, Tensor value, Tensor centre, Tensor tilt, "
      "Tensor moments, Tensor spread, Tensor log_count, Tensor chosen, Tensor? slot_open, Tensor far_open, "
      "Tensor? key_open, bool causal, int offset) -> Tensor[]",
      &backward);
  library.def("probe_mass(Tensor probes, Tensor key, Tensor? key_open, Tensor far_open) -> Tensor", &probe_mass);
}
