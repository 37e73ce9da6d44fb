// The confidence misalignment penalty of logits that lie in memory, and its gradient.
//
//   z (n, k) logits of any float type and strides, y (n) labels, H_i = {c: z_ic > z_iy} strictly
//   L_i        = logsumexp over H_i of z - z_iy     (top-1: max z - z_iy),      0 where H_i is empty
//   penalty_i  = f(L_i), f by `variant`:   neg_log_ratio L,  neg_ratio 1 - e^-L,  softplus log(1 + e^L),  ratio e^-L
//   gradient   = g_i f'(L_i) (softmax over H_i - 1_y),   softmax as exp(z - offset - log_sum)
//   kept       (3, n): offset, log_sum (-inf where H_i is empty), f'(L_i): all that the gradient needs besides z
//
// Each row is read from memory once, forward and backward; nothing of n x k is made but the gradient. Half precision is
// widened in registers; blocks of kBlock rows are copied first when the classes of a row do not lie side by side.
// A NaN in a row makes its penalty NaN: it counts as above the label, whichever of the two it is.
#include "misalignment.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <string>
#include <tuple>
#include <vector>

#include "dispatch.h"
#include "penalty.h"
#include "torch_api.h"

namespace robustft {
namespace {

constexpr int64_t kBlock = 16;

// Rows [begin, end) in blocks whose classes lie side by side: f(first row of the block, its rows).
template <class P, class F>
void for_each_block(const Tensor& logits, const int64_t* labels, int64_t begin, int64_t end, const F& f) {
  const P* z = static_cast<const P*>(logits.const_data_ptr());
  const int64_t k = logits.size(1), by_row = logits.stride(0), by_class = k == 1 ? 1 : logits.stride(1);
  std::vector<P> copy(by_class == 1 ? 0 : kBlock * k);
  for (int64_t i = begin; i < end; i += kBlock) {
    const int64_t count = std::min(kBlock, end - i);
    for (int64_t j = 0; by_class != 1 && j < k; ++j)
      for (int64_t r = 0; r < count; ++r) copy[r * k + j] = z[(i + r) * by_row + j * by_class];
    f(i, by_class == 1 ? LogitRows<P>{z + i * by_row, count, by_row, k, labels + i}
                       : LogitRows<P>{copy.data(), count, k, k, labels + i});
  }
}

template <class P>
std::tuple<Tensor, Tensor, Tensor> penalty(const Tensor& logits, const Tensor& labels, const std::string& variant,
                                           bool top1) {
  using T = Wide<P>;
  const int64_t n = logits.size(0), k = logits.size(1);
  const PenaltyOfGap<T> f = penalty_of<T>(variant);
  const int64_t* y = labels.const_data_ptr<int64_t>();
  Tensor out = uninitialized({n}, scalar_type<T>());
  Tensor kept = uninitialized({3, n}, scalar_type<T>());
  Tensor errors = uninitialized({}, ScalarType::Long);
  T *value = out.mutable_data_ptr<T>(), *offset = kept.mutable_data_ptr<T>(), *log_sum = offset + n,
    *slope = log_sum + n;
  parallel_blocks(n, k, [&](int64_t begin, int64_t end) {
    for_each_block<P>(logits, y, begin, end, [&](int64_t i, const LogitRows<P>& rows) {
      T* label = slope + i;  // until the slope is known
      ROBUSTFT_CALL(misranked_sums<P>, rows, top1, offset + i, log_sum + i, label);
      for (int64_t r = i; r < i + rows.count; ++r) {
        const bool wrong = !(log_sum[r] == 0);
        log_sum[r] = std::log(log_sum[r]);
        const Penalty<T> p = wrong ? f(log_sum[r] + (offset[r] - slope[r])) : Penalty<T>{0, 0};
        value[r] = p.value, slope[r] = p.slope;
      }
    });
  });
  *errors.mutable_data_ptr<int64_t>() = n - std::count(log_sum, log_sum + n, -std::numeric_limits<T>::infinity());
  return {out, errors, kept};
}

template <class P>
Tensor gradient(const Tensor& grad, const Tensor& logits, const Tensor& labels, bool top1, const Tensor& kept) {
  using T = Wide<P>;
  const int64_t n = logits.size(0), k = logits.size(1);
  const Tensor wide_grad = contiguous_as(grad, scalar_type<T>()), wide_kept = contiguous_as(kept, scalar_type<T>());
  const int64_t* y = labels.const_data_ptr<int64_t>();
  const T *g = wide_grad.const_data_ptr<T>(), *offset = wide_kept.const_data_ptr<T>(), *log_sum = offset + n,
          *slope = log_sum + n;
  Tensor out = uninitialized({n, k}, logits.scalar_type());
  P* result = static_cast<P*>(out.mutable_data_ptr());
  parallel_blocks(n, k, [&](int64_t begin, int64_t end) {
    for_each_block<P>(logits, y, begin, end, [&](int64_t i, const LogitRows<P>& rows) {
      T coefficient[kBlock];  // exactly 0 where the penalty does not depend on z, whatever g is
      for (int64_t r = 0; r < rows.count; ++r) coefficient[r] = slope[i + r] == 0 ? T(0) : g[i + r] * slope[i + r];
      ROBUSTFT_CALL(misranked_softmax<P>, rows, top1, offset + i, log_sum + i, coefficient, result + i * k);
    });
  });
  return out;
}

// Labels as int64, inside [0, k).
Tensor checked(const Tensor& logits, const Tensor& labels) {
  STD_TORCH_CHECK(logits.dim() == 2 && labels.dim() == 1 && labels.numel() == logits.size(0) && logits.size(1) > 0,
                  "misalignment_penalty: logits and labels must be (n, k) and (n,), k at least 1");
  const Tensor wide = contiguous_as(labels, ScalarType::Long);
  const int64_t *p = wide.const_data_ptr<int64_t>(), k = logits.size(1);
  for (int64_t i = 0, n = wide.numel(); i < n; ++i)
    STD_TORCH_CHECK(p[i] >= 0 && p[i] < k, "label ", p[i], " at index ", i, " is outside [0, ", k, ")");
  return wide;
}

std::tuple<Tensor, Tensor, Tensor> misalignment_penalty(const Tensor& logits, const Tensor& labels, std::string variant,
                                                        bool top1) {
  const Tensor y = checked(logits, labels);
  switch (logits.scalar_type()) {
    case ScalarType::Double: return penalty<double>(logits, y, variant, top1);
    case ScalarType::BFloat16: return penalty<Bf16>(logits, y, variant, top1);
    case ScalarType::Half: return penalty<Fp16>(logits, y, variant, top1);
    default:
      STD_TORCH_CHECK(logits.scalar_type() == ScalarType::Float, "misalignment_penalty: logits must be floating");
      return penalty<float>(logits, y, variant, top1);
  }
}

Tensor misalignment_penalty_backward(const Tensor& grad, const Tensor& logits, const Tensor& labels, bool top1,
                                     const Tensor& kept) {
  const Tensor y = checked(logits, labels);
  STD_TORCH_CHECK(grad.dim() == 1 && grad.numel() == logits.size(0) && kept.dim() == 2 && kept.size(0) == 3 &&
                      kept.size(1) == logits.size(0),
                  "misalignment_penalty_backward: grad and kept must be (n,) and (3, n)");
  switch (logits.scalar_type()) {
    case ScalarType::Double: return gradient<double>(grad, logits, y, top1, kept);
    case ScalarType::BFloat16: return gradient<Bf16>(grad, logits, y, top1, kept);
    case ScalarType::Half: return gradient<Fp16>(grad, logits, y, top1, kept);
    default:
      STD_TORCH_CHECK(logits.scalar_type() == ScalarType::Float, "misalignment_penalty: logits must be floating");
      return gradient<float>(grad, logits, y, top1, kept);
  }
}

}  // namespace
}  // namespace robustft

STABLE_TORCH_LIBRARY_IMPL(robustft, CPU, m) {
  m.impl("misalignment_penalty", TORCH_BOX(&robustft::misalignment_penalty));
  m.impl("misalignment_penalty_backward", TORCH_BOX(&robustft::misalignment_penalty_backward));
}
