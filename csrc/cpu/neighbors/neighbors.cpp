// Exact nearest neighbours: a filter of approximate scores with a rigorous error bound, and exact distances of the
// rest.
//
//   q queries (m, d), x points (n, d), k in [1, n]        out  the k-th smallest |q - x|, or the k smallest, per query
//
// Score. With everything less a common centre, s = q.x - |x|^2 / 2 orders the points as their distances do, reversed:
// |q - x|^2 = |q|^2 - 2 s. A tile of products gives t = qh.xh - |x|^2 / 2 of rounded factors qh, xh and
//
//   |t - s| <= eps = |q - qh| max|x| + |qh| max|x - xh| + gamma |qh| max|xh| + 4 u (|q| + max|x|)^2
//
// for every point, by Cauchy-Schwarz: the residual norms are measured (0 for ieee), gamma covers sums of d products in
// any order, and the last term the rounding of centring, bias, score and distance (u the unit roundoff of T). Factors
// are bfloat16 where the processor multiplies it, else in 16-bit fixed point (fixed.h), where sums are exact and gamma
// is the rounding of three numbers; or the numbers themselves, where that is no gain or its bound leaves too much to be
// measured.
//
// Filter (filter.cpp). Points whose t reaches a threshold are kept: all that can matter, and few more.
// Band (band.cpp). Only where t leaves open on which side of the k-th they are, within 2 eps, are points measured by
// direct sums in double; there is no cancellation in these.
// Searches for a large part of the points measure all (sorted.cpp).
//
// Distances have the bits of the same sums in the same order wherever they are computed, and eps leaves room for their
// rounding: results have the same bits for any arithmetic of the filter, any batch of queries and any thread count.
//
// This file: the constants of the bound, how queries are shared among threads, and the operators.
#include <cmath>
#include <limits>
#include <numeric>
#include <tuple>
#include <vector>

#include "search.h"

namespace robustft {
namespace {

constexpr int64_t kSharedRows = 128;       // with fewer queries a thread than this, threads share the points instead
constexpr int64_t kDirectQueries = 4;      // so few are done without products: reading the points is all that counts
constexpr int64_t kSortedShare = 6;        // searches for more than this part of the points are not filtered: all these
                                           // are to be measured, and in their order that takes a fraction of the time
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

}  // namespace

template <class T>
Search<T>::Search(const Tensor& queries, const PointSet<T>& set, int64_t k, bool squared, T* distances,
                  int64_t* indices)
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
  room_ = std::min(int64_t(hits) + 2 * k, set.n) + 2 * kTileSize / kSearchRows;
  max_rows_ = std::clamp<int64_t>(kHitBytes / int64_t(sizeof(Hit<T>)) / room_, 1, kSearchRows);
}

template <class T>
void Search<T>::run(int64_t count) {
  if (!count) return;
  if (count > kUnsampledQueries && rank_ < set_.samples && set_.samples <= kSampleSize / 16)
    sample_.emplace(set_.sample, RightMatrix<T>::kColumns, set_.arithmetic);
  std::vector<int64_t> all(count);
  std::iota(all.begin(), all.end(), 0);
  if (indices_ && k_ > set_.n / kSortedShare) return sorted(all);
  if (set_.form == FilterForm::points && count <= kDirectQueries) return direct(all);
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

namespace {

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
    const FilterForm form = bf16::available() ? FilterForm::bf16 : FilterForm::fixed;
    STD_TORCH_CHECK(!filter.numel() || (filter.numel() == filter_size(form, n, d) && dtype() == ScalarType::Float), op,
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
