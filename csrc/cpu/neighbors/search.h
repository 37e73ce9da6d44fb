// A neighbour search: its queries, its workspaces, and the steps of which it consists. See neighbors.cpp.
#pragma once
#include <cmath>
#include <limits>
#include <optional>
#include <vector>

#include "../dispatch.h"
#include "hits.h"
#include "set.h"

namespace robustft {

constexpr int64_t kSearchRows = 1024;     // of a block of queries: packed to bfloat16 at d = 512 they take 1 MB
constexpr int64_t kTileSize = 1 << 17;    // scores of a tile
constexpr int64_t kSampleSize = 1 << 18;  // scores of a tile of sampled points
constexpr int64_t kHitBytes = 16 << 20;   // of hits a block starts with, at the most

// A workspace of a thread.
template <class T>
struct SearchWorkspace {
  Buffer<T> scores{kSampleSize};
  std::vector<T> centred;  // points of a tile
  std::vector<Hit<T>> hits, open;
  std::vector<int32_t> rows;
  std::vector<double> query, squared, order;
  std::vector<Neighbor<T>> neighbors, spare;
};

template <class T>
class Search {
 public:
  Search(const Tensor& queries, const PointSet<T>& set, int64_t k, bool squared, T* distances, int64_t* indices);

  // All of the first `count` queries.
  void run(int64_t count);

 private:
  // In filter.cpp:

  // The queries `ids` by filter and band, with the given thresholds or guessed ones, points shared among `threads`.
  void filtered(const std::vector<int64_t>& ids, std::vector<T> thresholds, int64_t threads);
  // eps of a query of these norms, what it lost to rounding among them, in a filter of this form; 0 where it would not
  // hold.
  double bound(const RowNorms& norms, FilterForm form) const;
  // For each query a threshold that a little more than its k best points should reach, or -inf; and by the sample, what
  // share of the points the bound leaves to be measured.
  std::vector<T> guess(const LeftRows<T>& left, const std::vector<double>& eps, int64_t threads, double* share);
  // Collects the hits among points [begin, begin + count).
  void scan(const LeftRows<T>& left, const fixed::Queries* in_fixed, int64_t begin, int64_t count, Hits<T>& hits,
            SearchWorkspace<T>& w);

  // In band.cpp:

  // Writes the result of query `id` from its hits, the r-th of each part, and returns NaN; or the threshold with which
  // to scan again; or infinity where there were too many hits.
  T finish(int64_t id, int64_t r, double eps, double norm_squared, std::vector<Hits<T>>& parts, SearchWorkspace<T>& w);
  // Appends the distances of w.query to the points w.rows.
  void measure(SearchWorkspace<T>& w);
  // The queries `ids` by the distances to all points.
  void direct(const std::vector<int64_t>& ids);
  // The result of a query from candidates of which it needs the `rank` nearest; NaN if distances were.
  void write(int64_t id, std::vector<Neighbor<T>>& candidates, int64_t rank, SearchWorkspace<T>& w);
  void put(int64_t id, const std::vector<Neighbor<T>>& nearest) {
    for (int64_t i = 0; i < k_; ++i) {
      out_[id * k_ + i] = nearest[i].distance;
      indices_[id * k_ + i] = nearest[i].index;
    }
  }
  T distance(double squared) const { return T(squared_ ? squared : std::sqrt(squared)); }

  // In sorted.cpp:

  // The queries `ids`, of which each wants many of the points: all distances, sorted.
  void sorted(const std::vector<int64_t>& ids);
  // out (count, n): the distances of all points from queries (count, d), one after another, and many together.
  void measure_each(const double* queries, int64_t count, T* out) const;
  void measure_many(const double* queries, int64_t count, T* out) const;

  const PointSet<T>& set_;
  const T* queries_;
  const int64_t k_;
  const bool squared_;
  T* out_;
  int64_t* indices_;         // null: only the k-th distance is asked for
  double gamma_, rounding_;  // gamma of products in floating point
  int64_t rank_, room_, max_rows_;
  std::optional<RightMatrix<T>> sample_;  // where thresholds are guessed
  Pool<SearchWorkspace<T>> pool_;
};

}  // namespace robustft
