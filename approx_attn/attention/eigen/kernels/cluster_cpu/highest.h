// The highest of many numbers.

#pragma once

#include <algorithm>
#include <array>
#include <numeric>
#include <vector>

#include "vectors.h"

namespace {

// The `count` highest of n numbers, a multiple of kLanes; lower places first among equals.
class Highest {
 public:
  void find(const float* x, int64_t n, int64_t count, int32_t* places) {
    const float least = n > kFew ? threshold(groups(x, n, count), count) : kNone;
    values_.resize(n + kLanes), places_.resize(n + kLanes), order_.resize(n + kLanes);
    int64_t found = 0;
    for (int64_t i = 0; i < n; i += kLanes) found += pick(x + i, least, i, values_.data() + found, places_.data() + found);
    std::fill_n(values_.begin() + found, kLanes, kNone);
    int64_t kept = 0;
    if (found <= kFew) {
      rank(found);
      for (int64_t i = 0; i < rounded(found); i += kLanes)
        kept += pick(ranks_.data() + i, 1 - count, i, picked_.data() + kept, order_.data() + kept);
      kept = std::min({kept, found, count});
      for (int64_t i = 0; i < kept; ++i) places[i] = places_[order_[i]];
    } else {
      const float bound = threshold(found, count);
      if (reached(found, bound) > count) kept = sorted(found, count, places);  // equal numbers
      for (int64_t i = 0; kept < count && i < found; i += kLanes)
        for (uint32_t bits = reaching(values_.data() + i, bound); bits && kept < count; bits &= bits - 1)
          places[kept++] = places_[i + __builtin_ctz(bits)];
    }
    while (kept < count) places[kept++] = 0;  // NaN reaches nothing: its query has NaN for an output, whatever is chosen
  }

 private:
  static constexpr float kNone = kLowest * 4;
  static constexpr int64_t kFew = 2 * kLanes;  // numbers of which each is compared with each

  // Fills values_ with the highest of interleaved groups, more than `count` of them; returns how many. At least `count` of
  // the x reach what `count` of these reach.
  int64_t groups(const float* x, int64_t n, int64_t count) {
    const int64_t size = std::min(rounded(count + count / 2), n);
    values_.resize(n + kLanes);
    for (int64_t i = 0; i < size; i += kLanes) {
      Vector highest = load(x + i);
      for (int64_t start = size; start + size <= n; start += size) {
        const Vector next = load(x + start + i);
        highest = next > highest ? next : highest;
      }
      store(values_.data() + i, highest);
    }
    return size;
  }

  int64_t reached(int64_t n, float least) const {
    int64_t count = 0;
    for (int64_t i = 0; i < n; i += kLanes) count += __builtin_popcount(reaching(values_.data() + i, least));
    return count;
  }

  // Fills ranks_ (below zero) for the first n values, at most kFew, after which there are others that are not higher.
  void rank(int64_t n) {
    if (n <= kLanes) return ranks<1>(values_.data(), ranks_.data());
    ranks<2>(values_.data(), ranks_.data());
  }

  // A number that `count` of the first n values reach, or a few more where some are equal or far below the highest: by
  // halving, without branches that a processor cannot foresee.
  float threshold(int64_t n, int64_t count) {
    if (n <= kFew) {
      rank(n);
      float least = std::numeric_limits<float>::max();
#pragma omp simd reduction(min : least)
      for (int64_t i = 0; i < n; ++i) {
        const float x = ranks_[i] > -count ? values_[i] : least;
        least = x < least ? x : least;
      }
      return least;
    }
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
    std::iota(order_.begin(), order_.begin() + found, 0);
    const auto higher = [&](int32_t a, int32_t b) { return values_[a] != values_[b] ? values_[a] > values_[b] : a < b; };
    std::nth_element(order_.begin(), order_.begin() + count - 1, order_.begin() + found, higher);
    for (int64_t i = 0; i < count; ++i) places[i] = places_[order_[i]];
    return count;
  }

  std::vector<float> values_;
  std::vector<int32_t> places_, order_;
  std::array<float, kFew> ranks_;
  std::array<float, kFew + kLanes> picked_;
};

}  // namespace
