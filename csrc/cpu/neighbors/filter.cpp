// The filter of a neighbour search (neighbors.cpp): products of tiles, and the points that reach a threshold.
//
// A threshold guessed from a sample lets through little more than the k best of t; all points that reach it are kept as
// hits. If at least k did and t_k - 2 eps reaches it, t_k being the k-th largest t of the hits, nothing that matters
// was lost; otherwise that query is done again, with a threshold that holds for certain. So the guess decides how long
// a search takes, never what it finds. Queries for which eps does not hold, or that have more hits than there is memory
// for, are measured against all points instead.
#include "search.h"

namespace robustft {
namespace {

constexpr int64_t kGrowth = 4;  // of the hits of a block

// Where the bound of fixed point leaves more than this share of the points to be measured, float32 products are faster:
// a distance takes about twenty times what the filter spares on a point.
constexpr double kWideBand = 0.04;

}  // namespace

template <class T>
void Search<T>::filtered(const std::vector<int64_t>& ids, std::vector<T> thresholds, int64_t threads) {
  const int64_t rows = ids.size(), d = set_.d;
  const bool bf16 = set_.form == FilterForm::bf16;
  const Buffer<T> centred(rows * d);
  std::vector<RowNorms> norms(rows);
  std::vector<double> eps(rows);
  std::vector<int64_t> beyond;  // the bound, or the range of T
  std::optional<fixed::Queries> in_fixed;
  if (set_.form == FilterForm::fixed) in_fixed.emplace(rows, d);
  for (int64_t r = 0; r < rows; ++r) {
    const T* query = queries_ + ids[r] * d;
    std::copy(query, query + d, centred.get() + r * d);
    ROBUSTFT_CALL(centre_row<T>, query, set_.centre_or_null(), d, bf16, centred.get() + r * d, &norms[r]);
    if constexpr (std::is_same_v<T, float>)
      if (in_fixed) norms[r].residual = in_fixed->set(r, centred.get() + r * d, std::sqrt(norms[r].squared));
    eps[r] = bound(norms[r], set_.form);
    if (!(eps[r] > 0)) {
      beyond.push_back(ids[r]);
      std::fill_n(centred.get() + r * d, d, T(0));
    }
  }
  const LeftRows<T> left(centred.get(), rows, d, set_.arithmetic);
  if (thresholds.empty()) {
    double share = 0;
    thresholds = guess(left, eps, threads, &share);
    if (in_fixed && share > kWideBand) {
      in_fixed.reset();
      for (int64_t r = 0; r < rows; ++r)
        if (eps[r] > 0) eps[r] = bound(norms[r], FilterForm::points);
      thresholds = guess(left, eps, threads, &share);
    }
  }
  for (int64_t r = 0; r < rows; ++r)
    if (!(eps[r] > 0)) thresholds[r] = std::numeric_limits<T>::infinity();

  const int64_t step = std::clamp<int64_t>(kTileSize / rows / 16 * 16, 16, 4096);
  const int64_t tiles = (set_.n + step - 1) / step, parts = std::min(threads, tiles);
  const int64_t budget = kGrowth * std::max(room_ * rows, kHitBytes / int64_t(sizeof(Hit<T>)));
  std::vector<Hits<T>> hits;
  for (int64_t p = 0; p < parts; ++p) hits.emplace_back(thresholds, eps, k_, room_ + 2 * step, budget);
  torch::stable::parallel_for(0, parts, 1, [&](int64_t first, int64_t last) {
    auto workspace = pool_.take([] { return SearchWorkspace<T>(); });
    for (int64_t p = first; p < last; ++p)
      for (int64_t tile = tiles * p / parts; tile < tiles * (p + 1) / parts; ++tile)
        scan(left, in_fixed ? &*in_fixed : nullptr, tile * step, std::min(step, set_.n - tile * step), hits[p],
             *workspace);
  });

  constexpr T kDone = std::numeric_limits<T>::quiet_NaN();
  std::vector<T> again(rows, kDone);
  torch::stable::parallel_for(0, rows, threads == 1 ? rows : 1, [&](int64_t first, int64_t last) {
    auto workspace = pool_.take([] { return SearchWorkspace<T>(); });
    for (int64_t r = first; r < last; ++r)
      if (eps[r] > 0) again[r] = finish(ids[r], r, eps[r], norms[r].squared, hits, *workspace);
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

template <class T>
double Search<T>::bound(const RowNorms& norms, FilterForm form) const {
  const bool exact = form == FilterForm::points;
  const double norm = std::sqrt(norms.squared), residual = exact ? 0 : std::sqrt(norms.residual);
  const double of_points = exact ? 0 : set_.residual, scale = norm + set_.norm, rounded = norm + residual;
  const double gamma = form == FilterForm::fixed ? 4 * double(std::numeric_limits<T>::epsilon()) : gamma_;
  const bool is_float = scalar_type<T>() == ScalarType::Float;
  if (!(scale > (is_float ? 1e-10 : 1e-140) && scale < (is_float ? 1e15 : 1e140))) return 0;  // squares leave T's range
  return 1.001 * (residual * set_.norm + rounded * of_points + gamma * rounded * (set_.norm + of_points) +
                  rounding_ * scale * scale);
}

template <class T>
std::vector<T> Search<T>::guess(const LeftRows<T>& left, const std::vector<double>& eps, int64_t threads,
                                double* share) {
  std::vector<T> thresholds(left.count, -std::numeric_limits<T>::infinity());
  if (!sample_) return thresholds;
  const int64_t m = set_.samples;
  std::vector<T> bias(m);
  for (int64_t i = 0; i < m; ++i) bias[i] = set_.bias.template const_data_ptr<T>()[sample_row(i, m, set_.n)];
  std::vector<int64_t> open(left.count);  // sampled points that the bound would leave to be measured
  const int64_t step = kSampleSize / m / 16 * 16, steps = (left.count + step - 1) / step;
  torch::stable::parallel_for(0, steps, threads == 1 ? steps : 1, [&](int64_t first, int64_t last) {
    auto workspace = pool_.take([] { return SearchWorkspace<T>(); });
    T* scores = workspace->scores.get();
    for (int64_t i = first * step; i < std::min(last * step, left.count); i += step) {
      const int64_t rows = std::min(step, left.count - i);
      multiply(left, i, rows, *sample_, 0, m, scores, m);
      for (int64_t r = 0; r < rows; ++r) {
        T score;
        ROBUSTFT_CALL(score_reached<T>, scores + r * m, bias.data(), m, rank_, &score);
        thresholds[i + r] = below<T>(score - 2 * eps[i + r]);
        const T low = thresholds[i + r], high = T(score + 2 * eps[i + r]);
        for (int64_t j = 0; j < m; ++j) {
          const T t = scores[r * m + j] - bias[j];
          open[i + r] += (t >= low) & (t <= high);
        }
      }
    }
  });
  *share = double(std::accumulate(open.begin(), open.end(), int64_t(0))) / double(m * left.count);
  return thresholds;
}

template <class T>
void Search<T>::scan(const LeftRows<T>& left, const fixed::Queries* in_fixed, int64_t begin, int64_t count,
                     Hits<T>& hits, SearchWorkspace<T>& w) {
  const int64_t d = set_.d;
  T* scores = w.scores.get();
  if (in_fixed) {
    if constexpr (std::is_same_v<T, float>) in_fixed->multiply(set_.panels(begin), set_.scale, count, scores);
  } else if (set_.form == FilterForm::bf16 || !set_.centred) {
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

template void Search<float>::filtered(const std::vector<int64_t>&, std::vector<float>, int64_t);
template void Search<double>::filtered(const std::vector<int64_t>&, std::vector<double>, int64_t);

}  // namespace robustft
