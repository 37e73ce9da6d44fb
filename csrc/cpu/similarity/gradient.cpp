// The gradient of every loss on S = x t^T: from coefficients per row and per column (similarity_coefficient),
//
//   G_ij = a_i p_ij + a'_j p'_ij - [same label](b_i + b'_j) - (u_i + u'_j) - c_i pt_ij - c'_j pt'_ij
//   dx = s G t,  dt = s G^T x
//
// with p by rows, p' by columns, and pt, pt' of the teacher. p comes from the exponentials that the statistics kept,
// or, where none were, from S multiplied again; the tiles are those of the statistics, whatever has become of the
// threads.
#include <cmath>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "../dispatch.h"
#include "operators.h"
#include "similarity.h"
#include "tiles.h"

namespace robustft {
namespace similarity {
namespace {

template <class T>
GradientCoefficients<T> coefficients_of(const Tensor& rows, bool teacher, bool totals) {
  namespace coefficient = similarity_coefficient;
  auto of = [p = rows.const_data_ptr<T>(), n = rows.size(1)](int64_t which) { return p + which * n; };
  GradientCoefficients<T> c{of(coefficient::kMax),
                            of(coefficient::kLogSum),
                            of(coefficient::kSoftmax),
                            of(coefficient::kTarget),
                            nullptr,
                            nullptr,
                            nullptr,
                            nullptr};
  if (totals) c.uniform = of(coefficient::kUniform);
  if (teacher)
    c.teacher_max = of(coefficient::kTeacherMax), c.teacher_log_sum = of(coefficient::kTeacherLogSum),
    c.teacher = of(coefficient::kTeacher);
  return c;
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
  Tensor dx = uninitialized(all.student.x.sizes(), all.student.x.scalar_type()),
         dt = uninitialized(all.student.t.sizes(), all.student.t.scalar_type());
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
    auto work = pool.take([&] { return Workspace<T>(in, all.shape, teacher && !keep); });
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

}  // namespace

std::tuple<Tensor, Tensor> similarity_gradient(const Tensor& x, const Tensor& t, const Tensor& scale,
                                               const Tensor& x_labels, const Tensor& t_labels,
                                               const std::optional<Tensor>& x_teacher,
                                               const std::optional<Tensor>& t_teacher,
                                               const std::optional<Tensor>& teacher_scale, const Tensor& row,
                                               const Tensor& col, const Tensor& centers, const Tensor& kept,
                                               bool totals, std::string precision) {
  const Inputs in{x, t, scale, x_labels, t_labels, x_teacher, t_teacher, teacher_scale, precision};
  in.check("similarity_gradient");
  const int64_t kinds = similarity_coefficient::count(in.heads() == 2), n = in.n(), m = in.m();
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

namespace {

// The exponential of the kernels, for its error-bound test.
Tensor vector_exp(const Tensor& x) {
  Tensor in = torch::stable::contiguous(x);
  Tensor out = uninitialized(in.sizes(), in.scalar_type());
  if (in.scalar_type() == ScalarType::Double) {
    ROBUSTFT_CALL(exp_values, in.const_data_ptr<double>(), out.mutable_data_ptr<double>(), in.numel());
  } else {
    STD_TORCH_CHECK(in.scalar_type() == ScalarType::Float, "vector_exp: float32 or float64");
    ROBUSTFT_CALL(exp_values, in.const_data_ptr<float>(), out.mutable_data_ptr<float>(), in.numel());
  }
  return out;
}

}  // namespace
}  // namespace similarity
}  // namespace robustft

STABLE_TORCH_LIBRARY_IMPL(robustft, CPU, m) {
  m.impl("similarity_gradient", TORCH_BOX(&robustft::similarity::similarity_gradient));
  m.impl("vector_exp", TORCH_BOX(&robustft::similarity::vector_exp));
}
