// A search for a large part of the points: the distances to all, and the k smallest of them in their order.
//
// A block of queries is measured against a tile of points, both in double and side by side (block_distances), while
// they are in the second cache. Of a row of distances those below a bound that at least k do not exceed are sorted.
#include "search.h"

namespace robustft {
namespace {

constexpr int64_t kQueries = 32;           // of a block,
constexpr int64_t kBlockBytes = 16 << 20;  // or as many as have distances of this size
constexpr int64_t kTileBytes = 64 << 10;   // of points in double
constexpr int kCountedBits = 11;           // of keys, for the bound

// The k nearest of n points at these distances, and maybe others, in the order of their indices.
template <class T>
void nearest_of(const T* distances, int64_t n, int64_t k, std::vector<Neighbor<T>>& out) {
  out.clear();
  if (k == n) {
    for (int64_t i = 0; i < n; ++i) out.push_back({distances[i], int32_t(i)});
    return;
  }
  const auto [least, most] = std::minmax_element(distances, distances + n);
  const DistanceKey<T> base = key_of(*least);
  const int shift = std::max(0, key_bits(*least, *most) - kCountedBits);
  std::vector<int64_t> counts(int64_t(1) << kCountedBits);
  for (int64_t i = 0; i < n; ++i) ++counts[(key_of(distances[i]) - base) >> shift];
  DistanceKey<T> last = 0;  // the bound, in counts
  for (int64_t reached = counts[0]; reached < k; reached += counts[++last]) {
  }
  for (int64_t i = 0; i < n; ++i)
    if ((key_of(distances[i]) - base) >> shift <= last) out.push_back({distances[i], int32_t(i)});
}

}  // namespace

template <class T>
void Search<T>::sorted(const std::vector<int64_t>& ids) {
  const int64_t n = set_.n, d = set_.d, side = kBlockQueries;
  const int64_t tile = std::max<int64_t>(1, kTileBytes / int64_t(sizeof(double)) / d / kBlockPoints) * kBlockPoints;
  const int64_t tiles = (n + tile - 1) / tile, threads = torch::stable::get_num_threads();
  const int64_t step = std::clamp(kBlockBytes / int64_t(sizeof(T)) / n / side * side, side, kQueries);
  const Buffer<double> queries(step * d);
  const Buffer<T> distances(step * n);
  for (int64_t done = 0; done < int64_t(ids.size()); done += step) {
    const int64_t count = std::min<int64_t>(step, ids.size() - done);
    const auto row_of = [&](int64_t i) { return queries_ + ids[done + i] * d; };
    // A block of one query alone would take the time of four.
    const int64_t in_blocks = count % side == 1 ? count - 1 : count;
    std::vector<T> rows(side * d);
    for (int64_t i = 0; i < in_blocks; i += side) {
      const int64_t height = std::min(side, in_blocks - i);
      for (int64_t r = 0; r < height; ++r) std::copy_n(row_of(i + r), d, rows.begin() + r * d);
      ROBUSTFT_CALL(pack_block<T>, rows.data(), height, d, side, queries.get() + i * d);
    }
    if (in_blocks < count) std::copy_n(row_of(in_blocks), d, queries.get() + in_blocks * d);
    torch::stable::parallel_for(0, tiles, (tiles + threads - 1) / threads, [&](int64_t first, int64_t last) {
      const Buffer<double> points(tile * d);
      std::vector<double> squared(side * tile);  // of a block of queries
      const auto put = [&](int64_t i, int64_t begin, int64_t width, const double* of_query) {
        T* const out = distances.get() + i * n + begin;
        for (int64_t j = 0; j < width; ++j) out[j] = distance(of_query[j]);
      };
      for (int64_t t = first; t < last; ++t) {
        const int64_t begin = t * tile, width = std::min(tile, n - begin);
        for (int64_t j = 0; j < width && in_blocks; j += kBlockPoints)
          ROBUSTFT_CALL(pack_block<T>, set_.row(begin + j), std::min(kBlockPoints, width - j), d, kBlockPoints,
                        points.get() + j * d);
        for (int64_t i = 0; i < in_blocks; i += side) {
          for (int64_t j = 0; j < width; j += kBlockPoints)
            ROBUSTFT_CALL(block_distances, queries.get() + i * d, points.get() + j * d, d, squared.data() + j, tile);
          for (int64_t r = 0; r < std::min(side, in_blocks - i); ++r)
            put(i + r, begin, width, squared.data() + r * tile);
        }
        if (in_blocks == count) continue;
        ROBUSTFT_CALL(squared_distances<T>, queries.get() + in_blocks * d, set_.row(begin), d, nullptr, width,
                      squared.data());
        put(in_blocks, begin, width, squared.data());
      }
    });
    torch::stable::parallel_for(0, count, 1, [&](int64_t first, int64_t last) {
      auto workspace = pool_.take([] { return SearchWorkspace<T>(); });
      std::vector<Neighbor<T>>& nearest = workspace->neighbors;
      for (int64_t i = first; i < last; ++i) {
        nearest.clear();
        // Of a query that is not finite nothing is near.
        if (std::all_of(row_of(i), row_of(i) + d, [](T x) { return std::isfinite(x); }))
          nearest_of(distances.get() + i * n, n, k_, nearest);
        write(ids[done + i], nearest, k_, *workspace);
      }
    });
  }
}

template void Search<float>::sorted(const std::vector<int64_t>&);
template void Search<double>::sorted(const std::vector<int64_t>&);

}  // namespace robustft
