// The two loops over a row of class logits: statistics and gradient. Compiled once per instruction set.
#include "classes.h"
#include "lanes.h"

namespace robustft {
namespace ROBUSTFT_ISA {
namespace {

// z = s S + b of a whole row, and the largest. Statistics and gradient both come from this one, rounded to memory, so
// that a tie with the label in the one is a tie in the other, and classes of equal embeddings and biases tie.
template <class T>
inline T row_logits(const ClassPanel<T>& panel, const T* s, T* z) {
  const T lowest = -__builtin_inf();
  Vec<T> m = Vec<T>{} + lowest;
  for_each_vector<T>(panel.k, [&](int64_t j, int64_t lanes) {
    Vec<T> v = load_lanes<Vec<T>>(s + j, lanes, T(0)) * panel.scale;
    if (panel.bias) v += load_lanes<Vec<T>>(panel.bias + j, lanes, T(0));
    store_lanes(z + j, v, lanes);
    if (lanes < kLanes<T>) v = load_partial<Vec<T>>((const T*)&v, lanes, lowest);
    m = max(v, m);
  });
  return reduce_max<T>(m);
}

template <class T, bool kMisranked, bool kMeans, bool kTargets>
inline void row_statistics(const ClassPanel<T>& panel, int64_t r, T* statistics, T* z) {
  namespace stat = class_statistic;
  using V = Vec<T>;
  const T lowest = -__builtin_inf();
  const int64_t i = panel.row0 + r, label = panel.labels[i];
  T* s = panel.s + r * panel.ld;
  const T* q = kTargets ? panel.targets + r * panel.k : nullptr;
  const T m = row_logits(panel, s, z), z_label = z[label], s_label = s[label];
  const V e_label = exp_nonpositive<T>(V{} + (z_label - m));
  const T s_max = kMisranked ? s[first_equal(z, panel.k, m)] : T(0);
  V sum{}, mean{}, above_sum{}, above_mean{}, gap_sum{}, s_sum{}, q_sum{}, q_gap{}, q_s{};
  for_each_vector<T>(panel.k, [&](int64_t j, int64_t lanes) {
    const V v = load_lanes<V>(s + j, lanes, T(0));
    const V zj = load_lanes<V>(z + j, lanes, lowest);  // lanes past the end weigh nothing
    const V e = exp_nonpositive<T>(zj - m);
    store_lanes(s + j, e, lanes);
    sum += e;
    mean += e * v;
    if (kMisranked) {
      const V above = e > e_label ? e : V{};
      above_sum += above;
      above_mean += above * v;
    }
    V gap = m - zj;
    if ((kMeans || kTargets) && lanes < kLanes<T>) gap = load_partial<V>((const T*)&gap, lanes, T(0));
    if (kMeans) {
      gap_sum += gap;
      s_sum += v;
    }
    if (kTargets) {
      const V qj = load_lanes<V>(q + j, lanes, T(0));
      q_sum += qj;
      q_gap += qj * gap;
      q_s += qj * v;
    }
  });
  const T total = reduce_sum<T>(sum), above_total = reduce_sum<T>(above_sum);
  auto out = [&](int64_t which) -> T& { return statistics[which * panel.n + i]; };
  out(stat::kMax) = m;
  out(stat::kLogSum) = __builtin_log(total);
  out(stat::kMean) = reduce_sum<T>(mean) / total;
  out(stat::kLabelGap) = m - z_label;
  out(stat::kLabel) = s_label;
  // Nothing ranks above a NaN by comparison: it is in the sum of all e, and the penalty must not hide it.
  out(stat::kAboveLogSum) = !kMisranked ? T(0) : total != total ? total : T(__builtin_log(above_total));
  out(stat::kAboveMean) = above_total > 0 ? reduce_sum<T>(above_mean) / above_total : T(0);
  out(stat::kMaxS) = s_max;
  out(stat::kMeanGap) = reduce_sum<T>(gap_sum) / T(panel.k);
  out(stat::kRowMean) = reduce_sum<T>(s_sum) / T(panel.k);
  if (kTargets) {
    out(stat::kTargetSum) = reduce_sum<T>(q_sum);
    out(stat::kTargetGap) = reduce_sum<T>(q_gap);
    out(stat::kTarget) = reduce_sum<T>(q_s);
  }
}

template <class T, bool kMisranked, bool kMeans, bool kTargets>
void panel_statistics(const ClassPanel<T>& panel, T* statistics, T* z) {
  for (int64_t r = 0; r < panel.rows; ++r) row_statistics<T, kMisranked, kMeans, kTargets>(panel, r, statistics, z);
}

// From e to scale (a p - u - v q + c above), p = e / sum e, above likewise over {e > e_y}.
template <class T, bool kAbove, bool kTargets>
inline void row_gradient(const ClassPanel<T>& panel, const T* e, const T* q, T label, T a, T u, T v, T c, T* g) {
  using V = Vec<T>;
  for_each_vector<T>(panel.k, [&](int64_t j, int64_t lanes) {
    const V ej = load_lanes<V>(e + j, lanes, T(0));
    V gj = a * ej - u;
    if (kTargets) gj -= v * load_lanes<V>(q + j, lanes, T(0));
    if (kAbove) gj += ej > label ? c * ej : V{};
    if (panel.bias_gradient) {
      T* sum = panel.bias_gradient + j;
      store_lanes(sum, load_lanes<V>(sum, lanes, T(0)) + gj, lanes);
    }
    store_lanes(g + j, gj * panel.scale, lanes);
  });
}

}  // namespace

template <class T>
void class_statistics(const ClassPanel<T>& panel, const ClassStatisticsWanted& wanted, T* statistics, T* z) {
  if (panel.targets)
    panel_statistics<T, false, false, true>(panel, statistics, z);
  else if (wanted.means)
    panel_statistics<T, true, true, false>(panel, statistics, z);
  else if (wanted.misranked)
    panel_statistics<T, true, false, false>(panel, statistics, z);
  else
    panel_statistics<T, false, false, false>(panel, statistics, z);
}

template <class T>
void class_gradient(const ClassPanel<T>& panel, const T* coefficients, bool exponentials, bool top1) {
  namespace coefficient = class_coefficient;
  T* sums = panel.bias_gradient;
  if (sums) __builtin_memset(sums, 0, panel.k * sizeof(T));
  for (int64_t r = 0; r < panel.rows; ++r) {
    const int64_t i = panel.row0 + r, label = panel.labels[i];
    T* g = panel.g + r * panel.ld;
    const T* e = panel.s + r * panel.ld;
    const T* q = panel.targets ? panel.targets + r * panel.k : nullptr;
    auto of_row = [&](int64_t which) { return coefficients[which * panel.n + i]; };
    if (!exponentials) {
      row_logits(panel, e, g);
      const T m = of_row(coefficient::kMax);
      for_each_vector<T>(panel.k, [&](int64_t j, int64_t lanes) {
        store_lanes(g + j, exp_nonpositive<T>(load_lanes<Vec<T>>(g + j, lanes, m) - m), lanes);
      });
      e = g;
    }
    const T e_label = e[label], c = of_row(coefficient::kAbove);
    const T a = of_row(coefficient::kSoftmax) * T(__builtin_exp(-of_row(coefficient::kLogSum)));
    const T u = of_row(coefficient::kUniform), v = of_row(coefficient::kTargets);
    const int64_t highest = top1 && c != 0 ? first_equal(e, panel.k, T(1)) : 0;
    if (c != 0 && !top1)
      row_gradient<T, true, false>(panel, e, q, e_label, a, u, v,
                                   c * T(__builtin_exp(-of_row(coefficient::kAboveLogSum))), g);
    else if (q)
      row_gradient<T, false, true>(panel, e, q, e_label, a, u, v, c, g);
    else
      row_gradient<T, false, false>(panel, e, q, e_label, a, u, v, c, g);
    auto add = [&](int64_t j, T more) {
      g[j] += more * panel.scale;
      if (sums) sums[j] += more;
    };
    add(label, -(of_row(coefficient::kLabel) + c));
    if (top1 && c != 0) add(highest, c);
  }
}

#define ROBUSTFT_INSTANTIATE(T)                                                                  \
  template void class_statistics<T>(const ClassPanel<T>&, const ClassStatisticsWanted&, T*, T*); \
  template void class_gradient<T>(const ClassPanel<T>&, const T*, bool, bool);
ROBUSTFT_INSTANTIATE(float)
ROBUSTFT_INSTANTIATE(double)

}  // namespace ROBUSTFT_ISA
}  // namespace robustft
