// A search for a large part of the points: the distances to all, and the k smallest of them in their order.
//
// Every distance has the bits of squared_distances, in one of three ways. A few queries are measured one by one. Of
// T = double, a block of queries is measured against a tile of points, side by side (block_distances). Of T = float,
// distances come from products, at one instruction for a vector of elements instead of two, wherever that is certain:
//
// Let s be the double of squared_distances, and float(s) what is asked for. With x, y a query and a point less a common
// centre, rounded to double, t = |x|^2 + |y|^2 - 2 x.y in double is within e of s. So s is in [max(t - e, 0), t + e].
// Rounding is monotone, and so is the root before it: where both ends are rounded to the same float, this is float(s).
// Elsewhere, of a few distances in a million and near duplicates, s is computed. With u = 2^-53, g_m = m u / (1 - m u)
// for m roundings, X, Y before they were rounded, N = |x|^2 + |y|^2 and S = |X - Y|^2, at most about 2 N, e consists of
//
//   4 u N          |x - y|^2 - S, at most (2 u + u^2) (|X| + |Y|)^2
//   g_d N          both norms: a product and d - 1 sums
//   g_d N          twice the product of x and y: 2 g_d sum |x_i y_i|
//   3 u N          the sum of the norms, and t, at most about 2 N
//   2 g_(d+2) N    s - S: a difference, which counts twice, a product and d - 1 sums, at most g_(d + 2) S
//   2 u N          t - e and t + e
//
// Nothing leaves the range of double: these are sums of squares and products of floats, or of their differences. The
// terms are less than (4 d + 13) u N and some u^2; e = 5 (d + 8) u N leaves room for those and for the rounding of N.
#include "search.h"

namespace robustft {
namespace {

constexpr int64_t kQueries = 256;             // of a block,
constexpr int64_t kQueryBytes = 4 << 20;      // or as many as take so much in double,
constexpr int64_t kDistanceBytes = 32 << 20;  // or have so much of distances
constexpr int64_t kFewQueries = 12;           // for fewer, packing the points would take longer than it saves
constexpr int64_t kLongRow = 1 << 16;         // longer ones are not packed: a panel would take too much memory
constexpr int64_t kTileBytes = 64 << 10;      // of points in double
constexpr int kCountedBits = 11;              // of keys, for the bound
constexpr int64_t kNearlyAll = 8;             // where less than this part of the points is left out, all are sorted

// Calls f(first, last) for ranges of n points, one a thread; all begin at multiples of `tile`.
template <class F>
void over_points(int64_t n, int64_t tile, const F& f) {
  const int64_t tiles = (n + tile - 1) / tile, threads = torch::stable::get_num_threads();
  torch::stable::parallel_for(0, tiles, (tiles + threads - 1) / threads,
                              [&](int64_t first, int64_t last) { f(first * tile, std::min(last * tile, n)); });
}

// Puts the k nearest of n points at these distances into `out`, in their order, and maybe others behind them.
template <class T>
void sort_nearest(const T* distances, int64_t n, int64_t k, std::vector<Neighbor<T>>& out,
                  std::vector<Neighbor<T>>& spare) {
  const auto of_all = [=](int64_t i) { return Neighbor<T>{distances[i], int32_t(i)}; };
  const KeyRange<T> keys = range_of<T>(n, of_all);
  if (n - k <= n / kNearlyAll) return sort_stably(n, of_all, keys, out, spare);
  const int shift = std::max(0, keys.bits - kCountedBits);
  const auto digit = [=](T distance) { return (key_of(distance) - keys.least) >> shift; };
  std::vector<int64_t> counts(int64_t(1) << kCountedBits);
  for (int64_t i = 0; i < n; ++i) ++counts[digit(distances[i])];
  DistanceKey<T> last = 0;  // the bound, in counts
  for (int64_t reached = counts[0]; reached < k; reached += counts[++last]) {
  }
  int64_t kept = 0;
  out.resize(n);
  for (int64_t i = 0; i < n; ++i) {
    out[kept] = of_all(i);
    kept += digit(distances[i]) <= last;
  }
  const auto of_kept = [&](int64_t i) { return out[i]; };
  sort_stably(kept, of_kept, KeyRange<T>{keys.least, shift + bit_length(last)}, out, spare);
}

}  // namespace

template <class T>
void Search<T>::sorted(const std::vector<int64_t>& ids) {
  const int64_t n = set_.n, d = set_.d, total = ids.size();
  const int64_t fitting = std::min(kDistanceBytes / int64_t(sizeof(T)) / n, kQueryBytes / int64_t(sizeof(double)) / d);
  const int64_t most = std::clamp(fitting, kFewQueries, kQueries);
  const int64_t blocks = (total + most - 1) / most, step = (total + blocks - 1) / blocks;
  const Buffer<double> queries(step * d);
  const Buffer<T> distances(step * n);
  for (int64_t done = 0; done < total; done += step) {
    const int64_t count = std::min(step, total - done);
    for (int64_t i = 0; i < count; ++i) std::copy_n(queries_ + ids[done + i] * d, d, queries.get() + i * d);
    if (count < kFewQueries || d > kLongRow)
      measure_each(queries.get(), count, distances.get());
    else
      measure_many(queries.get(), count, distances.get());
    torch::stable::parallel_for(0, count, 1, [&](int64_t first, int64_t last) {
      auto workspace = pool_.take([] { return SearchWorkspace<T>(); });
      std::vector<Neighbor<T>>& nearest = workspace->neighbors;
      for (int64_t i = first; i < last; ++i) {
        const int64_t id = ids[done + i];
        const double* query = queries.get() + i * d;
        // Of a query that is not finite nothing is near.
        if (!std::all_of(query, query + d, [](double x) { return std::isfinite(x); })) {
          nearest.clear();
          write(id, nearest, k_, *workspace);
          continue;
        }
        sort_nearest(distances.get() + i * n, n, k_, nearest, workspace->spare);
        put(id, nearest);
      }
    });
  }
}

template <class T>
void Search<T>::measure_each(const double* queries, int64_t count, T* out) const {
  const int64_t n = set_.n, d = set_.d, tile = std::max<int64_t>(1, kTileBytes / int64_t(sizeof(double)) / d);
  over_points(n, tile, [&](int64_t first, int64_t last) {
    std::vector<double> squared(tile);
    for (int64_t begin = first; begin < last; begin += tile) {
      const int64_t width = std::min(tile, last - begin);
      for (int64_t i = 0; i < count; ++i) {
        ROBUSTFT_CALL(squared_distances<T>, queries + i * d, set_.row(begin), d, nullptr, width, squared.data());
        for (int64_t j = 0; j < width; ++j) out[i * n + begin + j] = distance(squared[j]);
      }
    }
  });
}

template <>
void Search<float>::measure_many(const double* queries, int64_t count, float* out) const {
  const int64_t n = set_.n, d = set_.d;
  const float* const centre = set_.centre.const_data_ptr<float>();
  const Buffer<double> centred(count * d);
  std::vector<double> norms(count);
  for (int64_t i = 0; i < count; ++i)
    for (int64_t j = 0; j < d; ++j) {
      const double x = queries[i * d + j] - centre[j];
      centred.get()[i * d + j] = x;
      norms[i] += x * x;
    }
  const double bound = 5 * double(d + 8) * (std::numeric_limits<double>::epsilon() / 2);
  const PanelQueries left{centred.get(), norms.data(), count, d, bound, squared_};
  over_points(n, kPanelPoints, [&](int64_t first, int64_t last) {
    const Buffer<double> points(kPanelPoints * d);
    double point_norms[kPanelPoints], squared[kPanelPoints];
    int32_t rows[kPanelPoints];
    std::vector<uint64_t> open(count);  // a bit for each point whose distance is not certain
    for (int64_t begin = first; begin < last; begin += kPanelPoints) {
      const Panel panel{points.get(), point_norms, std::min(kPanelPoints, last - begin)};
      ROBUSTFT_CALL(pack_panel, set_.row(begin), centre, panel.count, d, points.get(), point_norms);
      ROBUSTFT_CALL(panel_distances, left, panel, out + begin, n, open.data());
      for (int64_t i = 0; i < count; ++i) {
        int64_t some = 0;
        for (uint64_t bits = open[i]; bits; bits &= bits - 1) rows[some++] = int32_t(begin + __builtin_ctzll(bits));
        if (!some) continue;
        ROBUSTFT_CALL(squared_distances<float>, queries + i * d, set_.row(0), d, rows, some, squared);
        for (int64_t j = 0; j < some; ++j) out[i * n + rows[j]] = distance(squared[j]);
      }
    }
  });
}

template <>
void Search<double>::measure_many(const double* queries, int64_t count, double* out) const {
  const int64_t n = set_.n, d = set_.d, side = kBlockQueries;
  if (d % kBlockDepth) return measure_each(queries, count, out);
  const int64_t tile = std::max<int64_t>(1, kTileBytes / int64_t(sizeof(double)) / d / kBlockPoints) * kBlockPoints;
  const Buffer<double> left((count + side) * d);
  for (int64_t i = 0; i < count; i += side)
    ROBUSTFT_CALL(pack_block, queries + i * d, std::min(side, count - i), d, side, left.get() + i * d);
  over_points(n, tile, [&](int64_t first, int64_t last) {
    const Buffer<double> points(tile * d);
    std::vector<double> squared(side * tile);  // of a block of queries
    for (int64_t begin = first; begin < last; begin += tile) {
      const int64_t width = std::min(tile, last - begin);
      for (int64_t j = 0; j < width; j += kBlockPoints)
        ROBUSTFT_CALL(pack_block, set_.row(begin + j), std::min(kBlockPoints, width - j), d, kBlockPoints,
                      points.get() + j * d);
      for (int64_t i = 0; i < count; i += side) {
        for (int64_t j = 0; j < width; j += kBlockPoints)
          ROBUSTFT_CALL(block_distances, left.get() + i * d, points.get() + j * d, d, squared.data() + j, tile);
        for (int64_t r = 0; r < std::min(side, count - i); ++r)
          for (int64_t j = 0; j < width; ++j) out[(i + r) * n + begin + j] = distance(squared[r * tile + j]);
      }
    }
  });
}

template void Search<float>::sorted(const std::vector<int64_t>&);
template void Search<double>::sorted(const std::vector<int64_t>&);

}  // namespace robustft
