// The highest of many numbers.

#pragma once

#include <algorithm>
#include <numeric>
#include <vector>

#include "vectors.h"

namespace {

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

}  // namespace
