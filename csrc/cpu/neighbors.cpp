// Exact nearest neighbours: a filter of approximate scores with a rigorous error bound, and distances of what it
// leaves.
//
//   q queries (m, d), x points (n, d), k in [1, n]        out  the k-th smallest |q - x|, or the k smallest, per query
//
// Score. With everything less a common centre, s = q.x - |x|^2 / 2 orders the points as their distances do, reversed:
// |q - x|^2 = |q|^2 - 2 s. A tile of products gives t = qh.xh - |x|^2 / 2 of rounded factors qh, xh and
//
//   |t - s| <= eps = |q - qh| max|x| + |qh| max|x - xh| + gamma |qh| max|xh| + 4 u (|q| + max|x|)^2
//
// for every point, by Cauchy-Schwarz: the residual norms are measured (0 for ieee), gamma covers sums of d products in
// any order, and the last term the rounding of centring, bias, score and distance (u the unit roundoff of T).
//
// Filter. A threshold guessed from a sample lets through little more than the k best of t; all points that reach it are
// kept as hits. If at least k did and t_k - 2 eps reaches it, t_k being the k-th largest t of the hits, nothing that
// matters was lost; otherwise that query is done again, with a threshold that holds for certain. So the guess decides
// how long a search takes, never what it finds.
//
// Band. t > t_k + 2 eps is certainly among the k - 1 best, h of these; t < t_k - 2 eps certainly is not among the k
// best. The k-th distance is the (k - h)-th of the rest, by direct sums of (q - x)^2 in double: no cancellation. The
// k nearest need the distances of all t >= t_k - 2 eps.
//
// Distances are computed by the same kernel in the same order wherever they are, and eps leaves room for their
// rounding: results have the same bits for any arithmetic of the filter, any batch of queries and any thread count.
#include <cmath>
#include <limits>
#include <numeric>
#include <optional>
#include <tuple>
#include <vector>

#include "dispatch.h"
#include "neighbor_hits.h"
#include "neighbor_set.h"

namespace robustft {
namespace {

constexpr int64_t kMaxRows = 1024;         // of a block of queries: packed to bfloat16 at d = 512 they take 1 MB
constexpr int64_t kTileSize = 1 << 17;     // scores of a tile
constexpr int64_t kSampleSize = 1 << 18;   // scores of a tile of sampled points
constexpr int64_t kHitBytes = 16 << 20;    // of hits a block starts with, at the most
constexpr int64_t kGrowth = 4;             // and how far they may grow
constexpr int64_t kSharedRows = 128;       // with fewer queries a thread than this, threads share the points instead
constexpr int64_t kDirectQueries = 4;      // so few are done without products: reading the points is all that counts
constexpr int64_t kUnsampledQueries = 16;  // so few start without a threshold: packing the sample would cost more

// Whether aten's float32 product rounds its factors (torch.set_float32_matmul_precision and its like).
bool products_are_rounded() {
  constexpr int64_t n = 64;
  const float a = 1.0f + 0x1p-9f + 0x1p-23f;
  std::vector<float> diagonal(n * n), product(n * n);
  for (int64_t i = 0; i < n; ++i) diagonal[i * n + i] = a;
  const LeftRows<float> left(diagonal.data(), n, n, Arithmetic::ieee);
  const RightMatrix<float> right(diagonal.data(), n, n, nullptr);
  multiply(left, 0, n, right, 0, n, product.data(), n);
  return product[0] != a * a;
}

// A workspace of a thread.
template <class T>
struct Workspace {
  Buffer<T> scores{kSampleSize};
  std::vector<T> centred;  // points of a tile
  std::vector<Hit<T>> hits;
  std::vector<int32_t> rows;
  std::vector<double> query, squared;
  std::vector<Neighbor<T>> neighbors;
};

template <class T>
class Search {
 public:
  Search(const Tensor& queries, const PointSet<T>& set, int64_t k, bool squared, T* distances, int64_t* indices)
      : set_(set), queries_(queries.const_data_ptr<T>()), k_(k), squared_(squared), out_(distances), indices_(indices) {
    constexpr double u = std::numeric_limits<T>::epsilon() / 2;
    const double d = double(set.d);
    gamma_ = (d + 2) * 2 * u;
    if (scalar_type<T>() == ScalarType::Float && set.arithmetic == Arithmetic::ieee && products_are_rounded())
      gamma_ += 0x1p-6;  // to bfloat16 at worst
    rounding_ = (4 + (scalar_type<T>() == ScalarType::Double ? d : 0)) * u;
    const double m = double(set.samples), expected = double(k) * m / double(set.n);
    // Four standard deviations and a little more than what is expected: one query in 10^5 or so is done again.
    rank_ = int64_t(std::ceil(expected + 4 * std::sqrt(expected) + 4));
    const double hits = rank_ < set.samples ? 1.5 * double(rank_) / m * double(set.n) : 0;
    room_ = std::min(int64_t(hits) + 2 * k, set.n) + 2 * kTileSize / kMaxRows;
    max_rows_ = std::clamp<int64_t>(kHitBytes / int64_t(sizeof(Hit<T>)) / room_, 1, kMaxRows);
  }

  void run(int64_t count) {
    if (!count) return;
    if (count > kUnsampledQueries && rank_ < set_.samples && set_.samples <= kSampleSize / 16)
      sample_.emplace(set_.sample, RightMatrix<T>::kColumns, set_.arithmetic);
    std::vector<int64_t> all(count);
    std::iota(all.begin(), all.end(), 0);
    if (set_.arithmetic == Arithmetic::ieee && count <= kDirectQueries) return direct(all);
    const int64_t threads = torch::stable::get_num_threads();
    const bool shared = count < kSharedRows * threads;
    const int64_t rounds = (count + max_rows_ * threads - 1) / (max_rows_ * threads);
    const int64_t even = round_up((count + rounds * threads - 1) / (rounds * threads), 16);
    const int64_t rows = shared ? max_rows_ : std::min(even, max_rows_);
    const int64_t blocks = (count + rows - 1) / rows;
    const auto block = [&](int64_t b) {
      return std::vector<int64_t>(all.begin() + b * rows, all.begin() + std::min(count, (b + 1) * rows));
    };
    if (shared) {
      for (int64_t b = 0; b < blocks; ++b) filtered(block(b), {}, threads);
    } else {
      torch::stable::parallel_for(0, blocks, 1, [&](int64_t first, int64_t last) {
        for (int64_t b = first; b < last; ++b) filtered(block(b), {}, 1);
      });
    }
  }

 private:
  // The queries `ids` by filter and band, with the given thresholds or guessed ones, points shared among `threads`.
  void filtered(const std::vector<int64_t>& ids, std::vector<T> thresholds, int64_t threads) {
    const int64_t rows = ids.size(), d = set_.d;
    const bool bf16 = set_.arithmetic == Arithmetic::bf16;
    const Buffer<T> centred(rows * d);
    std::vector<double> eps(rows);
    std::vector<int64_t> beyond;  // the bound, or the range of T
    for (int64_t r = 0; r < rows; ++r) {
      RowNorms norms;
      const T* query = queries_ + ids[r] * d;
      std::copy(query, query + d, centred.get() + r * d);
      ROBUSTFT_CALL(centre_row<T>, query, set_.centre_or_null(), d, bf16, centred.get() + r * d, &norms);
      eps[r] = bound(std::sqrt(norms.squared), std::sqrt(norms.residual));
      if (!(eps[r] > 0)) {
        beyond.push_back(ids[r]);
        std::fill_n(centred.get() + r * d, d, T(0));
      }
    }
    const LeftRows<T> left(centred.get(), rows, d, set_.arithmetic);
    if (thresholds.empty()) thresholds = guess(left, eps, threads);
    for (int64_t r = 0; r < rows; ++r)
      if (!(eps[r] > 0)) thresholds[r] = std::numeric_limits<T>::infinity();

    const int64_t step = std::clamp<int64_t>(kTileSize / rows / 16 * 16, 16, 4096);
    const int64_t tiles = (set_.n + step - 1) / step, parts = std::min(threads, tiles);
    const int64_t budget = kGrowth * std::max(room_ * rows, kHitBytes / int64_t(sizeof(Hit<T>)));
    std::vector<Hits<T>> hits;
    for (int64_t p = 0; p < parts; ++p) hits.emplace_back(thresholds, eps, k_, room_ + 2 * step, budget);
    torch::stable::parallel_for(0, parts, 1, [&](int64_t first, int64_t last) {
      auto workspace = pool_.take([] { return Workspace<T>(); });
      for (int64_t p = first; p < last; ++p)
        for (int64_t tile = tiles * p / parts; tile < tiles * (p + 1) / parts; ++tile)
          scan(left, tile * step, std::min(step, set_.n - tile * step), hits[p], *workspace);
    });

    constexpr T kDone = std::numeric_limits<T>::quiet_NaN();
    std::vector<T> again(rows, kDone);
    torch::stable::parallel_for(0, rows, threads == 1 ? rows : 1, [&](int64_t first, int64_t last) {
      auto workspace = pool_.take([] { return Workspace<T>(); });
      for (int64_t r = first; r < last; ++r)
        if (eps[r] > 0) again[r] = finish(ids[r], r, eps[r], hits, *workspace);
    });
    std::vector<int64_t> repeated;
    std::vector<T> certain;
    for (int64_t r = 0; r < rows; ++r) {
      if (again[r] != again[r]) continue;
      if (again[r] == std::numeric_limits<T>::infinity()) {
        beyond.push_back(ids[r]);
      } else {
        repeated.push_back(ids[r]);
        certain.push_back(again[r]);
      }
    }
    hits.clear();
    if (!repeated.empty()) filtered(repeated, certain, threads);
    direct(beyond);
  }

  // eps of a query of this norm, rounded to bfloat16 with this residual; 0 where it would not hold.
  double bound(double norm, double residual) const {
    const double scale = norm + set_.norm, rounded = norm + residual;
    const bool is_float = scalar_type<T>() == ScalarType::Float;
    if (!(scale > (is_float ? 1e-10 : 1e-140) && scale < (is_float ? 1e15 : 1e140)))
      return 0;  // squares leave T's range
    return 1.001 * (residual * set_.norm + rounded * set_.residual + gamma_ * rounded * (set_.norm + set_.residual) +
                    rounding_ * scale * scale);
  }

  // For each query a threshold that a little more than its k best points should reach, or -inf.
  std::vector<T> guess(const LeftRows<T>& left, const std::vector<double>& eps, int64_t threads) {
    std::vector<T> thresholds(left.count, -std::numeric_limits<T>::infinity());
    if (!sample_) return thresholds;
    const int64_t m = set_.samples;
    std::vector<T> bias(m);
    for (int64_t i = 0; i < m; ++i) bias[i] = set_.bias.template const_data_ptr<T>()[sample_row(i, m, set_.n)];
    const int64_t step = kSampleSize / m / 16 * 16, steps = (left.count + step - 1) / step;
    torch::stable::parallel_for(0, steps, threads == 1 ? steps : 1, [&](int64_t first, int64_t last) {
      auto workspace = pool_.take([] { return Workspace<T>(); });
      T* scores = workspace->scores.get();
      for (int64_t i = first * step; i < std::min(last * step, left.count); i += step) {
        const int64_t rows = std::min(step, left.count - i);
        multiply(left, i, rows, *sample_, 0, m, scores, m);
        for (int64_t r = 0; r < rows; ++r) {
          T score;
          ROBUSTFT_CALL(score_reached<T>, scores + r * m, bias.data(), m, rank_, &score);
          thresholds[i + r] = below<T>(score - 2 * eps[i + r]);
        }
      }
    });
    return thresholds;
  }

  // Collects the hits among points [begin, begin + count).
  void scan(const LeftRows<T>& left, int64_t begin, int64_t count, Hits<T>& hits, Workspace<T>& w) {
    const int64_t d = set_.d;
    T* scores = w.scores.get();
    if (set_.arithmetic == Arithmetic::bf16 || !set_.centred) {
      multiply(left, 0, left.count, set_.columns, begin, count, scores, count);
    } else {
      w.centred.resize(count * d);
      for (int64_t i = 0; i < count; ++i) {
        RowNorms norms;
        ROBUSTFT_CALL(centre_row<T>, set_.row(begin + i), set_.centre_or_null(), d, false, w.centred.data() + i * d,
                      &norms);
      }
      multiply(left, 0, left.count, RightMatrix<T>(w.centred.data(), count, d, nullptr), 0, count, scores, count);
    }
    const T* bias = set_.bias.template const_data_ptr<T>() + begin;
    for (int64_t r = 0; r < left.count; ++r)
      if (hits.thresholds[r] == -std::numeric_limits<T>::infinity() && 2 * k_ <= count) {
        T score;  // without a guess the first tile gives a threshold, for certain
        ROBUSTFT_CALL(score_reached<T>, scores + r * count, bias, count, k_, &score);
        hits.raise(r, score);
      }
    hits.reserve(count);
    const Scores<T> tile{scores, bias, left.count, count, count, begin};
    ROBUSTFT_CALL(collect<T>, tile, hits.thresholds.data(), hits.data.data(), hits.counts.data());
  }

  // Writes the result of query `id` from its hits, the r-th of each part, and returns NaN; or the threshold with which
  // to scan again; or infinity where there were too many hits.
  T finish(int64_t id, int64_t r, double eps, std::vector<Hits<T>>& parts, Workspace<T>& w) {
    T least = parts[0].thresholds[r];
    Hit<T>* hits = parts[0].data[r];
    int64_t count = parts[0].counts[r];
    if (parts.size() > 1) {
      w.hits.clear();
      for (const Hits<T>& part : parts) {
        least = std::max(least, part.thresholds[r]);
        w.hits.insert(w.hits.end(), part.data[r], part.data[r] + part.counts[r]);
      }
      hits = w.hits.data();
      count = w.hits.size();
    }
    if (least == std::numeric_limits<T>::infinity()) return least;
    if (count < k_) return -std::numeric_limits<T>::infinity();
    std::nth_element(hits, hits + (k_ - 1), hits + count,
                     [](const Hit<T>& a, const Hit<T>& b) { return a.score > b.score; });
    const double t_k = hits[k_ - 1].score, low = t_k - 2 * eps, high = t_k + 2 * eps;
    // Scanned again in another shape, every t may be another within eps of s.
    if (low < least) return below<T>(t_k - 4 * eps);
    int64_t certain = 0;
    w.rows.clear();
    for (int64_t i = 0; i < count; ++i) {
      if (!indices_ && hits[i].score > high)
        ++certain;
      else if (hits[i].score >= low)
        w.rows.push_back(hits[i].point);
    }
    w.query.assign(queries_ + id * set_.d, queries_ + (id + 1) * set_.d);
    w.squared.resize(w.rows.size());
    ROBUSTFT_CALL(squared_distances<T>, w.query.data(), set_.row(0), set_.d, w.rows.data(), int64_t(w.rows.size()),
                  w.squared.data());
    w.neighbors.clear();
    for (size_t i = 0; i < w.rows.size(); ++i) w.neighbors.push_back({distance(w.squared[i]), w.rows[i]});
    write(id, w.neighbors, k_ - certain);
    return std::numeric_limits<T>::quiet_NaN();
  }

  // The queries `ids` by the distances to all points.
  void direct(const std::vector<int64_t>& ids) {
    constexpr int64_t kRows = 64, kQueries = 16;
    const int64_t d = set_.d, tiles = (set_.n + kRows - 1) / kRows;
    const int64_t parts = std::min<int64_t>(torch::stable::get_num_threads(), tiles);
    for (size_t done = 0; done < ids.size(); done += kQueries) {
      const int64_t count = std::min<int64_t>(kQueries, ids.size() - done);
      std::vector<double> queries(count * d);
      for (int64_t i = 0; i < count; ++i) {
        const T* query = queries_ + ids[done + i] * d;
        std::copy_n(query, d, queries.begin() + i * d);
        // An infinite one is NaN away too: infinitely far is what finite ones can be, where squares overflow.
        if (!std::all_of(query, query + d, [](T x) { return std::isfinite(x); }))
          queries[i * d] = std::numeric_limits<double>::quiet_NaN();
      }
      std::vector<Nearest<T>> nearest(parts * count, Nearest<T>(k_));
      torch::stable::parallel_for(0, parts, 1, [&](int64_t first, int64_t last) {
        double squared[kRows];
        for (int64_t p = first; p < last; ++p)
          for (int64_t tile = tiles * p / parts; tile < tiles * (p + 1) / parts; ++tile) {
            const int64_t begin = tile * kRows, rows = std::min(kRows, set_.n - begin);
            for (int64_t i = 0; i < count; ++i) {
              ROBUSTFT_CALL(squared_distances<T>, queries.data() + i * d, set_.row(begin), d, nullptr, rows, squared);
              for (int64_t r = 0; r < rows; ++r)
                nearest[p * count + i].push({distance(squared[r]), int32_t(begin + r)});
            }
          }
      });
      for (int64_t i = 0; i < count; ++i) {
        std::vector<Neighbor<T>>& all = nearest[i].items;
        for (int64_t p = 1; p < parts; ++p) {
          const std::vector<Neighbor<T>>& more = nearest[p * count + i].items;
          all.insert(all.end(), more.begin(), more.end());
        }
        write(ids[done + i], all, k_);
      }
    }
  }

  T distance(double squared) const { return T(squared_ ? squared : std::sqrt(squared)); }

  // The result of a query from candidates of which it needs the `rank` nearest; NaN if distances were.
  void write(int64_t id, std::vector<Neighbor<T>>& candidates, int64_t rank) {
    if (int64_t(candidates.size()) < rank) {
      std::fill_n(out_ + id * (indices_ ? k_ : 1), indices_ ? k_ : 1, std::numeric_limits<T>::quiet_NaN());
      if (indices_) std::fill_n(indices_ + id * k_, k_, -1);
    } else if (indices_) {
      std::partial_sort(candidates.begin(), candidates.begin() + rank, candidates.end());
      for (int64_t i = 0; i < k_; ++i) {
        out_[id * k_ + i] = candidates[i].distance;
        indices_[id * k_ + i] = candidates[i].index;
      }
    } else {
      std::nth_element(candidates.begin(), candidates.begin() + (rank - 1), candidates.end());
      out_[id] = candidates[rank - 1].distance;
    }
  }

  const PointSet<T>& set_;
  const T* queries_;
  const int64_t k_;
  const bool squared_;
  T* out_;
  int64_t* indices_;  // null: only the k-th distance is asked for
  double gamma_, rounding_;
  int64_t rank_, room_, max_rows_;
  std::optional<RightMatrix<T>> sample_;  // where thresholds are guessed
  Pool<Workspace<T>> pool_;
};

template <class T>
void search(const Tensor& queries, const PointSet<T>& set, int64_t k, bool squared, Tensor& distances,
            Tensor* indices) {
  const Tensor q = contiguous_as(queries, scalar_type<T>());
  STD_TORCH_CHECK(set.finite(), "neighbors: a point holds NaN or infinity");
  Search<T>(q, set, k, squared, distances.mutable_data_ptr<T>(),
            indices ? indices->mutable_data_ptr<int64_t>() : nullptr)
      .run(q.size(0));
}

struct NeighborInputs {
  const Tensor &queries, &points, &centre, &bias, &filter, &sample, &bounds;
  int64_t k;
  bool squared;

  void check(const char* op) const {
    STD_TORCH_CHECK(queries.dim() == 2 && points.dim() == 2 && queries.size(1) == points.size(1), op,
                    ": queries and points must be (m, d) and (n, d)");
    STD_TORCH_CHECK(k >= 1 && k <= points.size(0), op, ": k is ", k, "; expected 1 to the number of points");
    const int64_t n = points.size(0), d = points.size(1);
    STD_TORCH_CHECK(centre.numel() == d && bias.numel() == n && bounds.numel() == neighbor_bound::kCount &&
                        sample.dim() == 2 && sample.size(1) == d,
                    op, ": not what neighbor_pack made of these points");
    STD_TORCH_CHECK(
        !filter.numel() || (amx::available() && filter.numel() == (n + 15) / 16 * amx::depth_tiles(d) * amx::kTile), op,
        ": the filter is not what neighbor_pack makes of these points here");
  }

  void run(Tensor& distances, Tensor* indices) const {
    if (points.scalar_type() == ScalarType::Double)
      search<double>(queries, {points, centre, bias, filter, sample, bounds}, k, squared, distances, indices);
    else
      search<float>(queries, {points, centre, bias, filter, sample, bounds}, k, squared, distances, indices);
  }

  ScalarType dtype() const {
    return points.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  }
};

Tensor kth_neighbor_distance(const Tensor& queries, const Tensor& points, const Tensor& centre, const Tensor& bias,
                             const Tensor& filter, const Tensor& sample, const Tensor& bounds, int64_t k,
                             bool squared) {
  const NeighborInputs in{queries, points, centre, bias, filter, sample, bounds, k, squared};
  in.check("kth_neighbor_distance");
  Tensor distances = torch::stable::new_empty(queries, {queries.size(0)}, in.dtype());
  in.run(distances, nullptr);
  return distances;
}

std::tuple<Tensor, Tensor> nearest_neighbors(const Tensor& queries, const Tensor& points, const Tensor& centre,
                                             const Tensor& bias, const Tensor& filter, const Tensor& sample,
                                             const Tensor& bounds, int64_t k, bool squared) {
  const NeighborInputs in{queries, points, centre, bias, filter, sample, bounds, k, squared};
  in.check("nearest_neighbors");
  Tensor distances = torch::stable::new_empty(queries, {queries.size(0), k}, in.dtype());
  Tensor indices = torch::stable::new_empty(queries, {queries.size(0), k}, ScalarType::Long);
  in.run(distances, &indices);
  return {distances, indices};
}

}  // namespace
}  // namespace robustft

STABLE_TORCH_LIBRARY_IMPL(robustft, CPU, m) {
  m.impl("kth_neighbor_distance", TORCH_BOX(&robustft::kth_neighbor_distance));
  m.impl("nearest_neighbors", TORCH_BOX(&robustft::nearest_neighbors));
}
