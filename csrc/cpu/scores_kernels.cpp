// The sweep over a row of cosines. Compiled once per instruction set.
#include "lanes.h"
#include "scores.h"

namespace robustft {
namespace ROBUSTFT_ISA {
namespace {

// With c the cosines and m the largest, at a scale s: sum exp(s (c - m)) and, divided by it,
// sum exp(s (c - m)) (c - m); at the inverse temperature, where it is another, the first only.
template <class T, bool kTwoScales>
void panel_scores(const CosinePanel<T>& panel, T* scores, int64_t* prediction) {
  namespace score = class_score;
  using V = Vec<T>;
  const T lowest = -__builtin_inf();
  for (int64_t r = 0; r < panel.rows; ++r) {
    const int64_t i = panel.row0 + r;
    const T* c = panel.cosines + r * panel.k;
    const T m = row_max(c, panel.k, lowest);
    V sum{}, weighted{}, other{};
    for_each_vector<T>(panel.k, [&](int64_t j, int64_t lanes) {
      // Lanes past the end are set to zero after the exponential, whose argument they must not make NaN.
      const V gap = load_lanes<V>(c + j, lanes, m) - m;
      V e = exp_nonpositive<T>(gap * panel.scale);
      V f = kTwoScales ? exp_nonpositive<T>(gap * panel.inverse_temperature) : V{};
      if (lanes < kLanes<T>) {
        e = load_partial<V>((const T*)&e, lanes, T(0));
        f = load_partial<V>((const T*)&f, lanes, T(0));
      }
      sum += e;
      weighted += e * gap;
      if (kTwoScales) other += f;
    });
    const T total = reduce_sum<T>(sum), log_sum = __builtin_log(total);
    auto out = [&](int64_t which) -> T& { return scores[which * panel.n + i]; };
    out(score::kMaxCosine) = m;
    out(score::kMsp) = 1 / total;
    out(score::kMcm) = 1 / (kTwoScales ? reduce_sum<T>(other) : total);
    out(score::kEnergy) = m + log_sum / panel.scale;
    out(score::kEntropy) = panel.scale * (reduce_sum<T>(weighted) / total) - log_sum;
    prediction[i] = first_equal(c, panel.k, m);
  }
}

}  // namespace

template <class T>
void class_scores(const CosinePanel<T>& panel, T* scores, int64_t* prediction) {
  if (panel.scale == panel.inverse_temperature)
    panel_scores<T, false>(panel, scores, prediction);
  else
    panel_scores<T, true>(panel, scores, prediction);
}

#define ROBUSTFT_INSTANTIATE(T) template void class_scores<T>(const CosinePanel<T>&, T*, int64_t*);
ROBUSTFT_INSTANTIATE(float)
ROBUSTFT_INSTANTIATE(double)

}  // namespace ROBUSTFT_ISA
}  // namespace robustft
