// The sigmoid losses of S = x t^T, each pair of a row and a column a decision of its own.
//
//   x (n, d), t (m, d)    features;  xt, tt the teacher's;  z = s S + b and zt = st St + bt the logits
//   sums                  sigmoid_sum, per row i:
//                           loss = sum_j softplus(-y_ij z_ij),    y = 1 where the labels are the same, else -1
//                           by_scale = sum_j G_ij S_ij,  by_bias = sum_j G_ij,    G = sigmoid(z) - [same label]
//                         and with a teacher, with its probabilities sigmoid(zt) in place of [same label]:
//                           loss = sum_j log(1 + exp(z)) - sigmoid(zt) z,  by_scale, by_bias of
//                           H = sigmoid(z) - sigmoid(zt)
//   dx = s (w G + w' H) t,  dt = s (w G + w' H)^T x    only with weights w (and w') of the rows
//
// No row waits for another, nor for the end of its own: a tile's gradient is known as soon as the tile is. So losses
// and gradients come from one sweep, 6 n m d flops, in which S exists a tile at a time; without weights it takes 2. A
// sweep without weights may keep S, and one with weights take it from there: 4 n m d flops.
//
// sigmoid_totals and sigmoid_scaled are one sweep for the sum or the mean of the losses of pairs, and what a gradient
// by it makes of that sweep's: at N = 8 a dozen calls of torch around the sweep take longer than it.
#include "sigmoid.h"

#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "../dispatch.h"
#include "groups.h"
#include "tiles.h"

namespace robustft {
namespace similarity {
namespace {

template <class T>
T number_of(const std::optional<Tensor>& number) {
  return number ? T(number_in(*number)) : T(0);
}

template <class T>
std::tuple<Tensor, Tensor, Tensor, Tensor> sweep(const Inputs& in, const Tensor& bias,
                                                 const std::optional<Tensor>& teacher_bias,
                                                 const std::optional<Tensor>& weight,
                                                 const std::optional<Tensor>& similarities, bool keep) {
  const int64_t n = in.n(), m = in.m(), d = in.x.size(1);
  const bool teacher = in.heads() == 2, gradient = weight.has_value(), given = similarities.has_value();
  Tiles<T> all(in, TileShape::of(n, m));
  Tensor sums = zeros<T>({sigmoid_sum::count(teacher), n});
  Tensor dx = uninitialized({gradient ? n : 0, d}, scalar_type<T>());
  Tensor dt = uninitialized({gradient ? m : 0, d}, scalar_type<T>());
  Tensor kept = uninitialized({keep ? in.heads() * n : 0, m}, scalar_type<T>());
  T* const keep_at = kept.mutable_data_ptr<T>();
  // Only read.
  T* const given_at = given ? const_cast<T*>(similarities->template const_data_ptr<T>()) : nullptr;
  std::optional<Tensor> weights;
  if (gradient) weights = contiguous_as(*weight, scalar_type<T>());
  const SigmoidRows<T> rows{number_of<T>(bias), number_of<T>(teacher_bias), sums.mutable_data_ptr<T>(),
                            gradient ? weights->template const_data_ptr<T>() : nullptr, n};
  std::optional<RightMatrix<T>> t_rows;
  if (gradient) t_rows.emplace(all.student.t, RightMatrix<T>::kRows, all.arithmetic);
  std::vector<std::optional<RightMatrix<T>>> x_rows(all.panels);
  std::vector<char> panel_begun(all.panels, false), tile_begun(all.tiles, false);  // whether dx, dt hold a sum there
  T *const dx_at = dx.mutable_data_ptr<T>(), *const dt_at = dt.mutable_data_ptr<T>();

  Pool<Workspace<T>> pool;
  auto prepare = [&](int64_t first, int64_t last) {
    all.release(first);
    if (!given) all.prepare(first, last);
    if (!gradient) return;
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
    auto work = pool.take([&] { return Workspace<T>(in, all.shape, teacher && !given); });
    const SigmoidGradient<T> out{work->s.get(), work->cols};
    Tile<T> tile = all.at(p, q, work->s.get(), teacher && !given ? work->teacher.get() : nullptr, work->cols);
    const int64_t at = tile.row0 * m + tile.col0;
    if (given) {
      tile.s = given_at + at, tile.teacher = teacher ? tile.s + n * m : nullptr, tile.ld = m;
    } else {
      all.compute(tile, p);
    }
    if (keep) {
      tile.e = keep_at + at, tile.teacher_e = teacher ? tile.e + n * m : nullptr, tile.e_ld = m;
      keep_similarities(tile);
    }
    ROBUSTFT_CALL(sigmoid_tile<T>, tile, rows, out);
    if (!gradient) return;
    add_product(out.g, out.ld, tile.rows, tile.cols, *t_rows, tile.col0, dx_at + tile.row0 * d,
                !std::exchange(panel_begun[p], true), work->scratch);
    add_transposed_product(out.g, out.ld, tile.rows, tile.cols, *x_rows[p], 0, dt_at + tile.col0 * d,
                           !std::exchange(tile_begun[q], true), work->scratch);
  });
  return {sums, dx, dt, kept};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> sigmoid_sweep(
    const Tensor& x, const Tensor& t, const Tensor& scale, const Tensor& bias, const Tensor& x_labels,
    const Tensor& t_labels, const std::optional<Tensor>& x_teacher, const std::optional<Tensor>& t_teacher,
    const std::optional<Tensor>& teacher_scale, const std::optional<Tensor>& teacher_bias,
    const std::optional<Tensor>& weight, const std::optional<Tensor>& similarities, bool keep, std::string precision) {
  const Inputs in{x, t, scale, x_labels, t_labels, x_teacher, t_teacher, teacher_scale, precision};
  in.check("sigmoid_sweep");
  STD_TORCH_CHECK(bias.numel() == 1 && teacher_bias.has_value() == x_teacher.has_value() &&
                      (!teacher_bias || teacher_bias->numel() == 1),
                  "sigmoid_sweep: bias, and teacher_bias with a teacher, must have one element");
  STD_TORCH_CHECK(!weight || (weight->dim() == 2 && weight->size(0) == in.heads() && weight->size(1) == in.n()),
                  "sigmoid_sweep: weight must be (", in.heads(), ", n)");
  const ScalarType dtype = x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  std::optional<Tensor> kept;
  if (similarities) {
    STD_TORCH_CHECK(similarities->dim() == 2 && similarities->size(0) == in.heads() * in.n() &&
                        similarities->size(1) == in.m() && similarities->scalar_type() == dtype,
                    "sigmoid_sweep: similarities must be what an earlier sweep kept");
    kept = torch::stable::contiguous(*similarities);
  }
  return dtype == ScalarType::Double ? sweep<double>(in, bias, teacher_bias, weight, kept, keep)
                                     : sweep<float>(in, bias, teacher_bias, weight, kept, keep);
}

// A row's share of the total. The sweep's gradient is that of the sum: to round the share of each row would show where
// rows cancel.
double share(int64_t n, bool mean) { return mean ? 1 / double(n) : 1; }

template <class T>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> totals(const Inputs& in, const Tensor& bias, bool mean) {
  const int64_t n = in.n();
  Tensor weights = uninitialized({1, n}, scalar_type<T>());
  std::fill_n(weights.mutable_data_ptr<T>(), n, T(1));
  auto [sums, dx, dt, kept] = sweep<T>(in, bias, std::nullopt, weights, std::nullopt, false);
  const T* const losses = sums.template const_data_ptr<T>();
  double total = 0;
  for (int64_t i = 0; i < n; ++i) total += double(losses[sigmoid_sum::kLoss * n + i]);
  Tensor loss = uninitialized({}, scalar_type<T>());
  *loss.mutable_data_ptr<T>() = T(total * share(n, mean));
  return {loss, sums, dx, dt, kept};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> sigmoid_totals(const Tensor& x, const Tensor& t, const Tensor& scale,
                                                                  const Tensor& bias,
                                                                  const std::optional<Tensor>& labels, bool mean,
                                                                  std::string precision) {
  STD_TORCH_CHECK(x.dim() == 2 && t.dim() == 2 && x.size(0) == t.size(0) && bias.numel() == 1 &&
                      (!labels || labels->numel() == x.size(0)),
                  "sigmoid_totals: x and t must be (n, d), labels (n,), bias of one element");
  const Groups groups = groups_of(x.size(0), labels);
  const std::optional<Tensor> none;
  const Inputs in{x, t, scale, groups.index, groups.index, none, none, none, precision};
  in.check("sigmoid_totals");
  return x.scalar_type() == ScalarType::Double ? totals<double>(in, bias, mean) : totals<float>(in, bias, mean);
}

template <class T>
Tensor scaled(const Tensor& gradient, double factor, ScalarType dtype) {
  const Tensor held = contiguous_as(gradient, scalar_type<T>());
  Tensor out = uninitialized(held.sizes(), scalar_type<T>());
  const T* const from = held.template const_data_ptr<T>();
  T* const to = out.template mutable_data_ptr<T>();
  const T by = T(factor);
  torch::stable::parallel_for(0, held.numel(), 1 << 15, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) to[i] = from[i] * by;
  });
  return contiguous_as(out, dtype);
}

template <class T>
std::tuple<Tensor, Tensor, Tensor, Tensor> scaled(double g, const Tensor& x, const Tensor& t, const Tensor& scale,
                                                  const Tensor& bias, const Tensor& sums, const Tensor& dx,
                                                  const Tensor& dt, bool mean) {
  const int64_t n = x.size(0);
  const Tensor held = contiguous_as(sums, scalar_type<T>());
  const T* const s = held.template const_data_ptr<T>();
  double ds = 0, db = 0;
  for (int64_t i = 0; i < n; ++i)
    ds += double(s[sigmoid_sum::kByScale * n + i]), db += double(s[sigmoid_sum::kByBias * n + i]);
  const double factor = g * share(n, mean);
  return {scaled<T>(dx, factor, x.scalar_type()), scaled<T>(dt, factor, t.scalar_type()),
          like_number(factor * ds, scale), like_number(factor * db, bias)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> sigmoid_scaled(const Tensor& g, const Tensor& x, const Tensor& t,
                                                          const Tensor& scale, const Tensor& bias, const Tensor& sums,
                                                          const Tensor& dx, const Tensor& dt, bool mean) {
  STD_TORCH_CHECK(g.numel() == 1 && scale.numel() == 1 && bias.numel() == 1 && x.dim() == 2 && sums.dim() == 2 &&
                      sums.size(0) == sigmoid_sum::count(false) && sums.size(1) == x.size(0) &&
                      dx.numel() == x.numel() && dt.numel() == t.numel(),
                  "sigmoid_scaled: g must have one element; sums, dx and dt must be what sigmoid_totals returned");
  return x.scalar_type() == ScalarType::Double ? scaled<double>(number_in(g), x, t, scale, bias, sums, dx, dt, mean)
                                               : scaled<float>(number_in(g), x, t, scale, bias, sums, dx, dt, mean);
}

// softplus(z) and its derivative as the kernels have them, for their error-bound test.
std::tuple<Tensor, Tensor> vector_softplus(const Tensor& z) {
  Tensor in = torch::stable::contiguous(z);
  Tensor out = uninitialized(in.sizes(), in.scalar_type()), slope = uninitialized(in.sizes(), in.scalar_type());
  if (in.scalar_type() == ScalarType::Double) {
    ROBUSTFT_CALL(softplus_values, in.const_data_ptr<double>(), out.mutable_data_ptr<double>(),
                  slope.mutable_data_ptr<double>(), in.numel());
  } else {
    STD_TORCH_CHECK(in.scalar_type() == ScalarType::Float, "vector_softplus: float32 or float64");
    ROBUSTFT_CALL(softplus_values, in.const_data_ptr<float>(), out.mutable_data_ptr<float>(),
                  slope.mutable_data_ptr<float>(), in.numel());
  }
  return {out, slope};
}

}  // namespace
}  // namespace similarity
}  // namespace robustft

STABLE_TORCH_LIBRARY_IMPL(robustft, CPU, m) {
  m.impl("sigmoid_sweep", TORCH_BOX(&robustft::similarity::sigmoid_sweep));
  m.impl("sigmoid_totals", TORCH_BOX(&robustft::similarity::sigmoid_totals));
  m.impl("sigmoid_scaled", TORCH_BOX(&robustft::similarity::sigmoid_scaled));
  m.impl("vector_softplus", TORCH_BOX(&robustft::similarity::vector_softplus));
}
