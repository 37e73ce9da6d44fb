// Streamed similarities: softmax statistics of S = x t^T over rows and columns, and the gradient they lead to.
//
//   x (n, d), t (m, d)    features;  xt, tt the teacher's;  z = s S and zt = st St the logits
//   statistics            per row i, and alike per column j:
//                           max = max_j S_ij                  log_sum = log sum_j exp(s (S_ij - max))
//                           gap = sum_j p_ij (S_ij - max),    p = softmax_j z
//                           target = sum_{j: same label} S_ij     total = sum_j S_ij
//                           lse_t = logsumexp_j zt_ij,        gap_t = sum_j p^t_ij (S_ij - max)
//   gradient              G_ij = a_i p_ij + a'_j p'_ij - [same label](b_i + b'_j) - (u_i + u'_j) - c_i pt_ij - c'_j
//   pt'_ij
//                         dx = s G t,  dt = s G^T x         p by rows, p' by columns, pt of the teacher
//
// Every loss on an image-text similarity matrix is a choice of these coefficients. S exists one tile at a time: memory
// is the tile (kTileBytes, twice with a teacher), the outputs and O(n + m). Cost: n m d multiply-adds for statistics,
// 3 n m d for the gradient (S is computed again), twice the S part with a teacher.
//
// Maximum, softmax and target come from the same S, so log_sum + s (max - target) cannot go negative by rounding.
// Half-precision features are widened once to float32: products, sums and outputs of the tiles are float32.
#include "similarity.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <tuple>
#include <vector>

#include "dispatch.h"
#include "torch_api.h"

namespace robustft {
namespace {

constexpr int64_t kTileRows = 256;
constexpr int64_t kTileBytes = 1 << 20;

template <class T>
constexpr int64_t kTileCols = kTileBytes / (kTileRows * sizeof(T));

// One of the two matrices S (student, teacher): its factors and the tile of it in memory.
struct Factors {
  Tensor x, t, tile;
  double scale;

  template <class T>
  static Factors of(const Tensor& x, const Tensor& t, const Tensor& scale) {
    const ScalarType dtype = scalar_type<T>();
    const double s = *contiguous_as(scale, ScalarType::Double).template const_data_ptr<double>();
    STD_TORCH_CHECK(!(s < 0), "logit_scale is ", s,
                    "; expected the multiplied-out scale exp(...), which is not negative");
    Tensor tile =
        torch::stable::new_empty(x, {std::min(kTileRows, x.size(0)), std::min(kTileCols<T>, t.size(0))}, dtype);
    return {contiguous_as(x, dtype), contiguous_as(t, dtype), tile, s};
  }

  // Computes rows [i, i + rows) x columns [j, j + cols) and returns where they are; the leading dimension is
  // tile.size(1).
  template <class T>
  T* compute(int64_t i, int64_t rows, int64_t j, int64_t cols) {
    Tensor out = block(tile, 0, rows, 0, cols);
    Tensor t_block = narrow_rows(t, j, cols);
    mm_out(out, narrow_rows(x, i, rows), torch::stable::transpose(t_block, 0, 1));
    return tile.mutable_data_ptr<T>();
  }
};

template <class T>
std::vector<Label<T>> labels_of(const Tensor& labels) {
  const Tensor wide = contiguous_as(labels, ScalarType::Long);
  const int64_t* p = wide.const_data_ptr<int64_t>();
  return std::vector<Label<T>>(p, p + wide.numel());
}

// Calls f(tile) for every tile of S, row panel by row panel.
template <class T, class F>
void for_each_tile(Factors& student, std::optional<Factors>& teacher, const std::vector<Label<T>>& row_labels,
                   const std::vector<Label<T>>& col_labels, const F& f) {
  const int64_t n = student.x.size(0), m = student.t.size(0);
  for (int64_t i = 0; i < n; i += kTileRows)
    for (int64_t j = 0; j < m; j += kTileCols<T>) {
      const int64_t rows = std::min(kTileRows, n - i), cols = std::min(kTileCols<T>, m - j);
      Tile<T> tile{};
      tile.s = student.compute<T>(i, rows, j, cols);
      tile.teacher = teacher ? teacher->compute<T>(i, rows, j, cols) : nullptr;
      tile.ld = student.tile.size(1);
      tile.row0 = i, tile.col0 = j, tile.rows = rows, tile.cols = cols;
      tile.scale = T(student.scale);
      tile.teacher_scale = teacher ? T(teacher->scale) : T(0);
      tile.row_labels = row_labels.data(), tile.col_labels = col_labels.data();
      f(tile);
    }
}

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

  // (5 or 7, n): max, log_sum, gap, target, total, and the teacher's lse, gap.
  Tensor finish(const Tensor& like, const std::optional<Factors>& other) {
    const RunningStatistics<T> v = view();
    Tensor out = torch::stable::new_empty(like, {teacher ? 7 : 5, n}, scalar_type<T>());
    T* o = out.mutable_data_ptr<T>();
    for (int64_t i = 0; i < n; ++i) {
      o[i] = v.max[i];
      o[n + i] = std::log(v.sum[i]);
      o[2 * n + i] = v.weighted[i] / v.sum[i];
      o[3 * n + i] = v.target[i];
      o[4 * n + i] = v.total[i];
      if (teacher) {
        o[5 * n + i] = T(other->scale) * v.teacher_max[i] + std::log(v.teacher_sum[i]);
        o[6 * n + i] = v.teacher_weighted[i] / v.teacher_sum[i];
      }
    }
    return out;
  }
};

template <class T>
GradientCoefficients<T> coefficients_of(const Tensor& c, bool teacher) {
  const T* p = c.const_data_ptr<T>();
  const int64_t n = c.size(1);
  return {p, p + n, p + 2 * n, p + 3 * n, p + 4 * n, teacher ? p + 5 * n : nullptr, teacher ? p + 6 * n : nullptr};
}

struct Inputs {
  const Tensor &x, &t, &scale, &x_labels, &t_labels;
  const std::optional<Tensor>&x_teacher, &t_teacher, &teacher_scale;

  void check(const char* op) const {
    STD_TORCH_CHECK(x.dim() == 2 && t.dim() == 2 && x.size(1) == t.size(1) && x.size(0) > 0 && t.size(0) > 0, op,
                    ": x and t must be (n, d) and (m, d), n and m at least 1");
    STD_TORCH_CHECK(x.scalar_type() == t.scalar_type(), op, ": x and t differ in dtype");
    STD_TORCH_CHECK(scale.numel() == 1, op, ": scale must have one element");
    STD_TORCH_CHECK(x_labels.numel() == x.size(0) && t_labels.numel() == t.size(0), op,
                    ": one label per row of x and t");
    STD_TORCH_CHECK(
        x_teacher.has_value() == t_teacher.has_value() && t_teacher.has_value() == teacher_scale.has_value(), op,
        ": x_teacher, t_teacher and teacher_scale go together");
    if (x_teacher)
      STD_TORCH_CHECK(x_teacher->dim() == 2 && t_teacher->dim() == 2 && x_teacher->size(0) == x.size(0) &&
                          t_teacher->size(0) == t.size(0) && x_teacher->size(1) == t_teacher->size(1),
                      op, ": the teacher's features must match x and t in number");
  }

  template <class T>
  std::optional<Factors> teacher() const {
    if (!x_teacher) return std::nullopt;
    return Factors::of<T>(*x_teacher, *t_teacher, *teacher_scale);
  }
};

template <class T>
std::tuple<Tensor, Tensor> statistics(const Inputs& in) {
  Factors student = Factors::of<T>(in.x, in.t, in.scale);
  std::optional<Factors> teacher = in.teacher<T>();
  StatisticsBuffer<T> row(in.x.size(0), teacher.has_value()), col(in.t.size(0), teacher.has_value());
  const RunningStatistics<T> row_view = row.view(), col_view = col.view();
  const auto row_labels = labels_of<T>(in.x_labels), col_labels = labels_of<T>(in.t_labels);
  for_each_tile<T>(student, teacher, row_labels, col_labels, [&](const Tile<T>& tile) {
    parallel_blocks(tile.rows, tile.cols,
                    [&](int64_t begin, int64_t end) { ROBUSTFT_CALL(row_statistics<T>, tile, row_view, begin, end); });
    parallel_blocks(tile.cols, tile.rows, [&](int64_t begin, int64_t end) {
      ROBUSTFT_CALL(column_statistics<T>, tile, col_view, begin, end);
    });
  });
  return {row.finish(in.x, teacher), col.finish(in.x, teacher)};
}

template <class T>
std::tuple<Tensor, Tensor> gradient(const Inputs& in, const Tensor& row, const Tensor& col) {
  Factors student = Factors::of<T>(in.x, in.t, in.scale);
  std::optional<Factors> teacher = in.teacher<T>();
  const Tensor row_c = contiguous_as(row, scalar_type<T>()), col_c = contiguous_as(col, scalar_type<T>());
  const auto row_coefficients = coefficients_of<T>(row_c, teacher.has_value());
  const auto col_coefficients = coefficients_of<T>(col_c, teacher.has_value());
  const auto row_labels = labels_of<T>(in.x_labels), col_labels = labels_of<T>(in.t_labels);
  Tensor dx = torch::stable::new_zeros(student.x, student.x.sizes());
  Tensor dt = torch::stable::new_zeros(student.t, student.t.sizes());
  for_each_tile<T>(student, teacher, row_labels, col_labels, [&](const Tile<T>& tile) {
    parallel_blocks(tile.rows, tile.cols, [&](int64_t begin, int64_t end) {
      ROBUSTFT_CALL(gradient<T>, tile, row_coefficients, col_coefficients, begin, end);
    });
    Tensor g = block(student.tile, 0, tile.rows, 0, tile.cols);
    Tensor dx_block = narrow_rows(dx, tile.row0, tile.rows), dt_block = narrow_rows(dt, tile.col0, tile.cols);
    add_mm(dx_block, g, narrow_rows(student.t, tile.col0, tile.cols));
    add_mm(dt_block, torch::stable::transpose(g, 0, 1), narrow_rows(student.x, tile.row0, tile.rows));
  });
  const ScalarType dtype = in.x.scalar_type();
  return {contiguous_as(dx, dtype), contiguous_as(dt, dtype)};
}

std::tuple<Tensor, Tensor> similarity_statistics(const Tensor& x, const Tensor& t, const Tensor& scale,
                                                 const Tensor& x_labels, const Tensor& t_labels,
                                                 const std::optional<Tensor>& x_teacher,
                                                 const std::optional<Tensor>& t_teacher,
                                                 const std::optional<Tensor>& teacher_scale) {
  const Inputs in{x, t, scale, x_labels, t_labels, x_teacher, t_teacher, teacher_scale};
  in.check("similarity_statistics");
  return x.scalar_type() == ScalarType::Double ? statistics<double>(in) : statistics<float>(in);
}

std::tuple<Tensor, Tensor> similarity_gradient(const Tensor& x, const Tensor& t, const Tensor& scale,
                                               const Tensor& x_labels, const Tensor& t_labels,
                                               const std::optional<Tensor>& x_teacher,
                                               const std::optional<Tensor>& t_teacher,
                                               const std::optional<Tensor>& teacher_scale, const Tensor& row,
                                               const Tensor& col) {
  const Inputs in{x, t, scale, x_labels, t_labels, x_teacher, t_teacher, teacher_scale};
  in.check("similarity_gradient");
  const int64_t kinds = x_teacher ? 7 : 5;
  STD_TORCH_CHECK(row.dim() == 2 && col.dim() == 2 && row.size(0) == kinds && col.size(0) == kinds &&
                      row.size(1) == x.size(0) && col.size(1) == t.size(0),
                  "similarity_gradient: row and col must be (", kinds, ", n) and (", kinds, ", m)");
  return x.scalar_type() == ScalarType::Double ? gradient<double>(in, row, col) : gradient<float>(in, row, col);
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
