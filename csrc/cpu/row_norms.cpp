// The lowest and the highest norm of the rows of x (n, d): (2,) in the dtype of the sums, NaN both if one is.
//
// What a check of unit features asks for. torch takes four operators for it, longer than the scores of one image.
#include "row_norms.h"

#include <cmath>
#include <vector>

namespace robustft {
namespace {

constexpr int64_t kStretchRows = 8192;  // of features that have to be converted
constexpr int64_t kRows = 256;          // of a task
constexpr int64_t kSums = 16;           // an addition need not wait for the one before

template <class T>
T squared_norm(const T* x, int64_t d) {
  T sums[kSums] = {};
  int64_t j = 0;
  for (; j + kSums <= d; j += kSums)
    for (int64_t l = 0; l < kSums; ++l) sums[l] += x[j + l] * x[j + l];
  for (; j < d; ++j) sums[j % kSums] += x[j] * x[j];
  for (int64_t width = kSums / 2; width > 0; width /= 2)
    for (int64_t l = 0; l < width; ++l) sums[l] += sums[l + width];
  return sums[0];
}

}  // namespace

template <class T>
void NormExtremes<T>::write(T* out) const {
  const T missing = std::numeric_limits<T>::quiet_NaN();
  out[0] = nan ? missing : std::sqrt(low), out[1] = nan ? missing : std::sqrt(high);
}

template <class T>
NormExtremes<T> norm_extremes(const T* x, int64_t count, int64_t d) {
  NormExtremes<T> all;
  for (int64_t i = 0; i < count; ++i) {
    const T square = squared_norm(x + i * d, d);
    all.add({square, square, square != square});
  }
  return all;
}

template struct NormExtremes<float>;
template struct NormExtremes<double>;
template NormExtremes<float> norm_extremes<float>(const float*, int64_t, int64_t);
template NormExtremes<double> norm_extremes<double>(const double*, int64_t, int64_t);

namespace {

template <class T>
Tensor norms(const Tensor& features) {
  const int64_t n = features.size(0), d = features.size(1);
  NormExtremes<T> all;
  Stretches<T> stretches(features, kStretchRows);
  for (int64_t first = 0; first < n; first += kStretchRows) {
    const int64_t count = std::min(kStretchRows, n - first);
    const Tensor rows = stretches.rows(first, count);
    const T* const x = rows.const_data_ptr<T>();
    std::vector<NormExtremes<T>> of_tasks((count + kRows - 1) / kRows);
    torch::stable::parallel_for(0, int64_t(of_tasks.size()), 1, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task)
        of_tasks[task] = norm_extremes(x + task * kRows * d, std::min(kRows, count - task * kRows), d);
    });
    for (const NormExtremes<T>& of : of_tasks) all.add(of);
  }
  Tensor out = uninitialized({2}, scalar_type<T>());
  all.write(out.mutable_data_ptr<T>());
  return out;
}

}  // namespace

Tensor row_norms(const Tensor& x) {
  STD_TORCH_CHECK(x.dim() == 2 && x.size(0) > 0, "row_norms: x must be (n, d), n at least 1");
  return x.scalar_type() == ScalarType::Double ? norms<double>(x) : norms<float>(x);
}

}  // namespace robustft

STABLE_TORCH_LIBRARY_IMPL(robustft, CPU, m) { m.impl("row_norms", TORCH_BOX(&robustft::row_norms)); }
