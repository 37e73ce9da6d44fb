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

// Sorts neighbours, whose distances are no NaN: by the bits of the distances, 11 at a time, which for numbers that are
// not negative have the order of the numbers. Ten times as fast as std::sort on 20,000.
template <class T>
void sort_by_distance(std::vector<Neighbor<T>>& items) {
  using Key = std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>;
  constexpr int kBits = 11, kDigits = 1 << kBits, kPasses = (8 * sizeof(T) + kBits - 1) / kBits;
  auto digit = [](const Neighbor<T>& item, int pass) {
    Key key;
    std::memcpy(&key, &item.distance, sizeof(Key));
    return key >> (pass * kBits) & (kDigits - 1);
  };
  std::vector<uint32_t> starts(kPasses * kDigits);
  for (const Neighbor<T>& item : items)
    for (int pass = 0; pass < kPasses; ++pass) ++starts[pass * kDigits + digit(item, pass)];
  std::vector<Neighbor<T>> other(items.size());
  for (int pass = 0; pass < kPasses; ++pass) {
    uint32_t* const start = starts.data() + pass * kDigits;
    std::exclusive_scan(start, start + kDigits, start, uint32_t(0));
    for (const Neighbor<T>& item : items) other[start[digit(item, pass)]++] = item;
    items.swap(other);
  }
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
