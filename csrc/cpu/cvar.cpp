// Conditional value at risk: the mean of the worst alpha n of n losses, the last of them counted in part.
//
//   b = alpha n, t = the ceil(b)-th largest loss, above = how many exceed it
//   cvar     = (sum over {losses > t} + (b - above) t) / b
//   gradient = g / b for losses > t and for the first `whole` = ceil(b) - 1 - above that equal t, in order of index,
//              g (b - ceil(b) + 1) / b for the next that equals t, 0 for the rest
//   boundary (2): t and whole, float64: what the gradient needs besides the losses
//
// t is found by radix selection, 8 bits at a time among the candidates left: O(n), no matter what the losses are. As
// integers in the order of the losses NaN is the largest of all, so it always counts and reaches the result. Serial: n
// is a batch, and one order of addition repeats to the bit.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <tuple>
#include <vector>

#include "torch_api.h"

namespace robustft {
namespace {

template <class T>
struct KeyOf;
template <>
struct KeyOf<float> {
  using type = uint32_t;
};
template <>
struct KeyOf<double> {
  using type = uint64_t;
};
template <class T>
using Key = typename KeyOf<T>::type;

// Unsigned integers in the order of the losses; 0 and -0 are equal, all NaN are equal and above infinity.
template <class T>
inline Key<T> key_of(T loss) {
  constexpr Key<T> kSign = Key<T>(1) << (8 * sizeof(T) - 1);
  const T canonical = loss + T(0);  // -0 + 0 = 0
  Key<T> bits;
  std::memcpy(&bits, &canonical, sizeof bits);
  const Key<T> ordered = bits ^ (bits & kSign ? ~Key<T>(0) : kSign);
  return loss == loss ? ordered : ~Key<T>(0);
}

// The key of rank `rank` from the largest, which is rank 0. Overwrites the keys.
template <class K>
K select(std::vector<K>& keys, int64_t rank) {
  int64_t n = keys.size();
  for (int shift = 8 * sizeof(K) - 8;; shift -= 8) {
    int64_t counts[256] = {};
    for (int64_t i = 0; i < n; ++i) ++counts[(keys[i] >> shift) & 255];
    K digit = 255;
    for (; rank >= counts[digit]; --digit) rank -= counts[digit];
    if (n == counts[digit] && shift > 0) continue;  // all alike in this digit
    int64_t kept = 0;
    for (int64_t i = 0; i < n; ++i) {
      keys[kept] = keys[i];
      kept += ((keys[i] >> shift) & 255) == digit;
    }
    n = kept;
    if (shift == 0 || n == 1) return keys[0];
  }
}

template <class T>
struct Cvar {
  double budget;
  int64_t n;

  Cvar(const Tensor& losses, double alpha) : budget(alpha * double(losses.numel())), n(losses.numel()) {}

  // From 0: the last loss that counts, and it counts `last_share`.
  int64_t last() const { return std::min<int64_t>(n, std::max<int64_t>(1, int64_t(std::ceil(budget)))) - 1; }
  double last_share() const { return budget - double(last()); }

  std::tuple<Tensor, Tensor> forward(const Tensor& losses) const {
    const T* v = losses.const_data_ptr<T>();
    std::vector<Key<T>> keys(n);
    for (int64_t i = 0; i < n; ++i) keys[i] = key_of(v[i]);
    const Key<T> boundary_key = select(keys, last());
    constexpr int64_t kSums = 8;
    double sums[kSums] = {};
    T threshold = 0;
    int64_t above = 0;
    for (int64_t i = 0; i < n; ++i) {
      const Key<T> key = key_of(v[i]);
      sums[i % kSums] += key > boundary_key ? double(v[i]) : 0.0;
      above += key > boundary_key;
      threshold = key == boundary_key ? v[i] : threshold;
    }
    double sum = (budget - double(above)) * double(threshold);
    for (double part : sums) sum += part;
    Tensor value = uninitialized({}, losses.scalar_type());
    Tensor boundary = uninitialized({2}, ScalarType::Double);
    *value.mutable_data_ptr<T>() = T(sum / budget);
    double* p = boundary.mutable_data_ptr<double>();
    p[0] = threshold, p[1] = double(last() - above);
    return {value, boundary};
  }

  Tensor backward(const Tensor& grad, const Tensor& losses, const Tensor& boundary) const {
    const T* v = losses.const_data_ptr<T>();
    const double* p = boundary.const_data_ptr<double>();
    const Key<T> threshold = key_of(T(p[0]));
    const double g = number_in(grad) / budget;
    Tensor out = uninitialized(losses.sizes(), losses.scalar_type());
    T* d = out.mutable_data_ptr<T>();
    for (int64_t i = 0; i < n; ++i) d[i] = key_of(v[i]) > threshold ? T(g) : T(0);
    int64_t whole = int64_t(p[1]);
    for (int64_t i = 0; i < n; ++i)
      if (key_of(v[i]) == threshold) {
        d[i] = T(whole > 0 ? g : g * last_share());
        if (whole-- == 0) break;
      }
    return out;
  }
};

void check(const Tensor& losses, double alpha) {
  STD_TORCH_CHECK(losses.dim() == 1 && losses.numel() > 0, "cvar: losses must be (n,), n at least 1");
  STD_TORCH_CHECK(alpha > 0 && alpha <= 1, "cvar: alpha is ", alpha, "; expected a fraction in (0, 1]");
}

std::tuple<Tensor, Tensor> cvar(const Tensor& losses, double alpha) {
  check(losses, alpha);
  if (losses.scalar_type() == ScalarType::Double)
    return Cvar<double>(losses, alpha).forward(contiguous_as(losses, ScalarType::Double));
  return Cvar<float>(losses, alpha).forward(contiguous_as(losses, ScalarType::Float));
}

Tensor cvar_backward(const Tensor& grad, const Tensor& losses, double alpha, const Tensor& boundary) {
  check(losses, alpha);
  STD_TORCH_CHECK(grad.numel() == 1 && boundary.numel() == 2 && boundary.scalar_type() == ScalarType::Double,
                  "cvar_backward: grad must have one element, boundary two of float64");
  const Tensor b = contiguous_as(boundary, ScalarType::Double);
  const ScalarType dtype = losses.scalar_type();
  if (dtype == ScalarType::Double) return Cvar<double>(losses, alpha).backward(grad, contiguous_as(losses, dtype), b);
  return contiguous_as(Cvar<float>(losses, alpha).backward(grad, contiguous_as(losses, ScalarType::Float), b), dtype);
}

}  // namespace
}  // namespace robustft

STABLE_TORCH_LIBRARY_IMPL(robustft, CPU, m) {
  m.impl("cvar", TORCH_BOX(&robustft::cvar));
  m.impl("cvar_backward", TORCH_BOX(&robustft::cvar_backward));
}
