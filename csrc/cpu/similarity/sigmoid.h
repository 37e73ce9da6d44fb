// What one tile of similarities adds to the sigmoid losses, and the gradient that it becomes. See sigmoid.cpp for the
// mathematics, sigmoid_kernels.cpp for the loops.
#pragma once
#include "similarity.h"

namespace robustft {

// The sums over each row of S, (count, n): the losses against the labels and their derivatives by the scale and the
// bias, and with a teacher those against its probabilities.
namespace sigmoid_sum {
enum : int64_t { kLoss, kByScale, kByBias, kTeacherLoss, kTeacherByScale, kTeacherByBias };
constexpr int64_t count(bool teacher) { return teacher ? kTeacherByBias + 1 : kTeacherLoss; }
}  // namespace sigmoid_sum

template <class T>
struct SigmoidRows {
  T bias, teacher_bias;
  T* sums;  // (count, n), to which the tile's are added
  const T*
      weight;  // (1, n), with a teacher (2, n): of the rows' losses in the gradient, or null if there is to be none
  int64_t n;
};

// Where the gradient by x t^T goes: (rows, cols), leading dimension ld; may be the tile's s.
template <class T>
struct SigmoidGradient {
  T* g;
  int64_t ld;
};

#define ROBUSTFT_DECLARE_SIGMOID(isa)                                                  \
  namespace isa {                                                                      \
  /* The tile's sums, and with weights its gradient. */                                \
  template <class T>                                                                   \
  void sigmoid_tile(const Tile<T>&, const SigmoidRows<T>&, const SigmoidGradient<T>&); \
  void softplus_values(const float* z, float* y, float* slope, int64_t n);             \
  void softplus_values(const double* z, double* y, double* slope, int64_t n);          \
  }
ROBUSTFT_DECLARE_SIGMOID(portable)
ROBUSTFT_DECLARE_SIGMOID(avx2)
ROBUSTFT_DECLARE_SIGMOID(avx512)
#undef ROBUSTFT_DECLARE_SIGMOID

}  // namespace robustft
