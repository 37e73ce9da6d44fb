// The lowest and the highest norm of the rows of x (n, d): (2,) in the dtype of the sums, NaN both if one is.
//
// What a check of unit features asks for. torch takes four operators for it, longer than the scores of one image.
#include "row_norms.h"

#include <algorithm>
#include <cmath>
#include <limits>
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

template <class T>
struct Extremes {
  T low = std::numeric_limits<T>::infinity(), high = 0;
  bool nan = false;

  void add(const Extremes& other) {
    low = std::min(low, other.low), high = std::max(high, other.high), nan |= other.nan;
  }
};

template <class T>
Tensor norms(const Tensor& features) {
  const int64_t n = features.size(0), d = features.size(1);
  Extremes<T> all;
  Stretches<T> stretches(features, kStretchRows);
  for (int64_t first = 0; first < n; first += kStretchRows) {
    const int64_t count = std::min(kStretchRows, n - first);
    const Tensor rows = stretches.rows(first, count);
    const T* const x = rows.const_data_ptr<T>();
    std::vector<Extremes<T>> of_tasks((count + kRows - 1) / kRows);
    torch::stable::parallel_for(0, int64_t(of_tasks.size()), 1, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task)
        for (int64_t i = task * kRows; i < std::min((task + 1) * kRows, count); ++i) {
          const T square = squared_norm(x + i * d, d);
          of_tasks[task].add({square, square, square != square});
        }
    });
    for (const Extremes<T>& of : of_tasks) all.add(of);
  }
  Tensor out = uninitialized({2}, scalar_type<T>());
  T* const result = out.mutable_data_ptr<T>();
  const T nan = std::numeric_limits<T>::quiet_NaN();
  result[0] = all.nan ? nan : std::sqrt(all.low), result[1] = all.nan ? nan : std::sqrt(all.high);
  return out;
}

}  // namespace

Tensor row_norms(const Tensor& x) {
  STD_TORCH_CHECK(x.dim() == 2 && x.size(0) > 0, "row_norms: x must be (n, d), n at least 1");
  return x.scalar_type() == ScalarType::Double ? norms<double>(x) : norms<float>(x);
}

}  // namespace robustft

STABLE_TORCH_LIBRARY_IMPL(robustft, CPU, m) { m.impl("row_norms", TORCH_BOX(&robustft::row_norms)); }
