// The two loops over a row of class logits: statistics and gradient. Compiled once per instruction set.
#include "classes.h"
#include "lanes.h"

namespace robustft {
namespace ROBUSTFT_ISA {
namespace {

// z = s S + b of a whole row, and the largest. Statistics and gradient both come from this one, so that a tie with the
// label in the one is a tie in the other, and classes of equal embeddings and biases have equal logits.
template <class T>
inline T row_logits(const ClassPanel<T>& panel, const T* s, T* z) {
  const T lowest = -__builtin_inf();
  Vec<T> m = Vec<T>{} + lowest;
  for_each_vector<T>(panel.k, [&](int64_t j, int64_t lanes) {
    Vec<T> v = load_lanes<Vec<T>>(s + j, lanes, T(0)) * panel.scale;
    if (panel.bias) v += load_lanes<Vec<T>>(panel.bias + j, lanes, T(0));
    if (lanes < kLanes<T>) v = load_partial<Vec<T>>((const T*)&v, lanes, lowest);
    store_lanes(z + j, v, lanes);
    m = max(v, m);
  });
  return reduce_max<T>(m);
}

}  // namespace

template <class T>
void class_statistics(const ClassPanel<T>& panel, T* statistics, T* z) {
  namespace stat = class_statistic;
  using V = Vec<T>;
  const T lowest = -__builtin_inf();
  for (int64_t r = 0; r < panel.rows; ++r) {
    const int64_t i = panel.row0 + r, label = panel.labels[i];
    const T* s = panel.s + r * panel.ld;
    const T* q = panel.targets ? panel.targets + r * panel.k : nullptr;
    auto out = [&](int64_t which) -> T& { return statistics[which * panel.n + i]; };
    const T m = row_logits(panel, s, z), z_label = z[label];
    V sum{}, mean{}, above_sum{}, above_mean{}, gap_sum{}, s_sum{}, q_sum{}, q_gap{}, q_s{};
    for_each_vector<T>(panel.k, [&](int64_t j, int64_t lanes) {
      const V v = load_lanes<V>(s + j, lanes, T(0));
      const V zj = load_lanes<V>(z + j, lanes, lowest);  // lanes past the end weigh nothing
      const V e = exp<T>(zj - m);
      const V above = zj > z_label ? e : V{};
      V gap = m - zj;
      if (lanes < kLanes<T>) gap = load_partial<V>((const T*)&gap, lanes, T(0));
      sum += e;
      mean += e * v;
      above_sum += above;
      above_mean += above * v;
      gap_sum += gap;
      s_sum += v;
      if (q) {
        const V qj = load_lanes<V>(q + j, lanes, T(0));
        q_sum += qj;
        q_gap += qj * gap;
        q_s += qj * v;
      }
    });
    const T total = reduce_sum<T>(sum), above_total = reduce_sum<T>(above_sum);
    out(stat::kMax) = m;
    out(stat::kLogSum) = __builtin_log(total);
    out(stat::kMean) = reduce_sum<T>(mean) / total;
    out(stat::kLabelGap) = m - z_label;
    out(stat::kLabel) = s[label];
    out(stat::kAboveLogSum) = __builtin_log(above_total);
    out(stat::kAboveMean) = above_total > 0 ? reduce_sum<T>(above_mean) / above_total : T(0);
    out(stat::kMeanGap) = reduce_sum<T>(gap_sum) / T(panel.k);
    out(stat::kRowMean) = reduce_sum<T>(s_sum) / T(panel.k);
    out(stat::kMaxS) = s[first_equal(z, panel.k, m)];
    if (q) {
      out(stat::kTargetSum) = reduce_sum<T>(q_sum);
      out(stat::kTargetGap) = reduce_sum<T>(q_gap);
      out(stat::kTarget) = reduce_sum<T>(q_s);
    }
  }
}

template <class T>
void class_gradient(const ClassPanel<T>& panel, const T* coefficients, bool top1) {
  namespace coefficient = class_coefficient;
  using V = Vec<T>;
  T* sums = panel.bias_gradient;
  if (sums) __builtin_memset(sums, 0, panel.k * sizeof(T));
  for (int64_t r = 0; r < panel.rows; ++r) {
    const int64_t i = panel.row0 + r, label = panel.labels[i];
    T* z = panel.g + r * panel.ld;
    const T* q = panel.targets ? panel.targets + r * panel.k : nullptr;
    auto of_row = [&](int64_t which) { return coefficients[which * panel.n + i]; };
    row_logits(panel, panel.s + r * panel.ld, z);
    const T m = of_row(coefficient::kMax), log_sum = of_row(coefficient::kLogSum);
    const T a = of_row(coefficient::kSoftmax), u = of_row(coefficient::kUniform), v = of_row(coefficient::kTargets);
    const T c = of_row(coefficient::kAbove), above_log_sum = of_row(coefficient::kAboveLogSum);
    const T z_label = z[label];
    const int64_t highest = top1 && c != 0 ? first_equal(z, panel.k, m) : 0;
    for_each_vector<T>(panel.k, [&](int64_t j, int64_t lanes) {
      const V zj = load_lanes<V>(z + j, lanes, T(0));
      V g = a * exp<T>(zj - m - log_sum) - u;
      if (q) g -= v * load_lanes<V>(q + j, lanes, T(0));
      if (c != 0 && !top1) g += zj > z_label ? c * exp<T>(zj - m - above_log_sum) : V{};
      if (sums) store_lanes(sums + j, load_lanes<V>(sums + j, lanes, T(0)) + g, lanes);
      store_lanes(z + j, g * panel.scale, lanes);
    });
    auto add = [&](int64_t j, T g) {
      z[j] += g * panel.scale;
      if (sums) sums[j] += g;
    };
    add(label, -(of_row(coefficient::kLabel) + c));
    if (top1 && c != 0) add(highest, c);
  }
}

#define ROBUSTFT_INSTANTIATE(T)                                    \
  template void class_statistics<T>(const ClassPanel<T>&, T*, T*); \
  template void class_gradient<T>(const ClassPanel<T>&, const T*, bool);
ROBUSTFT_INSTANTIATE(float)
ROBUSTFT_INSTANTIATE(double)

}  // namespace ROBUSTFT_ISA
}  // namespace robustft
