// Streamed similarities: softmax statistics of S = x t^T over rows and columns, and the gradient they lead to.
//
//   x (n, d), t (m, d)    features;  xt, tt the teacher's;  z = s S and zt = st St the logits
//   statistics            per row i, and alike per column j:
//                           max = max_j S_ij                  log_sum = log sum_j exp(s (S_ij - max))
//                           gap = sum_j p_ij (S_ij - max),    p = softmax_j z
//                           target = sum_{j: same label} S_ij     total = sum_j S_ij (only if asked for, else 0)
//                           max_t, log_sum_t: the same of zt, gap_t = sum_j p^t_ij (S_ij - max)
//   gradient              G_ij = a_i p_ij + a'_j p'_ij - [same label](b_i + b'_j) - (u_i + u'_j) - c_i pt_ij - c'_j
//   pt'_ij
//                         dx = s G t,  dt = s G^T x         p by rows, p' by columns, pt of the teacher
//
// Every loss on an image-text similarity matrix is a choice of these coefficients. S exists one tile at a time; with
// `keep` the forward leaves e = exp(z) / 2^(centre of the tile) behind, (n, m) in the dtype of the sums, and the
// gradient is two products from it: 6 n m d flops in all, where multiplying again makes it 8. Kept in full precision:
// half of it, in bfloat16, would save a few percent of the time and cost the gradient's accuracy where p is near 1. Its
// first touch is a tenth of the forward; asking for pages of 2 MB (madvise) made that worse, as the system compacts
// memory to find some.
//
// Maximum, softmax and target come from the same S, so log_sum + s (max - target) cannot go negative by rounding.
// Half-precision features are widened once to float32: sums and outputs of the tiles are float32.
#include "similarity.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "dispatch.h"
#include "tile.h"

namespace robustft {
namespace {

constexpr int64_t kMinRows = 64, kMinCols = 128, kMaxRows = 256, kMaxCols = 512;  // of a tile
constexpr int64_t kPanelsAtOnce = 16;

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The tiles of an (n, m) matrix. The gradient takes the statistics' ones, whatever has become of the threads.
struct TileShape {
  int64_t rows = kMaxRows, cols = kMaxCols;

  // As large as they may be, but so many that each thread finds one in a row and a column of tiles of its own.
  static TileShape of(int64_t n, int64_t m) {
    const int64_t threads = torch::stable::get_num_threads();
    TileShape shape;
    for (;;) {
      const int64_t down = ceil_div(n, shape.rows), across = ceil_div(m, shape.cols);
      if (std::min(down, across) >= threads) return shape;
      if (shape.cols > kMinCols && (across <= down || shape.rows == kMinRows))
        shape.cols /= 2;
      else if (shape.rows > kMinRows)
        shape.rows /= 2;
      else
        return shape;
    }
  }
};

// The centres of all tiles, on the grid of the smallest ones, (heads, down, across + 2), and in the two columns more
// the shape of the tiles.
template <class T>
struct Centers {
  T* data;
  int64_t down, across;

  Centers(T* data, int64_t n, int64_t m) : data(data), down(ceil_div(n, kMinRows)), across(ceil_div(m, kMinCols)) {}
  static std::vector<int64_t> sizes(int64_t heads, int64_t n, int64_t m) {
    return {heads, ceil_div(n, kMinRows), ceil_div(m, kMinCols) + 2};
  }
  T& at(int64_t head, int64_t row0, int64_t col0) const {
    return data[(head * down + row0 / kMinRows) * (across + 2) + col0 / kMinCols];
  }
  void keep(const TileShape& shape) const { data[across] = T(shape.rows), data[across + 1] = T(shape.cols); }
  TileShape shape() const { return {int64_t(data[across]), int64_t(data[across + 1])}; }
};

// Calls f(panel, tile) for all of panels x tiles, sharing the calls out among threads so that at no time two of them
// have the same panel or the same tile: each may add to what belongs to its rows and to its columns. Every panel meets
// the tiles, and every tile the panels, in an order that does not depend on the number of threads. prepare(first, last)
// is called before panels [first, last) are met.
template <class P, class F>
void tournament(int64_t panels, int64_t tiles, const P& prepare, const F& f) {
  const int64_t at_once = std::min(std::max<int64_t>(kPanelsAtOnce, torch::stable::get_num_threads()), tiles);
  for (int64_t first = 0; first < panels; first += at_once) {
    const int64_t count = std::min(at_once, panels - first);
    prepare(first, first + count);
    for (int64_t step = 0; step < tiles; ++step)
      torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
        for (int64_t p = begin; p < end; ++p) f(first + p, (p + step) % tiles);
      });
  }
}

template <class T>
T scale_of(const Tensor& scale) {
  const double s = *contiguous_as(scale, ScalarType::Double).template const_data_ptr<double>();
  STD_TORCH_CHECK(!(s < 0), "logit_scale is ", s,
                  "; expected the multiplied-out scale exp(...), which is not negative");
  return T(s);
}

template <class T>
std::vector<Label<T>> labels_of(const Tensor& labels) {
  const Tensor wide = contiguous_as(labels, ScalarType::Long);
  const int64_t* p = wide.const_data_ptr<int64_t>();
  return std::vector<Label<T>>(p, p + wide.numel());
}

// Lowest and highest label of every `step` samples.
template <class T>
std::vector<Range<Label<T>>> label_ranges(const std::vector<Label<T>>& labels, int64_t step) {
  std::vector<Range<Label<T>>> ranges;
  for (int64_t i = 0; i < int64_t(labels.size()); i += step) {
    const auto begin = labels.begin() + i, end = labels.begin() + std::min<int64_t>(i + step, labels.size());
    const auto [low, high] = std::minmax_element(begin, end);
    ranges.push_back({*low, *high});
  }
  return ranges;
}

struct Inputs {
  const Tensor &x, &t, &scale, &x_labels, &t_labels;
  const std::optional<Tensor>&x_teacher, &t_teacher, &teacher_scale;
  const std::string& precision;

  int64_t n() const { return x.size(0); }
  int64_t m() const { return t.size(0); }
  int64_t heads() const { return x_teacher ? 2 : 1; }
  int64_t kinds() const { return x_teacher ? 8 : 5; }

  void check(const char* op) const {
    STD_TORCH_CHECK(x.dim() == 2 && t.dim() == 2 && x.size(1) == t.size(1) && n() > 0 && m() > 0, op,
                    ": x and t must be (n, d) and (m, d), n and m at least 1");
    STD_TORCH_CHECK(x.scalar_type() == t.scalar_type(), op, ": x and t differ in dtype");
    STD_TORCH_CHECK(scale.numel() == 1, op, ": scale must have one element");
    STD_TORCH_CHECK(x_labels.numel() == n() && t_labels.numel() == m(), op, ": one label per row of x and t");
    STD_TORCH_CHECK(
        x_teacher.has_value() == t_teacher.has_value() && t_teacher.has_value() == teacher_scale.has_value(), op,
        ": x_teacher, t_teacher and teacher_scale go together");
    if (x_teacher)
      STD_TORCH_CHECK(x_teacher->dim() == 2 && t_teacher->dim() == 2 && x_teacher->size(0) == n() &&
                          t_teacher->size(0) == m() && x_teacher->size(1) == t_teacher->size(1),
                      op, ": the teacher's features must match x and t in number");
  }
};

// One of the two matrices S (student, teacher) by its factors, panel by panel.
template <class T>
struct Factors {
  Tensor x, t;
  Arithmetic arithmetic;
  RightMatrix<T> columns;
  std::vector<std::optional<LeftRows<T>>> panels;

  Factors(const Tensor& features, const Tensor& texts, Arithmetic arithmetic, int64_t panels)
      : x(contiguous_as(features, scalar_type<T>())),
        t(contiguous_as(texts, scalar_type<T>())),
        arithmetic(arithmetic),
        columns(t, RightMatrix<T>::kColumns, arithmetic),
        panels(panels) {}

  void prepare(int64_t panel, int64_t rows_of_panel) {
    const int64_t begin = panel * rows_of_panel;
    panels[panel].emplace(x, begin, std::min(rows_of_panel, x.size(0) - begin), arithmetic);
  }
};

// What both operators share: the tiles, their labels, and S of one of them.
template <class T>
struct Tiles {
  const Inputs& in;
  TileShape shape;
  int64_t panels, tiles;
  Arithmetic arithmetic;
  Factors<T> student;
  std::optional<Factors<T>> teacher;
  T scale, teacher_scale = T(0);
  std::vector<Label<T>> row_labels, col_labels;
  std::vector<Range<Label<T>>> row_ranges, col_ranges;

  Tiles(const Inputs& in, const TileShape& shape)
      : in(in),
        shape(shape),
        panels(ceil_div(in.n(), shape.rows)),
        tiles(ceil_div(in.m(), shape.cols)),
        arithmetic(arithmetic_of(in.x.scalar_type(), in.precision)),
        student(in.x, in.t, arithmetic, panels),
        scale(scale_of<T>(in.scale)),
        row_labels(labels_of<T>(in.x_labels)),
        col_labels(labels_of<T>(in.t_labels)),
        row_ranges(label_ranges<T>(row_labels, shape.rows)),
        col_ranges(label_ranges<T>(col_labels, shape.cols)) {
    if (in.x_teacher) {
      teacher.emplace(*in.x_teacher, *in.t_teacher, arithmetic, panels);
      teacher_scale = scale_of<T>(*in.teacher_scale);
    }
  }

  void prepare(int64_t first, int64_t last) {
    torch::stable::parallel_for(first, last, 1, [&](int64_t begin, int64_t end) {
      for (int64_t p = begin; p < end; ++p) {
        student.prepare(p, shape.rows);
        if (teacher) teacher->prepare(p, shape.rows);
      }
    });
  }

  void release(int64_t last) {
    for (auto* factors : {&student, teacher ? &*teacher : nullptr})
      if (factors)
        for (int64_t p = 0; p < last; ++p) factors->panels[p].reset();
  }

  // The tile of a panel and a column tile, over memory that is still to be filled.
  Tile<T> at(int64_t p, int64_t q, T* s, T* teacher_s, int64_t ld) const {
    Tile<T> tile{};
    tile.s = s, tile.teacher = teacher_s, tile.ld = ld;
    tile.row0 = p * shape.rows, tile.col0 = q * shape.cols;
    tile.rows = std::min(shape.rows, in.n() - tile.row0), tile.cols = std::min(shape.cols, in.m() - tile.col0);
    tile.scale = scale, tile.teacher_scale = teacher_scale;
    tile.row_labels = row_labels.data(), tile.col_labels = col_labels.data();
    tile.same = row_ranges[p].low <= col_ranges[q].high && col_ranges[q].low <= row_ranges[p].high;
    return tile;
  }

  void compute(const Tile<T>& tile, int64_t p) const {
    multiply(*student.panels[p], 0, tile.rows, student.columns, tile.col0, tile.cols, tile.s, tile.ld);
    if (tile.teacher)
      multiply(*teacher->panels[p], 0, tile.rows, teacher->columns, tile.col0, tile.cols, tile.teacher, tile.ld);
  }
};

// Memory of one thread: tiles and per-row and per-column vectors.
template <class T>
struct Workspace {
  static constexpr int64_t kVectors = 7;
  int64_t rows, cols;
  Buffer<T> s, teacher, vectors;
  Scratch scratch;

  Workspace(const TileShape& shape, bool teacher)
      : rows(shape.rows),
        cols(shape.cols),
        s(rows * cols),
        teacher(teacher ? rows * cols : 0),
        vectors(kVectors * (rows + cols)) {}

  T* row(int64_t i) const { return vectors.get() + i * rows; }
  T* col(int64_t i) const { return vectors.get() + kVectors * rows + i * cols; }
};

// The running statistics of n rows (or columns) in one buffer, and their final form.
template <class T>
struct StatisticsBuffer {
  int64_t n;
  bool teacher;
  std::vector<T> data;

  StatisticsBuffer(int64_t n, bool teacher) : n(n), teacher(teacher), data(n * (teacher ? 8 : 5), T(0)) {
    std::fill_n(view().max, n, -std::numeric_limits<T>::infinity());
    if (teacher) std::fill_n(view().teacher_max, n, -std::numeric_limits<T>::infinity());
  }

  RunningStatistics<T> view() {
    T* p = data.data();
    RunningStatistics<T> v{p, p + n, p + 2 * n, p + 3 * n, p + 4 * n, nullptr, nullptr, nullptr};
    if (teacher) v.teacher_max = p + 5 * n, v.teacher_sum = p + 6 * n, v.teacher_weighted = p + 7 * n;
    return v;
  }

  // (5 or 8, n): max, log_sum, gap, target, total, and the teacher's max, log_sum, gap.
  Tensor finish(const Tensor& like) {
    const RunningStatistics<T> v = view();
    Tensor out = torch::stable::new_empty(like, {teacher ? 8 : 5, n}, scalar_type<T>());
    T* o = out.mutable_data_ptr<T>();
    for (int64_t i = 0; i < n; ++i) {
      o[i] = v.max[i];
      o[n + i] = std::log(v.sum[i]);
      o[2 * n + i] = v.weighted[i] / v.sum[i];
      o[3 * n + i] = v.target[i];
      o[4 * n + i] = v.total[i];
      if (teacher) {
        o[5 * n + i] = v.teacher_max[i];
        o[6 * n + i] = std::log(v.teacher_sum[i]);
        o[7 * n + i] = v.teacher_weighted[i] / v.teacher_sum[i];
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

// Of a wide tile S itself is kept.
template <class T>
void keep_similarities(const Tile<T>& tile) {
  for (int64_t r = 0; r < tile.rows; ++r) {
    std::copy_n(tile.s + r * tile.ld, tile.cols, tile.e + r * tile.e_ld);
    if (tile.teacher) std::copy_n(tile.teacher + r * tile.ld, tile.cols, tile.teacher_e + r * tile.e_ld);
  }
}

template <class T>
std::tuple<Tensor, Tensor, Tensor, Tensor> statistics(const Inputs& in, bool keep, bool totals) {
  const int64_t n = in.n(), m = in.m();
  Tiles<T> all(in, TileShape::of(n, m));
  const bool teacher = in.heads() == 2;
  StatisticsBuffer<T> row(n, teacher), col(m, teacher);
  const RunningStatistics<T> row_state = row.view(), col_state = col.view();
  Tensor centers = torch::stable::new_zeros(in.x, Centers<T>::sizes(in.heads(), n, m), scalar_type<T>());
  Tensor kept = torch::stable::new_empty(in.x, {keep ? in.heads() * n : 0, m}, scalar_type<T>());
  const Centers<T> center_of_tile(centers.mutable_data_ptr<T>(), n, m);
  center_of_tile.keep(all.shape);
  T* keep_at = kept.mutable_data_ptr<T>();

  Pool<Workspace<T>> pool;
  auto prepare = [&](int64_t first, int64_t last) { all.release(first), all.prepare(first, last); };
  tournament(all.panels, all.tiles, prepare, [&](int64_t p, int64_t q) {
    auto work = pool.take([&] { return Workspace<T>(all.shape, teacher); });
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
      if (keep) keep_similarities(tile);
    }
    const T not_narrow = std::numeric_limits<T>::quiet_NaN();
    center_of_tile.at(0, tile.row0, tile.col0) = narrow ? center : not_narrow;
    if (teacher) center_of_tile.at(1, tile.row0, tile.col0) = narrow ? teacher_center : not_narrow;
  });
  return {row.finish(in.x), col.finish(in.x), centers, kept};
}

template <class T>
GradientCoefficients<T> coefficients_of(const Tensor& c, bool teacher, bool totals) {
  const T* p = c.const_data_ptr<T>();
  const int64_t n = c.size(1);
  return {p,
          p + n,
          p + 2 * n,
          p + 3 * n,
          totals ? p + 4 * n : nullptr,
          teacher ? p + 5 * n : nullptr,
          teacher ? p + 6 * n : nullptr,
          teacher ? p + 7 * n : nullptr};
}

template <class T>
std::tuple<Tensor, Tensor> gradient(const Inputs& in, const Tensor& row, const Tensor& col, const Tensor& centers,
                                    const Tensor& kept, bool totals) {
  const int64_t n = in.n(), m = in.m(), d = in.x.size(1);
  const Centers<T> center_of_tile(const_cast<T*>(centers.const_data_ptr<T>()), n, m);
  const TileShape shape = center_of_tile.shape();
  STD_TORCH_CHECK(shape.rows >= kMinRows && shape.rows <= kMaxRows && shape.cols >= kMinCols && shape.cols <= kMaxCols,
                  "similarity_gradient: centers must be what similarity_statistics returned");
  Tiles<T> all(in, shape);
  const bool teacher = in.heads() == 2, keep = kept.size(0) > 0;
  const Tensor row_c = contiguous_as(row, scalar_type<T>()), col_c = contiguous_as(col, scalar_type<T>());
  const auto row_coefficients = coefficients_of<T>(row_c, teacher, totals);
  const auto col_coefficients = coefficients_of<T>(col_c, teacher, totals);
  const RightMatrix<T> t_rows(all.student.t, RightMatrix<T>::kRows, all.arithmetic);
  std::vector<std::optional<RightMatrix<T>>> x_rows(all.panels);
  Tensor dx = torch::stable::empty_like(all.student.x), dt = torch::stable::empty_like(all.student.t);
  std::vector<char> panel_begun(all.panels, false), tile_begun(all.tiles, false);  // whether dx, dt hold a sum there
  T *const dx_at = dx.mutable_data_ptr<T>(), *const dt_at = dt.mutable_data_ptr<T>();
  const T* const kept_at = kept.const_data_ptr<T>();

  Pool<Workspace<T>> pool;
  auto prepare = [&](int64_t first, int64_t last) {
    all.release(first);
    if (!keep) all.prepare(first, last);
    for (auto& done : x_rows) done.reset();
    torch::stable::parallel_for(first, last, 1, [&](int64_t begin, int64_t end) {
      for (int64_t p = begin; p < end; ++p) {
        const int64_t row0 = p * all.shape.rows;
        x_rows[p].emplace(all.student.x, row0, std::min(all.shape.rows, n - row0), RightMatrix<T>::kRows,
                          all.arithmetic);
      }
    });
  };
  tournament(all.panels, all.tiles, prepare, [&](int64_t p, int64_t q) {
    auto work = pool.take([&] { return Workspace<T>(all.shape, teacher && !keep); });
    const Tile<T> tile = all.at(p, q, work->s.get(), teacher && !keep ? work->teacher.get() : nullptr, work->cols);
    GradientTile<T> out{};
    out.g = work->s.get(), out.g_ld = work->cols;
    out.center = center_of_tile.at(0, tile.row0, tile.col0);
    out.teacher_center = teacher ? center_of_tile.at(1, tile.row0, tile.col0) : T(0);
    if (keep) {
      out.s = kept_at + tile.row0 * m + tile.col0, out.ld = m;
      out.teacher = teacher ? out.s + n * m : nullptr;
    } else {
      all.compute(tile, p);
      out.s = tile.s, out.teacher = tile.teacher, out.ld = tile.ld;
    }
    const Workspace<T>& w = *work;
    if (std::isnan(out.center)) {
      ROBUSTFT_CALL(wide_gradient<T>, tile, out, row_coefficients, col_coefficients);
    } else {
      out.exponentials = keep;
      const TileFactors<T> of_rows{w.row(0), w.row(1), w.row(2), w.row(3)};
      const TileFactors<T> of_cols{w.col(0), w.col(1), w.col(2), w.col(3)};
      ROBUSTFT_CALL(tile_gradient<T>, tile, out, row_coefficients, col_coefficients, of_rows, of_cols);
    }
    add_product(out.g, out.g_ld, tile.rows, tile.cols, t_rows, tile.col0, dx_at + tile.row0 * d,
                !std::exchange(panel_begun[p], true), work->scratch);
    add_transposed_product(out.g, out.g_ld, tile.rows, tile.cols, *x_rows[p], 0, dt_at + tile.col0 * d,
                           !std::exchange(tile_begun[q], true), work->scratch);
  });
  const ScalarType dtype = in.x.scalar_type();
  return {contiguous_as(dx, dtype), contiguous_as(dt, dtype)};
}

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

std::tuple<Tensor, Tensor> similarity_gradient(const Tensor& x, const Tensor& t, const Tensor& scale,
                                               const Tensor& x_labels, const Tensor& t_labels,
                                               const std::optional<Tensor>& x_teacher,
                                               const std::optional<Tensor>& t_teacher,
                                               const std::optional<Tensor>& teacher_scale, const Tensor& row,
                                               const Tensor& col, const Tensor& centers, const Tensor& kept,
                                               bool totals, std::string precision) {
  const Inputs in{x, t, scale, x_labels, t_labels, x_teacher, t_teacher, teacher_scale, precision};
  in.check("similarity_gradient");
  const int64_t kinds = in.kinds(), n = in.n(), m = in.m();
  STD_TORCH_CHECK(row.dim() == 2 && col.dim() == 2 && row.size(0) == kinds && col.size(0) == kinds &&
                      row.size(1) == n && col.size(1) == m,
                  "similarity_gradient: row and col must be (", kinds, ", n) and (", kinds, ", m)");
  const ScalarType dtype = x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  const std::vector<int64_t> sizes = Centers<float>::sizes(in.heads(), n, m);
  STD_TORCH_CHECK(centers.dim() == 3 && centers.size(0) == sizes[0] && centers.size(1) == sizes[1] &&
                      centers.size(2) == sizes[2] && kept.dim() == 2 && kept.size(1) == m &&
                      (kept.size(0) == 0 || kept.size(0) == in.heads() * n) && centers.scalar_type() == dtype &&
                      kept.scalar_type() == dtype,
                  "similarity_gradient: centers and kept must be what similarity_statistics returned");
  const Tensor c = torch::stable::contiguous(centers), k = torch::stable::contiguous(kept);
  return dtype == ScalarType::Double ? gradient<double>(in, row, col, c, k, totals)
                                     : gradient<float>(in, row, col, c, k, totals);
}

// The exponential of the kernels, for its error-bound test.
Tensor vector_exp(const Tensor& x) {
  Tensor in = torch::stable::contiguous(x);
  Tensor out = torch::stable::empty_like(in);
  if (in.scalar_type() == ScalarType::Double) {
    ROBUSTFT_CALL(exp_values, in.const_data_ptr<double>(), out.mutable_data_ptr<double>(), in.numel());
  } else {
    STD_TORCH_CHECK(in.scalar_type() == ScalarType::Float, "vector_exp: float32 or float64");
    ROBUSTFT_CALL(exp_values, in.const_data_ptr<float>(), out.mutable_data_ptr<float>(), in.numel());
  }
  return out;
}

}  // namespace
}  // namespace robustft

STABLE_TORCH_LIBRARY_IMPL(robustft, CPU, m) {
  m.impl("similarity_statistics", TORCH_BOX(&robustft::similarity_statistics));
  m.impl("similarity_gradient", TORCH_BOX(&robustft::similarity_gradient));
  m.impl("vector_exp", TORCH_BOX(&robustft::vector_exp));
}
