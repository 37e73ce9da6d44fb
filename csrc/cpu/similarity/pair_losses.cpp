// The contrastive losses of pairs (x_i, t_i) and their gradients: the algebra of N-vectors between statistics.cpp and
// gradient.cpp, which robustft/ops/contrastive.py writes out. One operator for all of it: at N = 32 thirty calls of
// torch cost ten times the arithmetic.
//
//   labels        (n) or none: a sample's own;  counts_i how many share that of i
//   losses        contrastive_i, and with a teacher distillation_i, (n), or their means, 0-d, and then gradients by
//   those by_scale      the derivatives of the samples' losses, (n), with a teacher (2, n) row, col      softmaxes of
//   the sides for the backward, (2, n), with a teacher (4, n): `Softmaxes` in similarity.py centers, kept as
//   similarity_statistics returns them
#include <algorithm>

#include "../dispatch.h"
#include "groups.h"
#include "operators.h"
#include "similarity.h"

namespace robustft {
namespace similarity {
namespace {

// One side's statistics of a sample.
template <class T>
struct Sample {
  T max, log_sum, gap, target, total, teacher_gap;

  Sample(const T* of, int64_t n, int64_t i, bool teacher)
      : max(of[similarity_statistic::kMax * n + i]),
        log_sum(of[similarity_statistic::kLogSum * n + i]),
        gap(of[similarity_statistic::kGap * n + i]),
        target(of[similarity_statistic::kTarget * n + i]),
        total(of[similarity_statistic::kTotal * n + i]),
        teacher_gap(teacher ? of[similarity_statistic::kTeacherGap * n + i] : T(0)) {}

  // max - (q S), exactly 0 for constant S
  T target_gap(int64_t count, int64_t entries, T smoothing) const {
    const T of_targets = max - target / T(count);
    return smoothing == 0 ? of_targets : between(of_targets, max - total / T(entries), smoothing);
  }
};

template <class T>
Tensor softmaxes_of(const Tensor& statistics, bool teacher) {
  namespace stat = similarity_statistic;
  const int64_t n = statistics.size(1), wanted[] = {stat::kMax, stat::kLogSum, stat::kTeacherMax, stat::kTeacherLogSum};
  Tensor out = uninitialized({teacher ? 4 : 2, n}, statistics.scalar_type());
  for (int64_t k = 0; k < out.size(0); ++k)
    std::copy_n(statistics.const_data_ptr<T>() + wanted[k] * n, n, out.mutable_data_ptr<T>() + k * n);
  return out;
}

template <class T>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> losses_of(const Tensor& row, const Tensor& col, const Tensor& scale,
                                                             const Groups& groups, bool teacher, T smoothing,
                                                             bool mean) {
  const int64_t n = row.size(1);
  const T s = T(number_in(scale));
  Tensor contrastive = uninitialized({n}, row.scalar_type());
  Tensor distillation = uninitialized({teacher ? n : 0}, row.scalar_type());
  Tensor by_scale = teacher ? uninitialized({2, n}, row.scalar_type()) : uninitialized({n}, row.scalar_type());
  const T *const of_rows = row.const_data_ptr<T>(), *const of_cols = col.const_data_ptr<T>();
  T *const c = contrastive.mutable_data_ptr<T>(), *const q = distillation.mutable_data_ptr<T>();
  T* const by = by_scale.mutable_data_ptr<T>();
  for (int64_t i = 0; i < n; ++i) {
    const Sample<T> r(of_rows, n, i, teacher), k(of_cols, n, i, teacher);
    const T row_gap = r.target_gap(groups.counts[i], n, smoothing);
    const T col_gap = k.target_gap(groups.counts[i], n, smoothing);
    c[i] = T(0.5) * ((r.log_sum + s * row_gap) + (k.log_sum + s * col_gap));
    by[i] = T(0.5) * ((r.gap + row_gap) + (k.gap + col_gap));
    if (!teacher) continue;
    q[i] = (r.log_sum - s * r.teacher_gap) + (k.log_sum - s * k.teacher_gap);
    by[n + i] = (r.gap - r.teacher_gap) + (k.gap - k.teacher_gap);
  }
  if (mean) contrastive = mean_of<T>(contrastive);
  if (mean && teacher) distillation = mean_of<T>(distillation);
  return {contrastive, distillation, by_scale, softmaxes_of<T>(row, teacher), softmaxes_of<T>(col, teacher)};
}

void check_pairs(const char* op, const Tensor& x, const Tensor& t, const std::optional<Tensor>& labels) {
  STD_TORCH_CHECK(x.dim() == 2 && t.dim() == 2 && x.size(0) == t.size(0), op, ": x and t must be (n, d)");
  STD_TORCH_CHECK(!labels || labels->numel() == x.size(0), op, ": labels must be (n,)");
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> pair_losses(
    const Tensor& x, const Tensor& t, const Tensor& scale, const std::optional<Tensor>& x_teacher,
    const std::optional<Tensor>& t_teacher, const std::optional<Tensor>& teacher_scale,
    const std::optional<Tensor>& labels, double label_smoothing, bool keep, bool mean, std::string precision) {
  check_pairs("pair_losses", x, t, labels);
  const Groups groups = groups_of(x.size(0), labels);
  const auto [row, col, centers, kept] =
      similarity_statistics(x, t, scale, groups.index, groups.index, x_teacher, t_teacher, teacher_scale,
                            label_smoothing > 0, keep, std::move(precision));
  const bool teacher = x_teacher.has_value();
  const auto [contrastive, distillation, by_scale, of_rows, of_cols] =
      x.scalar_type() == ScalarType::Double
          ? losses_of<double>(row, col, scale, groups, teacher, label_smoothing, mean)
          : losses_of<float>(row, col, scale, groups, teacher, float(label_smoothing), mean);
  return {contrastive, distillation, by_scale, of_rows, of_cols, centers, kept};
}

// Rows of similarity_coefficient of one side, from its softmaxes and the gradients g, h by the samples' losses.
template <class T>
Tensor coefficients_of(const Tensor& softmaxes, const T* g, const T* h, const Groups& groups, T smoothing) {
  namespace coefficient = similarity_coefficient;
  const int64_t n = softmaxes.size(1);
  const T* p = softmaxes.const_data_ptr<T>();
  Tensor out = uninitialized({coefficient::count(h != nullptr), n}, softmaxes.scalar_type());
  T* const o = out.mutable_data_ptr<T>();
  for (int64_t i = 0; i < n; ++i) {
    const T half = T(0.5) * g[i], count = T(groups.counts[i]), target = (T(1) - smoothing) * half / count;
    o[coefficient::kMax * n + i] = p[i];
    o[coefficient::kLogSum * n + i] = p[n + i];
    o[coefficient::kSoftmax * n + i] = h ? half + h[i] : half;
    o[coefficient::kTarget * n + i] = target;
    // What target leaves of half, rather than smoothing * half: where p equals q the gradient is then exactly 0.
    o[coefficient::kUniform * n + i] = smoothing == 0 ? T(0) : (half - target * count) / T(n);
    if (!h) continue;
    o[coefficient::kTeacherMax * n + i] = p[2 * n + i];
    o[coefficient::kTeacherLogSum * n + i] = p[3 * n + i];
    o[coefficient::kTeacher * n + i] = h[i];
  }
  return out;
}

template <class T>
std::tuple<Tensor, Tensor, Tensor> coefficients(const Tensor& g, const std::optional<Tensor>& h, const Tensor& row,
                                                const Tensor& col, const Tensor& by_scale, const Groups& groups,
                                                T smoothing, const Tensor& scale) {
  const int64_t n = row.size(1);
  const Tensor of_g = gradients_by_each<T>(g, n), by = contiguous_as(by_scale, scalar_type<T>());
  const Tensor of_h = h ? gradients_by_each<T>(*h, n) : of_g;
  const T *const pg = of_g.const_data_ptr<T>(), *const ph = h ? of_h.const_data_ptr<T>() : nullptr;
  const T* const b = by.const_data_ptr<T>();
  double ds = 0;
  for (int64_t i = 0; i < n; ++i) ds += double(pg[i]) * b[i] + (ph ? double(ph[i]) * b[n + i] : 0.0);
  const Tensor r = contiguous_as(row, scalar_type<T>()), c = contiguous_as(col, scalar_type<T>());
  return {coefficients_of<T>(r, pg, ph, groups, smoothing), coefficients_of<T>(c, pg, ph, groups, smoothing),
          like_number(ds, scale)};
}

std::tuple<Tensor, Tensor, Tensor> pair_gradients(const Tensor& g, const std::optional<Tensor>& h, const Tensor& x,
                                                  const Tensor& t, const Tensor& scale,
                                                  const std::optional<Tensor>& x_teacher,
                                                  const std::optional<Tensor>& t_teacher,
                                                  const std::optional<Tensor>& teacher_scale,
                                                  const std::optional<Tensor>& labels, double label_smoothing,
                                                  const Tensor& by_scale, const Tensor& row, const Tensor& col,
                                                  const Tensor& centers, const Tensor& kept, std::string precision) {
  check_pairs("pair_gradients", x, t, labels);
  const int64_t n = x.size(0), heads = x_teacher ? 2 : 1;
  auto softmaxes = [&](const Tensor& of) { return of.dim() == 2 && of.size(0) == 2 * heads && of.size(1) == n; };
  STD_TORCH_CHECK(softmaxes(row) && softmaxes(col) && by_scale.numel() == heads * n && scale.numel() == 1,
                  "pair_gradients: row, col and by_scale must be what pair_losses returned");
  STD_TORCH_CHECK(is_gradient_of(g, n) && h.has_value() == x_teacher.has_value() && (!h || is_gradient_of(*h, n)),
                  "pair_gradients: g, and h with a teacher, must be (n,) or of the means");
  const Groups groups = groups_of(n, labels);
  const auto [of_rows, of_cols, ds] =
      x.scalar_type() == ScalarType::Double
          ? coefficients<double>(g, h, row, col, by_scale, groups, label_smoothing, scale)
          : coefficients<float>(g, h, row, col, by_scale, groups, float(label_smoothing), scale);
  const auto [dx, dt] =
      similarity_gradient(x, t, scale, groups.index, groups.index, x_teacher, t_teacher, teacher_scale, of_rows,
                          of_cols, centers, kept, label_smoothing > 0, std::move(precision));
  return {dx, dt, ds};
}

}  // namespace
}  // namespace similarity
}  // namespace robustft

STABLE_TORCH_LIBRARY_IMPL(robustft, CPU, m) {
  m.impl("pair_losses", TORCH_BOX(&robustft::similarity::pair_losses));
  m.impl("pair_gradients", TORCH_BOX(&robustft::similarity::pair_gradients));
}
