// The losses on class logits and their gradients: the algebra of N-vectors between class_statistics and class_gradient
// (classes.cpp), which robustft/ops/classification.py writes out. One operator each way, as for pairs
// (similarity/pair_losses.cpp): at N = 32 twenty calls of torch cost more than the arithmetic.
//
//   class_losses, one head     cross_entropy_i, misalignment_i;  by_gap_i = f'(L_i), 0 where nothing is misranked
//   dual_losses, two heads     w, v (k, d) their embeddings, whose gradients come one below the other (2 k, d);
//                              empirical_i, worst_case_i;  core the soft labels (n, k) or confidences (n) of the second
//                              both (n,), or their means, 0-d, and then gradients by those
//   by_scale (2, n)            derivatives of the samples' two losses by the scale
//   softmaxes                  what the backward needs of the statistics: max, log_sum, above_log_sum (3, n);
//                              for two heads max, log_sum of each, and the mass of core, (5, n)
//   exponentials               as class_statistics returns them
#include <cmath>
#include <limits>
#include <optional>
#include <string>
#include <tuple>

#include "class_operators.h"
#include "classes.h"
#include "penalty.h"

namespace robustft {
namespace {

namespace stat = class_statistic;
namespace coefficient = class_coefficient;

template <class T>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> losses_of(const Tensor& statistics, const std::string& variant,
                                                             bool top1, T smoothing, bool mean) {
  const int64_t n = statistics.size(1);
  const PenaltyOfGap<T> f = penalty_of<T>(variant);
  Tensor cross_entropy = uninitialized({n}, scalar_type<T>()), misalignment = uninitialized({n}, scalar_type<T>());
  Tensor by_gap = uninitialized({n}, scalar_type<T>()), by_scale = uninitialized({2, n}, scalar_type<T>());
  Tensor softmaxes = uninitialized({3, n}, scalar_type<T>());
  const T* const s = statistics.const_data_ptr<T>();
  T *const c = cross_entropy.mutable_data_ptr<T>(), *const m = misalignment.mutable_data_ptr<T>();
  T *const slope = by_gap.mutable_data_ptr<T>(), *const by = by_scale.mutable_data_ptr<T>();
  T* const kept = softmaxes.mutable_data_ptr<T>();
  for (int64_t i = 0; i < n; ++i) {
    const auto of = [&](int64_t which) { return s[which * n + i]; };
    const T above = of(stat::kAboveLogSum);
    const bool wrong = above != -std::numeric_limits<T>::infinity();  // NaN too
    const T gap = top1 ? of(stat::kLabelGap) : above + of(stat::kLabelGap);
    const Penalty<T> p = wrong ? f(gap) : Penalty<T>{0, 0};
    m[i] = p.value, slope[i] = p.slope;
    by[n + i] = p.slope * (of(top1 ? stat::kMaxS : stat::kAboveMean) - of(stat::kLabel));
    T label_gap = of(stat::kLabelGap), label = of(stat::kLabel);
    if (smoothing != 0) {
      label_gap = between(label_gap, of(stat::kMeanGap), smoothing);
      label = between(label, of(stat::kRowMean), smoothing);
    }
    c[i] = of(stat::kLogSum) + label_gap;
    by[i] = of(stat::kMean) - label;
    kept[i] = of(stat::kMax), kept[n + i] = of(stat::kLogSum), kept[2 * n + i] = above;
  }
  if (mean) cross_entropy = mean_of<T>(cross_entropy), misalignment = mean_of<T>(misalignment);
  return {cross_entropy, misalignment, by_gap, by_scale, softmaxes};
}

template <class T>
std::tuple<Tensor, Tensor, Tensor, Tensor> dual_losses_of(const Tensor& statistics, const Tensor& core, bool mean) {
  const int64_t n = statistics.size(1);
  const bool soft = core.dim() == 2;
  const Tensor confidences = soft ? core : contiguous_as(core, scalar_type<T>());
  Tensor empirical = uninitialized({n}, scalar_type<T>()), worst_case = uninitialized({n}, scalar_type<T>());
  Tensor by_scale = uninitialized({2, n}, scalar_type<T>()), softmaxes = uninitialized({5, n}, scalar_type<T>());
  const T* const s = statistics.const_data_ptr<T>();
  const T* const q = soft ? nullptr : confidences.const_data_ptr<T>();
  T *const e = empirical.mutable_data_ptr<T>(), *const w = worst_case.mutable_data_ptr<T>();
  T *const by = by_scale.mutable_data_ptr<T>(), *const kept = softmaxes.mutable_data_ptr<T>();
  for (int64_t i = 0; i < n; ++i) {
    const auto first = [&](int64_t which) { return s[which * n + i]; };
    const auto second = [&](int64_t which) { return s[(stat::kHardCount + which) * n + i]; };
    const T mass = soft ? second(stat::kTargetSum) : q[i];
    const T gap = soft ? second(stat::kTargetGap) : mass * second(stat::kLabelGap);
    const T target = soft ? second(stat::kTarget) : mass * second(stat::kLabel);
    e[i] = first(stat::kLogSum) + first(stat::kLabelGap);
    w[i] = mass * second(stat::kLogSum) + gap;
    by[i] = first(stat::kMean) - first(stat::kLabel);
    by[n + i] = mass * second(stat::kMean) - target;
    kept[i] = first(stat::kMax), kept[n + i] = first(stat::kLogSum);
    kept[2 * n + i] = second(stat::kMax), kept[3 * n + i] = second(stat::kLogSum), kept[4 * n + i] = mass;
  }
  if (mean) empirical = mean_of<T>(empirical), worst_case = mean_of<T>(worst_case);
  return {empirical, worst_case, by_scale, softmaxes};
}

// The gradients by the two losses, and what follows for the scale.
template <class T>
struct Given {
  const Tensor g_held, h_held;
  const T *const g, *const h;

  Given(const Tensor& by_first, const Tensor& by_second, int64_t n)
      : g_held(gradients_by_each<T>(by_first, n)),
        h_held(gradients_by_each<T>(by_second, n)),
        g(g_held.const_data_ptr<T>()),
        h(h_held.const_data_ptr<T>()) {}

  Tensor scale_gradient(const Tensor& by_scale, const Tensor& scale) const {
    const Tensor held = contiguous_as(by_scale, scalar_type<T>());
    const T* const by = held.template const_data_ptr<T>();
    const int64_t n = g_held.numel();
    double ds = 0;
    for (int64_t i = 0; i < n; ++i) ds += double(g[i]) * by[i] + double(h[i]) * by[n + i];
    return like_number(ds, scale);
  }
};

// Rows of class_coefficient, zero where nothing is written.
template <class T>
Tensor coefficients_of(const Given<T>& by, const Tensor& softmaxes, const Tensor& by_gap, T smoothing, int64_t k) {
  const int64_t n = softmaxes.size(1);
  const Tensor kept = contiguous_as(softmaxes, scalar_type<T>()), slopes = contiguous_as(by_gap, scalar_type<T>());
  Tensor out = zeros<T>({coefficient::kCount, n});
  const T *const p = kept.const_data_ptr<T>(), *const slope = slopes.const_data_ptr<T>();
  T* const o = out.mutable_data_ptr<T>();
  for (int64_t i = 0; i < n; ++i) {
    o[coefficient::kMax * n + i] = p[i];
    o[coefficient::kLogSum * n + i] = p[n + i];
    o[coefficient::kAboveLogSum * n + i] = p[2 * n + i];
    o[coefficient::kSoftmax * n + i] = by.g[i];
    o[coefficient::kLabel * n + i] = smoothing == 0 ? by.g[i] : (T(1) - smoothing) * by.g[i];
    o[coefficient::kUniform * n + i] = smoothing == 0 ? T(0) : by.g[i] * (smoothing / T(k));
    o[coefficient::kAbove * n + i] = by.h[i] * slope[i];
  }
  return out;
}

template <class T>
Tensor dual_coefficients_of(const Given<T>& by, const Tensor& softmaxes, bool soft) {
  const int64_t n = softmaxes.size(1);
  const Tensor kept = contiguous_as(softmaxes, scalar_type<T>());
  Tensor out = zeros<T>({2 * coefficient::kCount, n});
  const T* const p = kept.const_data_ptr<T>();
  T *const first = out.mutable_data_ptr<T>(), *const second = first + coefficient::kCount * n;
  for (int64_t i = 0; i < n; ++i) {
    first[coefficient::kMax * n + i] = p[i];
    first[coefficient::kLogSum * n + i] = p[n + i];
    first[coefficient::kSoftmax * n + i] = first[coefficient::kLabel * n + i] = by.g[i];
    second[coefficient::kMax * n + i] = p[2 * n + i];
    second[coefficient::kLogSum * n + i] = p[3 * n + i];
    second[coefficient::kSoftmax * n + i] = by.h[i] * p[4 * n + i];
    second[coefficient::kLabel * n + i] = soft ? T(0) : by.h[i] * p[4 * n + i];
    second[coefficient::kTargets * n + i] = soft ? by.h[i] : T(0);
  }
  return out;
}

std::optional<Tensor> targets_in(const Tensor& core) {
  return core.dim() == 2 ? std::optional<Tensor>(core) : std::nullopt;
}

bool is_double(const Tensor& x) { return x.scalar_type() == ScalarType::Double; }

void check_kept(const char* op, const Tensor& g, const Tensor& h, const Tensor& x, const Tensor& scale,
                const Tensor& by_scale, const Tensor& softmaxes, int64_t rows) {
  const int64_t n = x.size(0);
  STD_TORCH_CHECK(is_gradient_of(g, n) && is_gradient_of(h, n), op, ": g and h must be (n,) or of the means");
  STD_TORCH_CHECK(scale.numel() == 1 && by_scale.numel() == 2 * n && softmaxes.dim() == 2 &&
                      softmaxes.size(0) == rows && softmaxes.size(1) == n,
                  op, ": by_scale and softmaxes must be what the forward returned");
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> class_losses(
    const Tensor& x, const Tensor& w, const Tensor& scale, const std::optional<Tensor>& bias, const Tensor& labels,
    std::string variant, bool top1, double label_smoothing, bool keep, bool mean, std::string precision) {
  const std::optional<Tensor> targets;
  const ClassInputs in{x, w, scale, bias, labels, targets, 1, precision};
  in.check("class_losses");
  const auto [statistics, exponentials] = statistics_of_classes(in, {true, label_smoothing > 0}, keep);
  const auto [cross_entropy, misalignment, by_gap, by_scale, softmaxes] =
      is_double(x) ? losses_of<double>(statistics, variant, top1, label_smoothing, mean)
                   : losses_of<float>(statistics, variant, top1, float(label_smoothing), mean);
  return {cross_entropy, misalignment, by_gap, by_scale, softmaxes, exponentials};
}

template <class T>
std::tuple<Tensor, Tensor> class_coefficients(const Tensor& g, const Tensor& h, const Tensor& scale,
                                              const Tensor& by_gap, const Tensor& by_scale, const Tensor& softmaxes,
                                              T smoothing, int64_t k) {
  const Given<T> by(g, h, softmaxes.size(1));
  return {coefficients_of(by, softmaxes, by_gap, smoothing, k), by.scale_gradient(by_scale, scale)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> class_gradients(const Tensor& g, const Tensor& h, const Tensor& x,
                                                           const Tensor& w, const Tensor& scale,
                                                           const std::optional<Tensor>& bias, const Tensor& labels,
                                                           bool top1, double label_smoothing, const Tensor& by_gap,
                                                           const Tensor& by_scale, const Tensor& softmaxes,
                                                           const Tensor& exponentials, std::string precision) {
  check_kept("class_gradients", g, h, x, scale, by_scale, softmaxes, 3);
  STD_TORCH_CHECK(by_gap.numel() == x.size(0), "class_gradients: by_gap must be (n,)");
  const auto [coefficients, ds] =
      is_double(x)
          ? class_coefficients<double>(g, h, scale, by_gap, by_scale, softmaxes, label_smoothing, w.size(0))
          : class_coefficients<float>(g, h, scale, by_gap, by_scale, softmaxes, float(label_smoothing), w.size(0));
  const std::optional<Tensor> targets;
  const ClassInputs in{x, w, scale, bias, labels, targets, 1, precision};
  in.check("class_gradients");
  const auto [dx, dw, db] = gradient_of_classes(in, exponentials, coefficients, top1);
  return {dx, dw, db, ds};
}

void check_core(const char* op, const Tensor& x, const Tensor& core) {
  STD_TORCH_CHECK((core.dim() == 1 || core.dim() == 2) && core.size(0) == x.size(0), op,
                  ": core_labels must be (n, k) or (n,)");
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> dual_losses(const Tensor& x, const Tensor& w, const Tensor& v,
                                                               const Tensor& scale, const Tensor& labels,
                                                               const Tensor& core, bool keep, bool mean,
                                                               std::string precision) {
  check_core("dual_losses", x, core);
  const std::optional<Tensor> bias, targets = targets_in(core);
  const ClassInputs in{x, w, scale, bias, labels, targets, 2, precision, &v};
  in.check("dual_losses");
  const auto [statistics, exponentials] = statistics_of_classes(in, {false, false}, keep);
  const auto [empirical, worst_case, by_scale, softmaxes] =
      is_double(x) ? dual_losses_of<double>(statistics, core, mean) : dual_losses_of<float>(statistics, core, mean);
  return {empirical, worst_case, by_scale, softmaxes, exponentials};
}

template <class T>
std::tuple<Tensor, Tensor> dual_coefficients(const Tensor& g, const Tensor& h, const Tensor& scale,
                                             const Tensor& by_scale, const Tensor& softmaxes, bool soft) {
  const Given<T> by(g, h, softmaxes.size(1));
  return {dual_coefficients_of(by, softmaxes, soft), by.scale_gradient(by_scale, scale)};
}

std::tuple<Tensor, Tensor, Tensor> dual_gradients(const Tensor& g, const Tensor& h, const Tensor& x, const Tensor& w,
                                                  const Tensor& v, const Tensor& scale, const Tensor& labels,
                                                  const Tensor& core, const Tensor& by_scale, const Tensor& softmaxes,
                                                  const Tensor& exponentials, std::string precision) {
  check_kept("dual_gradients", g, h, x, scale, by_scale, softmaxes, 5);
  check_core("dual_gradients", x, core);
  const bool soft = core.dim() == 2;
  const auto [coefficients, ds] = is_double(x) ? dual_coefficients<double>(g, h, scale, by_scale, softmaxes, soft)
                                               : dual_coefficients<float>(g, h, scale, by_scale, softmaxes, soft);
  const std::optional<Tensor> bias, targets = targets_in(core);
  const ClassInputs in{x, w, scale, bias, labels, targets, 2, precision, &v};
  in.check("dual_gradients");
  const auto [dx, dw, db] = gradient_of_classes(in, exponentials, coefficients, false);
  return {dx, dw, ds};
}

}  // namespace
}  // namespace robustft

STABLE_TORCH_LIBRARY_IMPL(robustft, CPU, m) {
  m.impl("class_losses", TORCH_BOX(&robustft::class_losses));
  m.impl("class_gradients", TORCH_BOX(&robustft::class_gradients));
  m.impl("dual_losses", TORCH_BOX(&robustft::dual_losses));
  m.impl("dual_gradients", TORCH_BOX(&robustft::dual_gradients));
}
