// Attention over exact keys and cluster moments on the CPU: `cluster_attention` of kernels/cluster.py, forward and backward.
//
// A pass is two parallel regions: runs are cut into clusters, then blocks of queries (forward) or heads (backward) are
// taken from one counter by ATen's threads, so that a thread that another process slows down takes fewer of them.
// Everything of a block stays in the cache of its core: products are the BLAS's that PyTorch brings (single-threaded
// inside of a parallel region), all between them is fused here.
//
// Letters: b samples, h heads, g = h / h_kv heads per key head, n keys in runs of R, clusters of L keys, C = clusters of
// all runs, Q blocks of up to R queries, d and v features of keys and values (multiples of kLanes), r coordinates,
// f = r (r + 1) / 2 pairs of them (0 at order 0), o = 1 + r value moments per cluster (1 below order 2).

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#ifdef __AVX512F__
#include <immintrin.h>
#endif

#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <optional>
#include <utility>
#include <vector>

// Column-major, as every BLAS has it; PyTorch's library exports the one that it was built with.
extern "C" void sgemm_(
    const char*, const char*, const int*, const int*, const int*, const float*, const float*, const int*, const float*,
    const int*, const float*, float*, const int*);

namespace {

using at::Tensor;
using std::optional;

constexpr float kSpreadLimit = 2.0f;  // SPREAD_LIMIT of kernels/cluster.py
constexpr float kLowest = std::numeric_limits<float>::lowest() / 4;
constexpr int64_t kLanes = 16;
constexpr int64_t kTogether = 8;  // blocks of queries that visit their own clusters together
constexpr int64_t kPanel = 32;  // clusters whose logits are computed side by side

// -- vectors ------------------------------------------------------------------------------------------------------------

typedef float Vector __attribute__((vector_size(64), aligned(4), may_alias));
typedef int32_t Lanes __attribute__((vector_size(64)));

inline Vector load(const float* x) { return *reinterpret_cast<const Vector*>(x); }
inline void store(float* x, Vector y) { *reinterpret_cast<Vector*>(x) = y; }

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

// Square roots of positive numbers to a relative 1e-7, about zero for others; the processor's own take twice as long.
inline Vector square_root(Vector x) {
  const Vector least = Vector{} + 1e-30f;
  x = x > least ? x : least;
#ifdef __AVX512F__
  const Vector y = reinterpret_cast<Vector>(_mm512_rsqrt14_ps(reinterpret_cast<__m512>(x)));
  return x * y * (1.5f - 0.5f * x * y * y);
#else
  for (int i = 0; i < kLanes; ++i) x[i] = std::sqrt(x[i]);
  return x;
#endif
}

inline float maximum(const float* x, int64_t n) {
  float highest = kLowest;
#pragma omp simd reduction(max : highest)
  for (int64_t i = 0; i < n; ++i) highest = x[i] > highest ? x[i] : highest;  // std::max would not use vectors
  return highest;
}

// What the weights of a query without a usable score are: nothing, or not a number where a score is none either.
inline float no_weight(const float* x, int64_t n) {
  return std::any_of(x, x + n, [](float score) { return std::isnan(score); }) ? NAN : 0.0f;
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

// Two vectors of groups of `width` lanes into one of groups of half the width: each group's halves are added.
template <int width, size_t... lane>
inline Vector fold(Vector x, Vector y, std::index_sequence<lane...>) {
  constexpr int half = width / 2;
  const Lanes low = {static_cast<int32_t>((lane / half) % 2 * 16 + lane / width * width + lane % half)...};
  return __builtin_shuffle(x, y, low) + __builtin_shuffle(x, y, low + half);
}

// Products of `group` rows x with 16 / group rows from y on (of n numbers each; the last of `rows` again where there are
// fewer), by x and then by y.
template <int width, int group>
inline Vector dots(const float* const* x, const float* y, int64_t rows, int64_t n) {
  const int64_t w = width ? width : n / kLanes;
  constexpr int size = 16 / group;
  Vector sums[16];
  for (int g = 0; g < group; ++g) {
    for (int j = 0; j < size; ++j) {
      const float* row = y + (j < rows ? j : rows - 1) * n;
      Vector sum = load(x[g]) * load(row);
      for (int64_t i = 1; i < w; ++i) sum += load(x[g] + 16 * i) * load(row + 16 * i);
      sums[g * size + j] = sum;
    }
  }
  constexpr auto lanes = std::make_index_sequence<16>();
  for (int j = 0; j < 8; ++j) sums[j] = fold<16>(sums[j], sums[j + 8], lanes);
  for (int j = 0; j < 4; ++j) sums[j] = fold<8>(sums[j], sums[j + 4], lanes);
  for (int j = 0; j < 2; ++j) sums[j] = fold<4>(sums[j], sums[j + 2], lanes);
  return fold<2>(sums[0], sums[1], lanes);
}

// to += Σ_j weights(j) · row(j), all of n numbers
template <int width, typename Weights, typename Rows>
inline void add_rows(float* to, int64_t count, int64_t n, const Weights& weights, const Rows& row) {
  if constexpr (width > 0) {
    Vector sums[width];
    for (int i = 0; i < width; ++i) sums[i] = load(to + 16 * i);
    for (int64_t j = 0; j < count; ++j) {
      const float weight = weights(j);
      const float* x = row(j);
      for (int i = 0; i < width; ++i) sums[i] += weight * load(x + 16 * i);
    }
    for (int i = 0; i < width; ++i) store(to + 16 * i, sums[i]);
  } else {
    for (int64_t j = 0; j < count; ++j)
      for (int64_t i = 0; i < n; i += 16) store(to + i, load(to + i) + weights(j) * load(row(j) + i));
  }
}

// Bit i says whether x[i] reaches `least` (is above it), for 16 numbers.
inline uint32_t reaching(const float* x, float least) {
#ifdef __AVX512F__
  return _mm512_cmp_ps_mask(_mm512_loadu_ps(x), _mm512_set1_ps(least), _CMP_GE_OQ);
#else
  uint32_t bits = 0;
  for (int i = 0; i < 16; ++i) bits |= static_cast<uint32_t>(x[i] >= least) << i;
  return bits;
#endif
}

inline uint32_t above(const float* x, float least) {
#ifdef __AVX512F__
  return _mm512_cmp_ps_mask(_mm512_loadu_ps(x), _mm512_set1_ps(least), _CMP_GT_OQ);
#else
  uint32_t bits = 0;
  for (int i = 0; i < 16; ++i) bits |= static_cast<uint32_t>(x[i] > least) << i;
  return bits;
#endif
}

// How many of n numbers come before number i in ascending order, equal ones by place. Read in whole vectors.
inline int64_t before(const float* x, int64_t n, int64_t i) {
  int64_t count = 0;
  for (int64_t j = 0; j < n; j += kLanes) {
    const uint32_t lower = ~reaching(x + j, x[i]) & 0xFFFF, equal = reaching(x + j, x[i]) & ~above(x + j, x[i]);
    const uint32_t earlier = j > i ? 0 : i - j >= kLanes ? 0xFFFF : (1u << (i - j)) - 1;
    count += __builtin_popcount(lower | (equal & earlier));
  }
  return count;
}

// Calls `body` with the number of vectors in a row as a constant where it is a usual one, else with 0.
template <typename Body>
inline void by_width(int64_t vectors, const Body& body) {
  if (vectors == 1) return body(std::integral_constant<int, 1>());
  if (vectors == 2) return body(std::integral_constant<int, 2>());
  if (vectors == 4) return body(std::integral_constant<int, 4>());
  if (vectors == 8) return body(std::integral_constant<int, 8>());
  body(std::integral_constant<int, 0>());
}

// Calls `body` with how many queries fill a vector with their products with the keys of a cluster.
template <typename Body>
inline void by_group(int64_t cluster, const Body& body) {
  if (cluster == 8) return body(std::integral_constant<int, 2>());
  if (cluster == 4) return body(std::integral_constant<int, 4>());
  if (cluster == 2) return body(std::integral_constant<int, 8>());
  if (cluster == 1) return body(std::integral_constant<int, 16>());
  body(std::integral_constant<int, 1>());
}

// -- products of row-major matrices: c (m × n) = a · b + beta · c ----------------------------------------------------------

void gemm(
    char a_order, char b_order, int64_t m, int64_t n, int64_t k, const float* a, int64_t a_stride, const float* b,
    int64_t b_stride, float beta, float* c, int64_t c_stride) {
  if (m == 0 || n == 0 || k == 0) return;
  const int rows = m, columns = n, inner = k, lda = a_stride, ldb = b_stride, ldc = c_stride;
  const float one = 1.0f;
  sgemm_(&b_order, &a_order, &columns, &rows, &inner, &one, b, &ldb, a, &lda, &beta, c, &ldc);
}

// `rows` rows of a, `vectors` vectors of columns of b.
template <int rows, int vectors>
inline void product_tile(
    int64_t k, const float* a, int64_t a_stride, const float* b, int64_t b_stride, bool add, float* c, int64_t c_stride) {
  Vector sums[rows][vectors] = {};
  for (int64_t x = 0; x < k; ++x, b += b_stride)
    for (int i = 0; i < rows; ++i)
      for (int w = 0; w < vectors; ++w) sums[i][w] += a[i * a_stride + x] * load(b + w * kLanes);
  for (int i = 0; i < rows; ++i)
    for (int w = 0; w < vectors; ++w) {
      float* to = c + i * c_stride + w * kLanes;
      store(to, add ? load(to) + sums[i][w] : sums[i][w]);
    }
}

// a (m × k) · b (k × n), with n in whole vectors: few columns, for which the BLAS is not made.
void product(
    int64_t m, int64_t n, int64_t k, const float* a, int64_t a_stride, const float* b, int64_t b_stride, bool add,
    float* c, int64_t c_stride) {
  const auto columns = [&](auto vectors, int64_t j) {
    int64_t i = 0;
    const auto tiles = [&](auto rows) {
      for (; i + rows <= m; i += rows)
        product_tile<rows, vectors>(k, a + i * a_stride, a_stride, b + j, b_stride, add, c + i * c_stride + j, c_stride);
    };
    tiles(std::integral_constant<int, 6>()), tiles(std::integral_constant<int, 4>()), tiles(std::integral_constant<int, 1>());
  };
  int64_t j = 0;
  for (; j + 4 * kLanes <= n; j += 4 * kLanes) columns(std::integral_constant<int, 4>(), j);
  for (; j + 2 * kLanes <= n; j += 2 * kLanes) columns(std::integral_constant<int, 2>(), j);
  for (; j < n; j += kLanes) columns(std::integral_constant<int, 1>(), j);
}

// a (m × k) · b (n × k)ᵀ
void product_bt(
    int64_t m, int64_t n, int64_t k, const float* a, int64_t a_stride, const float* b, int64_t b_stride, float beta,
    float* c, int64_t c_stride) {
  gemm('N', 'T', m, n, k, a, a_stride, b, b_stride, beta, c, c_stride);
}

// a (k × m)ᵀ · b (k × n)
void product_at(
    int64_t m, int64_t n, int64_t k, const float* a, int64_t a_stride, const float* b, int64_t b_stride, float beta,
    float* c, int64_t c_stride) {
  gemm('T', 'N', m, n, k, a, a_stride, b, b_stride, beta, c, c_stride);
}

// -- dropout --------------------------------------------------------------------------------------------------------------

// Which weights are dropped is a function of the seed, the query and the key or cluster, so that the backward pass finds
// the same ones. Ids: keys first, then clusters.
struct Dropout {
  float p;
  uint64_t seed;

  // Drops among the weights of a query, id(j) each, and scales the rest.
  template <typename Id>
  void drop(float* weights, int64_t n, int64_t row, const Id& id) const {
    if (p == 0.0f) return;
    const uint32_t salt = salted(row);
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) weights[j] *= factor(salt, id(j));
  }

  // Through softmax and dropout: `flow` holds the gradients of the dropped weights and gets those of the scores.
  template <typename Id>
  void back(float* weights, float* flow, int64_t n, float delta, int64_t row, const Id& id) const {
    const uint32_t salt = salted(row);
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) {
      const float scale = p == 0.0f ? 1.0f : factor(salt, id(j));
      flow[j] = weights[j] * (scale * flow[j] - delta);
      weights[j] *= scale;
    }
  }

 private:
  // The finaliser of splitmix64 (Steele, Lea and Flood 2014).
  uint32_t salted(int64_t row) const {
    uint64_t x = seed + 0x9E3779B97F4A7C15u * static_cast<uint64_t>(row + 1);
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9u;
    x = (x ^ x >> 27) * 0x94D049BB133111EBu;
    return static_cast<uint32_t>(x >> 32);
  }

  // A finaliser of 32 bits (Wellons, hash-prospector), which a processor has vectors for.
  float factor(uint32_t salt, uint32_t id) const {
    uint32_t x = id * 0x9E3779B1u ^ salt;
    x = (x ^ x >> 16) * 0x7FEB352Du;
    x = (x ^ x >> 15) * 0x846CA68Bu;
    x ^= x >> 16;
    return static_cast<float>(x >> 8) < p * 16777216.0f ? 0.0f : 1.0f / (1.0f - p);
  }
};

// -- the problem ---------------------------------------------------------------------------------------------------------

const float* floats(const Tensor& x) {
  TORCH_CHECK(x.is_contiguous() && x.scalar_type() == at::kFloat, "cluster attention takes contiguous float32");
  return x.const_data_ptr<float>();
}

struct Problem {
  Tensor query_maps, key_maps;  // (h, d, s)
  const float *query, *key, *value, *query_map, *key_map;
  const bool* key_open;  // (b, n), null if all are
  const int64_t* plan;   // (b | 1, Q, 5): far_first, far_last, near_first, near_last (runs), own (clusters)
  int64_t b, h, h_kv, n_q, n, d, v, r, Q, plan_samples;
  int64_t R, L, order, offset, window;
  bool causal;
  Dropout dropout;

  int64_t runs() const { return (n + R - 1) / R; }
  int64_t per_run() const { return R / L; }
  int64_t C() const { return runs() * per_run(); }
  int64_t panels() const { return (C() + kPanel - 1) / kPanel; }
  int64_t f() const { return order > 0 ? r * (r + 1) / 2 : 0; }
  int64_t o() const { return order > 1 ? 1 + r : 1; }
  const float* keys(int64_t head) const { return key + key_head(head) * n * d; }
  const float* values(int64_t head) const { return value + key_head(head) * n * v; }
  int64_t key_head(int64_t head) const { return head / h * h_kv + head % h / (h / h_kv); }  // head counts samples too
  int64_t s() const { return (r + kLanes - 1) / kLanes * kLanes; }  // between rows of maps and of coordinates
  bool open(int64_t head, int64_t j) const { return j < n && (!key_open || key_open[head / h * n + j]); }
};

Problem unpack(
    const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& query_map, const Tensor& key_map,
    const optional<Tensor>& key_open, const Tensor& plan, bool causal, int64_t offset, int64_t window, int64_t run,
    int64_t cluster, int64_t order, double dropout_p, int64_t seed) {
  Problem p;
  p.dropout = {static_cast<float>(dropout_p), static_cast<uint64_t>(seed)};
  p.query = floats(query), p.key = floats(key), p.value = floats(value);
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
  TORCH_CHECK(p.d % kLanes == 0 && p.v % kLanes == 0, "cluster attention takes features in multiples of 16");
  return p;
}

// Runs `body(state, task)` for all tasks, each thread with a state of its own, in any order.
template <typename State, typename Body>
void for_each_task(int64_t tasks, const Body& body) {
  std::atomic<int64_t> next{0};
  at::parallel_for(0, std::min<int64_t>(at::get_num_threads(), tasks), 1, [&](int64_t, int64_t) {
    State state;
    for (int64_t task = next++; task < tasks; task = next++) body(state, task);
  });
}

int64_t rounded(int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }

float* resized(std::vector<float>& x, int64_t n) {
  if (static_cast<int64_t>(x.size()) < n) x.resize(n);
  return x.data();
}

// -- clusters ------------------------------------------------------------------------------------------------------------

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
  std::vector<float> coordinates_, pairs_, far_, bonus_, near_;
  float *coordinates, *pairs;  // (count, r), (count, f): aₓ·a_y
  float *far_weights, *bonus, *near_weights;  // (count, width) twice, (count, near)

  int64_t row() const { return head * p->n_q + first; }  // of the first query among all
  int64_t near_size() const { return near[0].size() + near[1].size(); }
  const float* queries() const { return p->query + (head * p->n_q + first) * p->d; }

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
    const float* map = p->query_map + head % p->h * p->d * p->s();
    product(count, p->s(), p->d, queries(), p->d, map, p->s(), false, coordinates, p->s());
    for (int64_t i = 0; f && i < count; ++i) {
      const float* a = coordinates + i * p->s();
      float* to = pairs + i * f;
      for (int64_t x = 0; x < r; ++x)
        for (int64_t y = x; y < r; ++y) *to++ = a[x] * a[y];
    }
    for (int64_t c = 0; c < width; c += kPanel) {
      const float* panel = clusters.panels + (head * p->panels() + (base + c) / kPanel) * (p->d + f + 1) * kPanel;
      constexpr int kRows = 6;
      const int64_t step = count < kRows ? 1 : kRows;
      for (int64_t start = 0; start < count; start += step) {
        const int64_t i = std::min(start, count - step);  // the last rows twice where they do not fill a tile
        const auto tile = step == 1 ? logits_tile<1> : logits_tile<kRows>;
        tile(queries() + i * p->d, p->d, pairs + i * f, f, panel, far_weights + i * width + c, bonus + i * width + c, width);
      }
    }
    for (int64_t i = 0; width && i < count; ++i) {  // what whole panels have beside the far clusters: chosen after empty ones
      float* x = far_weights + i * width;
      std::fill(x, x + far.first - base, 2 * kLowest), std::fill(x + far.last - base, x + width, 2 * kLowest);
    }
    int64_t column = 0;
    for (const Range& range : near) {
      if (!range.size()) continue;
      product_bt(
          count, range.size(), p->d, queries(), p->d, p->keys(head) + range.first * p->d, p->d, 0.0f,
          near_weights + column, near_size());
      close(range, near_weights + column);
      column += range.size();
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

// The `count` highest of n numbers, a multiple of kLanes; lower places first among equals.
class Highest {
 public:
  void find(const float* x, int64_t n, int64_t count, int32_t* places) {
    const float least = n > kFew ? threshold(groups(x, n, count), count) : kNone;
    values_.resize(n + kLanes), places_.resize(n);
    int64_t found = n;
    if (least > kNone) {
      found = 0;
      for (int64_t i = 0; i < n; i += kLanes)
        for (uint32_t bits = reaching(x + i, least); bits; bits &= bits - 1, ++found) {
          const int64_t place = i + __builtin_ctz(bits);
          values_[found] = x[place], places_[found] = place;
        }
      std::fill_n(values_.begin() + found, kLanes, kNone);
    } else {
      std::copy_n(x, n, values_.begin()), std::iota(places_.begin(), places_.end(), 0);
    }
    const float bound = threshold(found, count);
    int64_t kept = 0;
    if (reached(found, bound) > count) kept = sorted(found, count, places);  // equal numbers
    for (int64_t i = 0; kept < count && i < found; i += kLanes)
      for (uint32_t bits = reaching(values_.data() + i, bound); bits && kept < count; bits &= bits - 1)
        places[kept++] = places_[i + __builtin_ctz(bits)];
    while (kept < count) places[kept++] = 0;  // NaN reaches nothing: its query has NaN for an output, whatever is chosen
  }

 private:
  static constexpr float kNone = kLowest * 4;
  static constexpr int64_t kFew = 128;  // numbers of which all are looked at in each step of a search

  // Fills values_ with the highest of interleaved groups, more than `count` of them; returns how many. At least `count` of
  // the x reach what `count` of these reach.
  int64_t groups(const float* x, int64_t n, int64_t count) {
    const int64_t size = std::min(rounded(count + count / 2), n);
    values_.resize(n + kLanes);
    std::copy_n(x, size, values_.begin());
    for (int64_t start = size; start + size <= n; start += size)
      for (int64_t i = 0; i < size; i += kLanes) {
        const Vector old = load(values_.data() + i), next = load(x + start + i);
        store(values_.data() + i, next > old ? next : old);
      }
    return size;
  }

  int64_t reached(int64_t n, float least) const {
    int64_t count = 0;
    for (int64_t i = 0; i < n; i += kLanes) count += __builtin_popcount(reaching(values_.data() + i, least));
    return count;
  }

  // A number that `count` of the first n values reach, or a few more where some are equal or far below the highest: by
  // halving, without branches that a processor cannot foresee.
  float threshold(int64_t n, int64_t count) const {
    float high = maximum(values_.data(), rounded(n)), low = high - 32.0f;
    if (reached(n, low) < count) return kNone;
    for (int step = 0; step < 40; ++step) {
      const float middle = 0.5f * (low + high);
      const int64_t above = reached(n, middle);
      if (above == count) return middle;
      low = above > count ? middle : low, high = above > count ? high : middle;
    }
    return low;
  }

  int64_t sorted(int64_t found, int64_t count, int32_t* places) {
    order_.resize(found);
    std::iota(order_.begin(), order_.end(), 0);
    const auto higher = [&](int32_t a, int32_t b) { return values_[a] != values_[b] ? values_[a] > values_[b] : a < b; };
    std::nth_element(order_.begin(), order_.begin() + count - 1, order_.end(), higher);
    for (int64_t i = 0; i < count; ++i) places[i] = places_[order_[i]];
    return count;
  }

  std::vector<float> values_;
  std::vector<int32_t> places_, order_;
};

// -- forward -------------------------------------------------------------------------------------------------------------

struct Forward {
  Block block;
  Own own;
  Highest highest;
  std::vector<float> rating, moments;

  // Blocks first..last-1 of one head.
  void run(
      const Problem& p, int64_t head, Range blocks, const Clusters& clusters, int32_t* chosen, int64_t most,
      float* output, float* lse) {
    int64_t start = -1, count = 0;
    for (int64_t index = blocks.first; index < blocks.last; ++index) {
      block.place(p, head * p.Q + index);
      const int64_t row = head * p.n_q + block.first;
      others(p, clusters, chosen + row * most, most, output + row * p.v, lse + row);
      start = start < 0 ? row : start, count += block.count;
    }
    if (most) own_clusters(p, head, start, count, clusters, chosen + start * most, most, output + start * p.v, lse + start);
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
      lse[i] = softmax(i);
    }
    int64_t column = 0;
    for (const Range& range : block.near) {
      product(
          block.count, v, range.size(), block.near_weights + column, block.near_size(),
          p.values(block.head) + range.first * v, v, true, output, v);
      column += range.size();
    }
    const float* far = clusters.moments + (block.head * p.C() + block.far.first) * o * v;
    if (!size) return;
    const float* weights = block.far_weights + block.far.first - block.base;
    if (o == 1) return product(block.count, v, size, weights, width, far, v, true, output, v);
    float* sums = resized(moments, block.count * o * v);
    product(block.count, o * v, size, weights, width, far, o * v, false, sums, o * v);
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
    own.scores(p.query + row * p.d, clusters);
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
      for (int64_t j = 0; j < own.stride; ++j) x[j] /= sum;
      own.for_each_of(chosen + i * most, most, clusters, [&](int64_t at, const int32_t* keys) {
        p.dropout.drop(x + at, p.L, row + i, [&](int64_t l) { return keys[l]; });
      });
      for (int64_t t = 0; t < p.v; ++t) output[i * p.v + t] *= others / sum;
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

Tensor numbers(std::initializer_list<int64_t> shape, const Tensor& like) { return at::empty(shape, like.options()); }

// Output (b, h, n_q, v), then what backward needs: log-sum-exp, own clusters, members, centre, moments, spread, log_count.
std::vector<Tensor> forward(
    const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& query_map, const Tensor& key_map,
    const optional<Tensor>& key_open, const Tensor& plan, bool causal, int64_t offset, int64_t window, int64_t run,
    int64_t cluster, int64_t order, double dropout_p, int64_t seed, int64_t most) {
  const Problem p =
      unpack(query, key, value, query_map, key_map, key_open, plan, causal, offset, window, run, cluster, order, dropout_p, seed);
  const int64_t heads = p.b * p.h, C = p.C();
  const auto places = query.options().dtype(at::kInt);
  Tensor output = numbers({p.b, p.h, p.n_q, p.v}, query), lse = numbers({p.b, p.h, p.n_q}, query);
  Tensor own = at::empty({p.b, p.h, p.n_q, most}, places), members = at::empty({heads, C, p.L}, places);
  Tensor centre = numbers({heads, C, p.d}, query), moments = numbers({heads, C, p.o(), p.v}, query);
  Tensor spread = numbers({heads, C, p.f()}, query), log_count = numbers({heads, C}, query);
  Tensor sorted_key = numbers({heads, C, p.L, p.d}, query), sorted_value = numbers({heads, C, p.L, p.v}, query);
  Tensor panels = numbers({heads, p.panels(), p.d + p.f() + 1, kPanel}, query);
  const Clusters clusters{
      members.data_ptr<int32_t>(), sorted_key.data_ptr<float>(), sorted_value.data_ptr<float>(),
      centre.data_ptr<float>(), moments.data_ptr<float>(), spread.data_ptr<float>(), log_count.data_ptr<float>(),
      panels.data_ptr<float>()};
  make_clusters(p, clusters), pack_all(p, clusters);
  int32_t* chosen = own.data_ptr<int32_t>();
  float *out = output.data_ptr<float>(), *sums = lse.data_ptr<float>();
  const int64_t parts = (p.Q + kTogether - 1) / kTogether;
  for_each_task<Forward>(heads * parts, [&](Forward& forward, int64_t task) {
    const int64_t part = task % parts * kTogether;
    forward.run(p, task / parts, {part, std::min(part + kTogether, p.Q)}, clusters, chosen, most, out, sums);
  });
  return {output, lse, own, members, centre, moments, spread, log_count};
}

// -- backward ------------------------------------------------------------------------------------------------------------

// Where the gradients of one head (or of part of its queries) go; zeros before, but for the queries'.
struct Gradients {
  float *query, *key, *value, *query_map, *key_map;
};

struct Backward {
  Block block;
  Own own;
  RunScratch scratch;
  std::vector<float> key, value, centre, moments, spread;  // gradients of members and moments of all clusters
  std::vector<float> delta, own_flow, near_flow, far_flow, tilted, sums, pair_grads, coordinate_grads, run_grads;

  // Query blocks first..last-1 of one head.
  void run(
      const Problem& p, int64_t head, Range blocks, const Clusters& clusters, const int32_t* chosen, int64_t most,
      const float* output, const float* lse, const float* grad, const Gradients& to) {
    const int64_t C = p.C();
    key.assign(C * p.L * p.d, 0.0f), value.assign(C * p.L * p.v, 0.0f);
    centre.assign(C * p.d, 0.0f), moments.assign(C * p.o() * p.v, 0.0f), spread.assign(C * p.f(), 0.0f);
    for (int64_t index = blocks.first; index < blocks.last; ++index) {
      block.place(p, head * p.Q + index);
      const int64_t row = head * p.n_q + block.first;
      one_block(p, clusters, chosen + row * most, most, output + row * p.v, lse + row, grad + row * p.v, to);
    }
    for (int64_t index = blocks.first; most && index < blocks.last; index += kTogether) {
      block.place(p, head * p.Q + index);
      const int64_t row = head * p.n_q + block.first;
      block.place(p, head * p.Q + std::min(index + kTogether, blocks.last) - 1);
      const int64_t count = head * p.n_q + block.first + block.count - row;
      own_clusters(
          p, head, row, count, clusters, chosen + row * most, most, output + row * p.v, lse + row, grad + row * p.v, to);
    }
    for (int64_t run = 0; run < p.runs(); ++run) to_keys(p, head, run, clusters, to);
  }

 private:
  void one_block(
      const Problem& p, const Clusters& clusters, const int32_t* chosen, int64_t most, const float* output,
      const float* lse, const float* grad, const Gradients& to) {
    block.scores(clusters);
    const int64_t count = block.count, d = p.d, v = p.v;
    float* query_grads = to.query + (block.head * p.n_q + block.first) * d;
    std::fill(query_grads, query_grads + count * d, 0.0f);
    differences(count, v, output, grad);
    for (int64_t i = 0; block.own && i < count; ++i) block.leave_out(i, chosen + i * most);
    weigh(block.far_weights, count, block.width, lse), weigh(block.near_weights, count, block.near_size(), lse);
    near_keys(p, grad, query_grads, to);
    far_clusters(p, clusters, grad, query_grads, to);
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
      int64_t most, const float* output, const float* lse, const float* grad, const Gradients& to) {
    const float* queries = p.query + row * p.d;
    own.sort_pairs(p, head, count, chosen, most);
    own.scores(queries, clusters);
    weigh(own.weights, count, own.stride, lse);
    differences(count, p.v, output, grad);
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
      product_bt(count, size, v, grad, v, p.values(block.head) + range.first * v, v, 0.0f, ds, size);
      for (int64_t i = 0; i < count; ++i)
        p.dropout.back(weights + i * total, ds + i * size, size, delta[i], block.row() + i, [&](int64_t j) {
          return range.first + j;
        });
      product_at(size, v, count, weights, total, grad, v, 1.0f, to.value + range.first * v, v);
      product(count, d, size, ds, size, p.keys(block.head) + range.first * d, d, true, query_grads, d);
      product_at(size, d, count, ds, size, block.queries(), d, 1.0f, to.key + range.first * d, d);
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
    product_bt(count, size, o * v, pulled, o * v, moment, o * v, 0.0f, ds, size);
    for (int64_t i = 0; i < count; ++i)
      p.dropout.back(weights + i * width, ds + i * size, size, delta[i], block.row() + i, [&](int64_t c) {
        return block.cluster_id(first + c);
      });
    product_at(size, o * v, count, weights, width, pulled, o * v, 1.0f, moments.data() + first * o * v, o * v);
    if (o > 1) {
      float* tilts = resized(sums, count * o * v);
      product(count, o * v, size, weights, width, moment, o * v, false, tilts, o * v);
      for (int64_t i = 0; i < count; ++i)
        for (int64_t y = 1; y < o; ++y) da[i * r + y - 1] = dot(grad + i * v, tilts + (i * o + y) * v, v);
    }
    product(count, d, size, ds, size, clusters.centre + at * d, d, true, query_grads, d);
    product_at(size, d, count, ds, size, block.queries(), d, 1.0f, centre.data() + first * d, d);
    if (!f) return;
    for (int64_t i = 0; i < count; ++i)
      for (int64_t c = 0; c < size; ++c)
        ds[i * size + c] = bonus[i * width + c] < kSpreadLimit ? ds[i * size + c] : 0.0f;
    product_at(size, f, count, ds, size, block.pairs, f, 1.0f, spread.data() + first * f, f);
    float* dp = resized(pair_grads, count * f);
    gemm('N', 'N', count, f, size, ds, size, clusters.spread + at * f, f, 0.0f, dp, f);
    for (int64_t i = 0; i < count; ++i) {
      const float* a = block.coordinates + i * p.s();
      for (int64_t x = 0, pair = i * f; x < r; ++x)
        for (int64_t y = x; y < r; ++y, ++pair) da[i * r + x] += dp[pair] * a[y], da[i * r + y] += dp[pair] * a[x];
    }
    const float* map = p.query_map + block.head % p.h * d * p.s();
    product_bt(count, d, r, da, r, map, p.s(), 1.0f, query_grads, d);
    product_at(d, r, count, block.queries(), d, da, r, 1.0f, to.query_map, r);
  }

  // From the members and the moments of a run's clusters to its keys, its values and the key map.
  void to_keys(const Problem& p, int64_t head, int64_t run, const Clusters& clusters, const Gradients& to) {
    const int64_t r = p.r, d = p.d, v = p.v, o = p.o(), f = p.f(), first = run * p.R;
    const float* z = f ? run_coordinates(p, head, run, scratch) : nullptr;
    float *dz = resized(run_grads, p.R * r), *deviations = resized(scratch.deviations, p.L * r);
    std::fill(dz, dz + p.R * r, 0.0f);
    for (int64_t cluster = run * p.per_run(); cluster < (run + 1) * p.per_run(); ++cluster) {
      const int64_t index = head * p.C() + cluster;
      const int32_t* members = clusters.members + index * p.L;
      const float *mean = clusters.moments + index * o * v, *dv = moments.data() + cluster * o * v;
      const int64_t count = std::count_if(members, members + p.L, [](int32_t j) { return j >= 0; });
      if (f) cluster_deviations(p, members, first, z, scratch);
      const float share = 1.0f / std::max<int64_t>(count, 1);
      for (int64_t l = 0; l < count; ++l) {
        const int64_t slot = cluster * p.L + l;
        float *dk = to.key + members[l] * d, *value_grad = to.value + members[l] * v, *to_z = dz + (members[l] - first) * r;
        const float *row = clusters.value + (index * p.L + l) * v, *deviation = deviations + l * r;
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
    const int64_t count = std::min(p.R, p.n - first);
    const float* map = p.key_map + head % p.h * d * p.s();
    product_bt(count, d, r, dz, r, map, p.s(), 1.0f, to.key + first * d, d);
    product_at(d, r, count, p.keys(head) + first * d, d, dz, r, 1.0f, to.key_map, r);
  }
};

// Gradients of query, key, value, query_map and key_map, in parts to be added up over dimension 2 of each: one per head
// that shares a key head and per part of the queries.
std::vector<Tensor> backward(
    const Tensor& grad, const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& query_map,
    const Tensor& key_map, const optional<Tensor>& key_open, const Tensor& plan, const Tensor& output, const Tensor& lse,
    const Tensor& own, const Tensor& members, const Tensor& centre, const Tensor& moments, const Tensor& spread,
    const Tensor& log_count, bool causal, int64_t offset, int64_t window, int64_t run, int64_t cluster, int64_t order,
    double dropout_p, int64_t seed) {
  const Problem p =
      unpack(query, key, value, query_map, key_map, key_open, plan, causal, offset, window, run, cluster, order, dropout_p, seed);
  const int64_t heads = p.b * p.h, groups = p.h / p.h_kv, threads = at::get_num_threads();
  // Whole heads where they are enough to keep the threads busy: parts of a head cost a copy of its gradients each.
  const int64_t parts = heads >= 2 * threads || threads == 1 ? 1 : std::min(p.Q, (2 * threads + heads - 1) / heads);
  Tensor query_grads = at::empty_like(query);
  Tensor key_grads = at::zeros({p.b, p.h_kv, groups * parts, p.n, p.d}, query.options());
  Tensor value_grads = at::zeros({p.b, p.h_kv, groups * parts, p.n, p.v}, query.options());
  Tensor map_grads = at::zeros({2, p.b * parts, p.h, p.d, p.r}, query.options());
  Tensor sorted_key = numbers({heads, p.C(), p.L, p.d}, query), sorted_value = numbers({heads, p.C(), p.L, p.v}, query);
  Tensor panels = numbers({heads, p.panels(), p.d + p.f() + 1, kPanel}, query);
  const Clusters clusters{
      const_cast<int32_t*>(members.const_data_ptr<int32_t>()), sorted_key.data_ptr<float>(),
      sorted_value.data_ptr<float>(), const_cast<float*>(floats(centre)), const_cast<float*>(floats(moments)),
      const_cast<float*>(floats(spread)), const_cast<float*>(floats(log_count)), panels.data_ptr<float>()};
  pack_all(p, clusters);
  for_each_task<RunScratch>(heads * p.runs(), [&](RunScratch&, int64_t task) {
    gather(p, task / p.runs(), task % p.runs(), clusters);
  });
  const float *out = floats(output), *sums = floats(lse), *flow = floats(grad);
  const int32_t* chosen = own.const_data_ptr<int32_t>();
  float *to_query = query_grads.data_ptr<float>(), *to_key = key_grads.data_ptr<float>();
  float *to_value = value_grads.data_ptr<float>(), *to_maps = map_grads.data_ptr<float>();
  const int64_t most = own.size(3), map = p.d * p.r;
  for_each_task<Backward>(heads * parts, [&](Backward& worker, int64_t task) {
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

TORCH_LIBRARY(approx_attn_cpu, library) {
  library.def(
      "cluster_forward(Tensor query, Tensor key, Tensor value, Tensor query_map, Tensor key_map, Tensor? key_open, "
      "Tensor plan, bool causal, int offset, int window, int run, int cluster, int order, "
      "float dropout_p, int seed, int most) -> Tensor[]",
      &forward);
  library.def(
      "cluster_backward(Tensor grad, Tensor query, Tensor key, Tensor value, Tensor query_map, Tensor key_map, "
      "Tensor? key_open, Tensor plan, Tensor output, Tensor lse, Tensor own, Tensor members, Tensor centre, "
      "Tensor moments, Tensor spread, Tensor log_count, bool causal, int offset, int window, int run, int cluster, "
      "int order, float dropout_p, int seed) -> Tensor[]",
      &backward);
}
