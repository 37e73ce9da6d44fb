// The lowest and the highest norm of the rows of a matrix: row_norms.cpp.
#pragma once
#include <algorithm>
#include <limits>

#include "torch_api.h"

namespace robustft {

// The least and the greatest squared norm of some rows, and whether one is NaN.
template <class T>
struct NormExtremes {
  T low = std::numeric_limits<T>::infinity(), high = 0;
  bool nan = false;

  void add(const NormExtremes& other) {
    low = std::min(low, other.low), high = std::max(high, other.high), nan |= other.nan;
  }
  // The norms themselves, NaN both if one is.
  void write(T* out) const;
};

// Of the rows of x (count, d).
template <class T>
NormExtremes<T> norm_extremes(const T* x, int64_t count, int64_t d);

Tensor row_norms(const Tensor& x);

}  // namespace robustft
