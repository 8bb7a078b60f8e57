// Which weights are dropped is a function of the seed, the query and the key or cluster, so that the backward pass finds
// the same ones.

#pragma once

#include <cstdint>

namespace {

// Ids: keys first, then clusters.
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

}  // namespace
