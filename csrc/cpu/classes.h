// A row of class logits: what it is reduced to, and its gradient. See classes.cpp for the mathematics.
#pragma once
#include <cstdint>

namespace robustft {

// Rows [row0, row0 + rows) of one head's classes: S = x w^T (n, k), or in its place e = exp(z - max z).
template <class T>
struct ClassPanel {
  T* s;  // (rows, k), leading dimension ld
  T* g;  // (rows, k), likewise: where scale times the gradient goes; may be s itself
  int64_t ld, row0, rows, n, k;
  T scale;
  const T* bias;          // (k) or null
  const int64_t* labels;  // (n)
  const T* targets;       // (rows, k) soft targets of these rows, or null
  T* bias_gradient;       // (k) column sums of the panel's gradient, or null
};

// What of the statistics is wanted besides those that every loss needs; the others are 0.
struct ClassStatisticsWanted {
  bool misranked;  // kAboveLogSum, kAboveMean, kMaxS
  bool means;      // kMeanGap, kRowMean
};

// The rows of a head's statistics (kCount, n); those from kTargetSum on only with soft targets. `above` are the classes
// that rank strictly above the label, by e: float32 cannot tell e of logits that are 3e-8 apart.
namespace class_statistic {
enum : int64_t {
  kMax,          // max z
  kLogSum,       // log sum e
  kAboveLogSum,  // log sum of e over {e > e_y}, -inf when nothing ranks above the label, NaN if any z is
  kMean,         // sum p S, p = softmax z
  kLabelGap,     // max - z_y
  kLabel,        // S_y
  kAboveMean,    // mean S under the softmax over {e > e_y}
  kMaxS,         // S at the first maximum of z
  kMeanGap,      // max - mean z
  kRowMean,      // mean S
  kHardCount,
  kTargetSum = kHardCount,  // sum q
  kTargetGap,               // sum q (max - z)
  kTarget,                  // sum q S
  kSoftCount
};
}

// The rows of a head's coefficients of G = a p - b 1_y - u - v q + c (above - 1_y), p and above as in the statistics.
namespace class_coefficient {
enum : int64_t { kMax, kLogSum, kAboveLogSum, kSoftmax, kLabel, kUniform, kTargets, kAbove, kCount };
}

// class_statistics leaves e where S was. class_gradient takes either, as `exponentials` says.
#define ROBUSTFT_DECLARE_CLASSES(isa)                                                                   \
  namespace isa {                                                                                       \
  template <class T>                                                                                    \
  void class_statistics(const ClassPanel<T>&, const ClassStatisticsWanted&, T* statistics, T* scratch); \
  template <class T>                                                                                    \
  void class_gradient(const ClassPanel<T>&, const T* coefficients, bool exponentials, bool top1);       \
  }
ROBUSTFT_DECLARE_CLASSES(portable)
ROBUSTFT_DECLARE_CLASSES(avx2)
ROBUSTFT_DECLARE_CLASSES(avx512)
#undef ROBUSTFT_DECLARE_CLASSES

}  // namespace robustft
