// Softmax statistics of S = x t^T over rows and columns, one tile at a time.
//
//   x (n, d), t (m, d)    features;  xt, tt the teacher's;  z = s S and zt = st St the logits
//   statistics            similarity_statistic, per row i, and alike per column j:
//                           max = max_j S_ij
//                           log_sum = log sum_j exp(s (S_ij - max))
//                           gap = sum_j p_ij (S_ij - max),    p = softmax_j z
//                           target = sum_{j: same label} S_ij
//                           total = sum_j S_ij, only if asked for, else 0
//                           teacher_max, teacher_log_sum: the same of zt
//                           teacher_gap = sum_j pt_ij (S_ij - max),    pt = softmax_j zt
//
// Every loss on an image-text similarity matrix is made of these, and its gradient is a choice of coefficients
// (gradient.cpp). S exists one tile at a time; with `keep` the forward leaves e = exp(z) / 2^(centre of the tile)
// behind, (n, m) in the dtype of the sums, and the gradient is two products from it: 6 n m d flops in all, where
// multiplying again makes it 8. Kept in full precision: half of it, in bfloat16, would save a few percent of the time
// and cost the gradient's accuracy where p is near 1. Its first touch is a tenth of the forward; asking for pages of
// 2 MB (madvise) made that worse, as the system compacts memory to find some.
//
// Maximum, softmax and target come from the same S, so log_sum + s (max - target) cannot go negative by rounding.
#include <cmath>
#include <limits>
#include <string>
#include <tuple>
#include <vector>

#include "../dispatch.h"
#include "operators.h"
#include "similarity.h"
#include "tiles.h"

namespace robustft {
namespace similarity {
namespace {

// The running statistics of n rows (or columns) in one buffer, and their final form.
template <class T>
struct StatisticsBuffer {
  int64_t n;
  bool teacher;
  std::vector<T> data;

  StatisticsBuffer(int64_t n, bool teacher)
      : n(n), teacher(teacher), data(n * similarity_statistic::count(teacher), T(0)) {
    std::fill_n(view().max, n, -std::numeric_limits<T>::infinity());
    if (teacher) std::fill_n(view().teacher_max, n, -std::numeric_limits<T>::infinity());
  }

  RunningStatistics<T> view() {
    namespace stat = similarity_statistic;
    auto of = [&](int64_t which) { return data.data() + which * n; };
    RunningStatistics<T> v{of(stat::kMax),   of(stat::kLogSum), of(stat::kGap), of(stat::kTarget),
                           of(stat::kTotal), nullptr,           nullptr,        nullptr};
    if (teacher)
      v.teacher_max = of(stat::kTeacherMax), v.teacher_sum = of(stat::kTeacherLogSum),
      v.teacher_weighted = of(stat::kTeacherGap);
    return v;
  }

  // The rows of similarity_statistic: logarithms and means in place of the sums that `view` holds there.
  Tensor finish() {
    namespace stat = similarity_statistic;
    const RunningStatistics<T> v = view();
    Tensor out = uninitialized({stat::count(teacher), n}, scalar_type<T>());
    T* o = out.mutable_data_ptr<T>();
    for (int64_t i = 0; i < n; ++i) {
      o[stat::kMax * n + i] = v.max[i];
      o[stat::kLogSum * n + i] = std::log(v.sum[i]);
      o[stat::kGap * n + i] = v.weighted[i] / v.sum[i];
      o[stat::kTarget * n + i] = v.target[i];
      o[stat::kTotal * n + i] = v.total[i];
      if (teacher) {
        o[stat::kTeacherMax * n + i] = v.teacher_max[i];
        o[stat::kTeacherLogSum * n + i] = std::log(v.teacher_sum[i]);
        o[stat::kTeacherGap * n + i] = v.teacher_weighted[i] / v.teacher_sum[i];
      }
    }
    return out;
  }
};

// The centre of logits that one exponential can serve, else NaN. Equal ones, as a batch of one pair has, are left to
// the other kernels too: there they are exp(0), and a gradient that is zero comes out as zero.
template <class T>
T center_of(const Range<T>& range, T scale) {
  const T half = (range.high - range.low) / 2;
  const double center = std::nearbyint((double(range.low) + half) * scale * 1.4426950408889634);
  const bool narrow = half > 0 && scale * half <= kHalfSpan<T> && std::abs(center) < kCenters<T>;
  return narrow ? T(center) : std::numeric_limits<T>::quiet_NaN();
}

template <class T>
std::tuple<Tensor, Tensor, Tensor, Tensor> statistics(const Inputs& in, bool keep, bool totals) {
  const int64_t n = in.n(), m = in.m();
  Tiles<T> all(in, TileShape::of(n, m));
  const bool teacher = in.heads() == 2;
  StatisticsBuffer<T> row(n, teacher), col(m, teacher);
  const RunningStatistics<T> row_state = row.view(), col_state = col.view();
  Tensor centers = zeros<T>(Centers<T>::sizes(in.heads(), n, m));
  Tensor kept = uninitialized({keep ? in.heads() * n : 0, m}, scalar_type<T>());
  const Centers<T> center_of_tile(centers.mutable_data_ptr<T>(), n, m);
  center_of_tile.keep(all.shape);
  T* keep_at = kept.mutable_data_ptr<T>();

  Pool<Workspace<T>> pool;
  auto prepare = [&](int64_t first, int64_t last) { all.release(first), all.prepare(first, last); };
  tournament(all.panels, all.tiles, prepare, [&](int64_t p, int64_t q) {
    auto work = pool.take([&] { return Workspace<T>(in, all.shape, teacher); });
    // S is never multiplied into where e is kept: rows that lie a power of 2 apart share few lines of the caches.
    Tile<T> tile = all.at(p, q, work->s.get(), teacher ? work->teacher.get() : nullptr, work->cols);
    if (keep) {
      tile.e = keep_at + tile.row0 * m + tile.col0, tile.e_ld = m;
      if (teacher) tile.teacher_e = tile.e + n * m;
    }
    all.compute(tile, p);
    const Workspace<T>& w = *work;
    const TileStatistics<T> of_rows{w.row(0), w.row(1), w.row(2), w.row(3), w.row(4), w.row(5), w.row(6)};
    const TileStatistics<T> of_cols{w.col(0), w.col(1), w.col(2), w.col(3), w.col(4), w.col(5), w.col(6)};
    Range<T> range{}, teacher_range{};
    ROBUSTFT_CALL(tile_range<T>, tile, of_rows, of_cols, &range, &teacher_range);
    const T center = center_of(range, tile.scale);
    const T teacher_center = teacher ? center_of(teacher_range, tile.teacher_scale) : T(0);
    const bool narrow = !std::isnan(center + teacher_center);
    if (totals) {
      ROBUSTFT_CALL(tile_totals<T>, tile, row_state.total, col_state.total);
    }
    if (narrow) {
      ROBUSTFT_CALL(tile_statistics<T>, tile, center, teacher_center, of_rows, of_cols, row_state, col_state);
    } else {
      ROBUSTFT_CALL(wide_statistics<T>, tile, row_state, col_state);
      if (keep) keep_similarities(tile);  // of a wide tile S itself
    }
    const T not_narrow = std::numeric_limits<T>::quiet_NaN();
    center_of_tile.at(0, tile.row0, tile.col0) = narrow ? center : not_narrow;
    if (teacher) center_of_tile.at(1, tile.row0, tile.col0) = narrow ? teacher_center : not_narrow;
  });
  return {row.finish(), col.finish(), centers, kept};
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> similarity_statistics(const Tensor& x, const Tensor& t, const Tensor& scale,
                                                                 const Tensor& x_labels, const Tensor& t_labels,
                                                                 const std::optional<Tensor>& x_teacher,
                                                                 const std::optional<Tensor>& t_teacher,
                                                                 const std::optional<Tensor>& teacher_scale,
                                                                 bool totals, bool keep, std::string precision) {
  const Inputs in{x, t, scale, x_labels, t_labels, x_teacher, t_teacher, teacher_scale, precision};
  in.check("similarity_statistics");
  return x.scalar_type() == ScalarType::Double ? statistics<double>(in, keep, totals)
                                               : statistics<float>(in, keep, totals);
}

}  // namespace similarity
}  // namespace robustft

STABLE_TORCH_LIBRARY_IMPL(robustft, CPU, m) {
  m.impl("similarity_statistics", TORCH_BOX(&robustft::similarity::similarity_statistics));
}
