// What one tile of similarities needs to become statistics or a gradient.
//
// A tile is S = x t^T for rows [row0, row0 + rows) and columns [col0, col0 + cols), with logits z = s S. Row state is
// indexed by i, column state by j, both from the start of the whole matrix. `Teacher` is a second matrix of the same
// shape with logits zt. See similarity.cpp for the mathematics and similarity_kernels.cpp for the loops.
#pragma once
#include <cstdint>

namespace robustft {

// The integer as wide as T: class labels are compared in the lanes of the tile's own vectors.
template <class T>
struct LabelOf;
template <>
struct LabelOf<float> {
  using type = int32_t;
};
template <>
struct LabelOf<double> {
  using type = int64_t;
};
template <class T>
using Label = typename LabelOf<T>::type;

template <class T>
struct Tile {
  T* s;              // (rows, cols), leading dimension ld; the gradient is written over it
  const T* teacher;  // the same for the teacher, or null
  int64_t ld, row0, col0, rows, cols;
  T scale, teacher_scale;  // both >= 0
  const Label<T>* row_labels;
  const Label<T>* col_labels;
};

// Running softmax statistics of each row (or column) over the tiles seen so far. Everything is relative to the running
// maximum of S, so that a scale of 100 does not magnify the rounding of numbers near 1.
template <class T>
struct RunningStatistics {
  T* max;               // max S
  T* sum;               // sum e, e = exp(s (S - max))
  T* weighted;          // sum e (S - max)
  T* target;            // sum of S over same-label entries
  T* total;             // sum of S
  T* teacher_max;       // max of the teacher's S; null without a teacher, like the two below
  T* teacher_sum;       // sum e_t
  T* teacher_weighted;  // sum e_t (S - max), with the student's S and max
};

// Coefficients of each row (or column) in G = a p - b [same label] - u - c p_t, with p = exp(s (S - max) - log_sum).
template <class T>
struct GradientCoefficients {
  const T* max;
  const T* log_sum;
  const T* softmax;      // a
  const T* target;       // b
  const T* uniform;      // u
  const T* teacher_lse;  // null without a teacher, like the next
  const T* teacher;      // c
};

#define ROBUSTFT_DECLARE_SIMILARITY(isa)                                                                               \
  namespace isa {                                                                                                      \
  template <class T>                                                                                                   \
  void row_statistics(const Tile<T>&, const RunningStatistics<T>&, int64_t begin, int64_t end);                        \
  template <class T>                                                                                                   \
  void column_statistics(const Tile<T>&, const RunningStatistics<T>&, int64_t begin, int64_t end);                     \
  template <class T>                                                                                                   \
  void gradient(const Tile<T>&, const GradientCoefficients<T>& row, const GradientCoefficients<T>& col, int64_t begin, \
                int64_t end);                                                                                          \
  void exp_values(const float* x, float* y, int64_t n);                                                                \
  void exp_values(const double* x, double* y, int64_t n);                                                              \
  }
ROBUSTFT_DECLARE_SIMILARITY(portable)
ROBUSTFT_DECLARE_SIMILARITY(avx2)
ROBUSTFT_DECLARE_SIMILARITY(avx512)
#undef ROBUSTFT_DECLARE_SIMILARITY

}  // namespace robustft
