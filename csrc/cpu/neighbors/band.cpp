// The exact end of a neighbour search (neighbors.cpp): distances by direct sums of (q - x)^2 in double, without
// cancellation, of the points that a filter leaves, or of all.
//
// Band. t > t_k + 2 eps is certainly among the k - 1 best, h of these; t < t_k - 2 eps certainly is not among the k
// best. The k-th distance is the (k - h)-th of the rest. Of these |t - t_k| <= eps go first, about half: their
// (k - h')-th, with h' all greater t, is a value v of s, and only points with v within eps of their t can be on its
// other side. The k nearest need all t >= t_k - 2 eps.
#include "search.h"

namespace robustft {

template <class T>
T Search<T>::finish(int64_t id, int64_t r, double eps, double norm_squared, std::vector<Hits<T>>& parts,
                    SearchWorkspace<T>& w) {
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
  w.query.assign(queries_ + id * set_.d, queries_ + (id + 1) * set_.d);
  w.rows.clear(), w.open.clear(), w.squared.clear(), w.neighbors.clear();
  int64_t above = 0;  // of the points that are not measured, those before the k-th
  for (int64_t i = 0; i < count; ++i) {
    const double t = hits[i].score;
    if (indices_ ? t >= low : std::abs(t - t_k) <= eps)
      w.rows.push_back(hits[i].point);
    else if (t > high)
      ++above;
    else if (t >= low)
      w.open.push_back(hits[i]);
  }
  measure(w);
  if (indices_) {
    write(id, w.neighbors, k_, w);
    return std::numeric_limits<T>::quiet_NaN();
  }
  for (const Hit<T>& h : w.open) above += h.score > t_k;
  do {
    const int64_t measured = w.squared.size(), rank = k_ - above;
    double v = rank < 1 ? std::numeric_limits<double>::infinity() : -std::numeric_limits<double>::infinity();
    if (rank >= 1 && rank <= measured) {
      w.order = w.squared;
      std::nth_element(w.order.begin(), w.order.begin() + (rank - 1), w.order.end());
      v = (norm_squared - w.order[rank - 1]) / 2;
    }
    w.rows.clear();
    const auto settled = std::partition(w.open.begin(), w.open.end(), [=](const Hit<T>& h) {
      return h.score > t_k ? h.score - eps >= v : h.score + eps <= v;
    });
    for (auto h = settled; h != w.open.end(); ++h) {
      w.rows.push_back(h->point);
      above -= h->score > t_k;
    }
    w.open.erase(settled, w.open.end());
    measure(w);
  } while (!w.rows.empty());
  write(id, w.neighbors, k_ - above, w);
  return std::numeric_limits<T>::quiet_NaN();
}

template <class T>
void Search<T>::measure(SearchWorkspace<T>& w) {
  const size_t known = w.squared.size();
  w.squared.resize(known + w.rows.size());
  ROBUSTFT_CALL(squared_distances<T>, w.query.data(), set_.row(0), set_.d, w.rows.data(), int64_t(w.rows.size()),
                w.squared.data() + known);
  for (size_t i = 0; i < w.rows.size(); ++i) w.neighbors.push_back({distance(w.squared[known + i]), w.rows[i]});
}

template <class T>
void Search<T>::direct(const std::vector<int64_t>& ids) {
  constexpr int64_t kRows = 64, kQueries = 16, kTileBytes = 16 << 10;  // a tile stays in the first cache
  const int64_t d = set_.d, rows_of_tile = std::clamp<int64_t>(kTileBytes / int64_t(sizeof(T)) / d, 4, kRows);
  const int64_t tiles = (set_.n + rows_of_tile - 1) / rows_of_tile;
  const int64_t parts = std::min<int64_t>(torch::stable::get_num_threads(), tiles);
  auto workspace = pool_.take([] { return SearchWorkspace<T>(); });
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
          const int64_t begin = tile * rows_of_tile, rows = std::min(rows_of_tile, set_.n - begin);
          for (int64_t i = 0; i < count; ++i) {
            ROBUSTFT_CALL(squared_distances<T>, queries.data() + i * d, set_.row(begin), d, nullptr, rows, squared);
            for (int64_t r = 0; r < rows; ++r) nearest[p * count + i].push({distance(squared[r]), int32_t(begin + r)});
          }
        }
    });
    for (int64_t i = 0; i < count; ++i) {
      std::vector<Neighbor<T>>& all = nearest[i].items;
      for (int64_t p = 1; p < parts; ++p) {
        const std::vector<Neighbor<T>>& more = nearest[p * count + i].items;
        all.insert(all.end(), more.begin(), more.end());
      }
      write(ids[done + i], all, k_, *workspace);
    }
  }
}

template <class T>
void Search<T>::write(int64_t id, std::vector<Neighbor<T>>& candidates, int64_t rank, SearchWorkspace<T>& w) {
  if (int64_t(candidates.size()) < rank) {
    std::fill_n(out_ + id * (indices_ ? k_ : 1), indices_ ? k_ : 1, std::numeric_limits<T>::quiet_NaN());
    if (indices_) std::fill_n(indices_ + id * k_, k_, -1);
  } else if (indices_) {
    if (rank > int64_t(candidates.size()) / 16) {
      sort_by_distance(candidates, w.spare);
    } else {
      std::partial_sort(candidates.begin(), candidates.begin() + rank, candidates.end());
    }
    put(id, candidates);
  } else {
    std::nth_element(candidates.begin(), candidates.begin() + (rank - 1), candidates.end());
    out_[id] = candidates[rank - 1].distance;
  }
}

#define ROBUSTFT_INSTANTIATE(T)                                                                               \
  template T Search<T>::finish(int64_t, int64_t, double, double, std::vector<Hits<T>>&, SearchWorkspace<T>&); \
  template void Search<T>::direct(const std::vector<int64_t>&);
ROBUSTFT_INSTANTIATE(float)
ROBUSTFT_INSTANTIATE(double)

}  // namespace robustft
