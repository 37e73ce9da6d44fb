// The two loops over a row of logits for the misalignment penalty. Compiled once per instruction set.
#include "half.h"
#include "misalignment.h"

namespace robustft {
namespace ROBUSTFT_ISA {
namespace {

// Whether z ranks above the label, lane by lane: strictly, and NaN does, so that it reaches the loss.
template <class V>
inline auto above(V z, V label) {
  return ~(z <= label);
}

template <class P>
inline Wide<P> element(const P* z, int64_t j) {
  return load_wide(z + j, 1)[0];
}

template <class P>
inline int64_t first_equal(const P* z, int64_t k, Wide<P> value) {
  for (int64_t j = 0; j < k; ++j)
    if (element(z, j) == value) return j;
  return 0;  // only NaN gets here
}

}  // namespace

// Per row: z_y, the sum over the classes above it of exp(z - offset), 0 only where there are none, and the offset,
// their maximum. top1: the maximum and 1. Only rows with a class above the label are read a second time.
template <class P>
void misranked_sums(const LogitRows<P>& rows, bool top1, Wide<P>* offset, Wide<P>* sum, Wide<P>* label) {
  using T = Wide<P>;
  using V = Vec<T>;
  for (int64_t r = 0; r < rows.count; ++r) {
    const P* z = rows.z + r * rows.stride;
    const T z_label = element(z, rows.labels[r]);
    V highest = V{} - T(__builtin_inf());
    for_each_vector<T>(rows.k, [&](int64_t j, int64_t lanes) { highest = max(load_wide(z + j, lanes), highest); });
    T m = reduce_max<T>(highest);
    label[r] = z_label;
    if (m <= z_label || top1) {
      offset[r] = m;
      sum[r] = m <= z_label ? T(0) : T(1);
      continue;
    }
    if (m == T(__builtin_inf())) m = 0;  // inf - inf would be NaN; from 0 the sum is inf
    V total{};
    const V v_label = V{} + z_label;
    for_each_vector<T>(rows.k, [&](int64_t j, int64_t lanes) {
      const V v = load_wide(z + j, lanes);
      total += above(v, v_label) ? exp<T>(v - m) : V{};
    });
    offset[r] = m;
    sum[r] = reduce_sum<T>(total);
  }
}

// gradient = coefficient (softmax over the classes above the label - 1_y), with the statistics of misranked_sums.
template <class P>
void misranked_softmax(const LogitRows<P>& rows, bool top1, const Wide<P>* offset, const Wide<P>* log_sum,
                       const Wide<P>* coefficient, P* gradient) {
  using T = Wide<P>;
  using V = Vec<T>;
  for (int64_t r = 0; r < rows.count; ++r) {
    const P* z = rows.z + r * rows.stride;
    P* g = gradient + r * rows.k;
    const T c = coefficient[r];
    if (c == 0 || top1) __builtin_memset(g, 0, rows.k * sizeof(P));
    if (c == 0) continue;
    if (top1) {
      store_narrow(g + first_equal(z, rows.k, offset[r]), V{} + c, 1);
    } else {
      const V label = V{} + element(z, rows.labels[r]);
      for_each_vector<T>(rows.k, [&](int64_t j, int64_t lanes) {
        const V v = load_wide(z + j, lanes);
        store_narrow(g + j, above(v, label) ? c * exp<T>(v - offset[r] - log_sum[r]) : V{}, lanes);
      });
    }
    store_narrow(g + rows.labels[r], V{} - c, 1);
  }
}

#define ROBUSTFT_INSTANTIATE(P)                                                             \
  template void misranked_sums<P>(const LogitRows<P>&, bool, Wide<P>*, Wide<P>*, Wide<P>*); \
  template void misranked_softmax<P>(const LogitRows<P>&, bool, const Wide<P>*, const Wide<P>*, const Wide<P>*, P*);
ROBUSTFT_INSTANTIATE(float)
ROBUSTFT_INSTANTIATE(double)
ROBUSTFT_INSTANTIATE(Bf16)
ROBUSTFT_INSTANTIATE(Fp16)

}  // namespace ROBUSTFT_ISA
}  // namespace robustft
