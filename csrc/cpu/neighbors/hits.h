// What a neighbour search keeps of the points it has seen.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <type_traits>
#include <vector>

#include "../tile.h"
#include "neighbors.h"

namespace robustft {

// The largest T that is not above x.
template <class T>
T below(double x) {
  const T y = T(x);
  return double(y) > x ? std::nextafter(y, -std::numeric_limits<T>::infinity()) : y;
}

// The points whose score reached the threshold, for each query of a block. Every point scanned with a score of at least
// the final threshold is there.
template <class T>
class Hits {
 public:
  // `room` hits a query at first; growth stops at `budget` hits in all.
  Hits(const std::vector<T>& thresholds, const std::vector<double>& eps, int64_t k, int64_t room, int64_t budget)
      : thresholds(thresholds), counts(thresholds.size()), eps_(eps), k_(k), rooms_(thresholds.size(), room) {
    spare_ = budget - room * int64_t(thresholds.size());
    for (size_t r = 0; r < thresholds.size(); ++r) {
      storage_.emplace_back(room);
      data.push_back(storage_.back().get());
    }
  }

  // Makes room for `more` hits of every query.
  void reserve(int64_t more) {
    for (size_t r = 0; r < counts.size(); ++r)
      if (counts[r] + more > rooms_[r]) make_room(r, more);
  }

  // k points are known to score at least this: one that scores 2 eps less cannot matter.
  void raise(int64_t r, T score) { thresholds[r] = std::max(thresholds[r], below<T>(score - 2 * eps_[r])); }

  // The query had more hits than there is memory for; what it has is worthless.
  bool overflowed(int64_t r) const { return thresholds[r] == std::numeric_limits<T>::infinity(); }

  std::vector<T> thresholds;
  std::vector<Hit<T>*> data;
  std::vector<int64_t> counts;

 private:
  void make_room(size_t r, int64_t more) {
    Hit<T>* hits = data[r];
    if (counts[r] >= k_) {
      std::nth_element(hits, hits + (k_ - 1), hits + counts[r],
                       [](const Hit<T>& a, const Hit<T>& b) { return a.score > b.score; });
      raise(r, hits[k_ - 1].score);
      const T least = thresholds[r];
      counts[r] = std::partition(hits, hits + counts[r], [=](const Hit<T>& h) { return h.score >= least; }) - hits;
    }
    if (counts[r] + more <= rooms_[r] && counts[r] <= rooms_[r] / 2) return;
    const int64_t room = 2 * rooms_[r] + more, added = room - rooms_[r];
    if (added > spare_) {
      thresholds[r] = std::numeric_limits<T>::infinity();
      counts[r] = 0;
      if (rooms_[r] >= more) return;
    }
    spare_ -= added;
    Buffer<Hit<T>> larger(room);
    std::copy(hits, hits + counts[r], larger.get());
    storage_[r] = std::move(larger);
    data[r] = storage_[r].get();
    rooms_[r] = room;
  }

  const std::vector<double>& eps_;
  const int64_t k_;
  std::vector<int64_t> rooms_;
  std::vector<Buffer<Hit<T>>> storage_;
  int64_t spare_;
};

// A point at its distance; ties go to the lower index.
template <class T>
struct Neighbor {
  T distance;
  int32_t index;
  bool operator<(const Neighbor& other) const {
    return distance < other.distance || (distance == other.distance && index < other.index);
  }
};

// The bits of a distance, which is not negative and no NaN: they have the order of the numbers.
template <class T>
using DistanceKey = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;

template <class T>
DistanceKey<T> key_of(T distance) {
  DistanceKey<T> key;
  std::memcpy(&key, &distance, sizeof(key));
  return key;
}

template <class K>
int bit_length(K number) {
  int bits = 0;
  for (; number > 0; number >>= 1) ++bits;
  return bits;
}

// Keys of which none is below `least`, and none more than `bits` bits above it.
template <class T>
struct KeyRange {
  DistanceKey<T> least;
  int bits;
};

// The range of the keys of at(0), at(1), ...
template <class T, class At>
KeyRange<T> range_of(int64_t count, const At& at) {
  DistanceKey<T> least = key_of(at(0).distance), most = least;
  for (int64_t i = 0; i < count; ++i) {
    const DistanceKey<T> key = key_of(at(i).distance);
    least = key < least ? key : least;
    most = key > most ? key : most;
  }
  return {least, bit_length(most - least)};
}

// Puts the `count` neighbours at(0), at(1), ... into `items` in the order of their distances, 12 bits of the keys at
// the most at a time: many times as fast as std::sort. Of neighbours equally far the first stays the first. `at` may
// read `items`; `spare` is room.
template <class T, class At>
void sort_stably(int64_t count, const At& at, KeyRange<T> keys, std::vector<Neighbor<T>>& items,
                 std::vector<Neighbor<T>>& spare) {
  constexpr int kMostBits = 12;
  const int passes = std::max(1, (keys.bits + kMostBits - 1) / kMostBits), width = (keys.bits + passes - 1) / passes;
  std::vector<uint32_t> starts(int64_t(1) << width);
  items.resize(count), spare.resize(count);
  const auto pass = [&](int shift, const auto& from) {
    const auto digit = [=, mask = (DistanceKey<T>(1) << width) - 1](const Neighbor<T>& item) {
      return (key_of(item.distance) - keys.least) >> shift & mask;
    };
    std::fill(starts.begin(), starts.end(), 0);
    for (int64_t i = 0; i < count; ++i) ++starts[digit(from(i))];
    std::exclusive_scan(starts.begin(), starts.end(), starts.begin(), uint32_t(0));
    for (int64_t i = 0; i < count; ++i) {
      const Neighbor<T> item = from(i);
      spare[starts[digit(item)]++] = item;
    }
    items.swap(spare);
  };
  pass(0, at);
  for (int number = 1; number < passes; ++number) pass(number * width, [&](int64_t i) { return items[i]; });
}

// Sorts neighbours, those equally far by their indices.
template <class T>
void sort_by_distance(std::vector<Neighbor<T>>& items, std::vector<Neighbor<T>>& spare) {
  if (items.empty()) return;
  const auto at = [&](int64_t i) { return items[i]; };
  sort_stably(int64_t(items.size()), at, range_of<T>(int64_t(items.size()), at), items, spare);
  for (auto first = items.begin(); first != items.end();) {
    const auto last =
        std::find_if(first, items.end(), [=](const Neighbor<T>& n) { return n.distance != first->distance; });
    if (last - first > 1) std::sort(first, last);
    first = last;
  }
}

// The k nearest of what is pushed.
template <class T>
class Nearest {
 public:
  explicit Nearest(int64_t k) : k_(k) {}

  void push(Neighbor<T> neighbor) {
    if (!(neighbor.distance <= farthest_)) return;
    items.push_back(neighbor);
    if (int64_t(items.size()) >= 2 * k_ + 1024) keep_nearest();
  }

  void keep_nearest() {
    if (int64_t(items.size()) <= k_) return;
    std::nth_element(items.begin(), items.begin() + (k_ - 1), items.end());
    items.resize(k_);
    farthest_ = items.back().distance;
  }

  std::vector<Neighbor<T>> items;

 private:
  int64_t k_;
  T farthest_ = std::numeric_limits<T>::infinity();
};

}  // namespace robustft
