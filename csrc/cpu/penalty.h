// The confidence misalignment penalty as a function of L, and its derivative; misalignment.cpp says what L is.
#pragma once
#include <cmath>
#include <string>

#include "torch_api.h"

namespace robustft {

template <class T>
struct Penalty {
  T value, slope;
};

template <class T>
inline Penalty<T> neg_log_ratio(T gap) {
  return {gap, T(1)};
}
template <class T>
inline Penalty<T> neg_ratio(T gap) {
  return {-std::expm1(-gap), std::exp(-gap)};
}
template <class T>
inline Penalty<T> softplus(T gap) {
  const T ratio = std::exp(-gap);  // at most 1: gaps are not negative
  return {gap + std::log1p(ratio), 1 / (1 + ratio)};
}
template <class T>
inline Penalty<T> ratio(T gap) {
  return {std::exp(-gap), -std::exp(-gap)};
}

template <class T>
using PenaltyOfGap = Penalty<T> (*)(T);

template <class T>
PenaltyOfGap<T> penalty_of(const std::string& variant) {
  if (variant == "neg_log_ratio") return neg_log_ratio<T>;
  if (variant == "neg_ratio") return neg_ratio<T>;
  if (variant == "softplus") return softplus<T>;
  STD_TORCH_CHECK(variant == "ratio", "misalignment_penalty: unknown variant ", variant);
  return ratio<T>;
}

}  // namespace robustft
