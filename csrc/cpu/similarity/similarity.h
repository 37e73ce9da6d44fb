// What one tile of similarities needs to become statistics or a gradient.
//
// A tile is S = x t^T for rows [row0, row0 + rows) and columns [col0, col0 + cols), with logits z = s S. Row state is
// indexed by i, column state by j, both from the start of the whole matrix. The teacher is a second matrix of the same
// shape with logits zt. See statistics.cpp and gradient.cpp for the mathematics, kernels.cpp and wide_kernels.cpp for
// the loops.
//
// Softmax over rows and over columns need exp(z) relative to two different maxima. Within a tile whose logits span less
// than 2 kHalfSpan one exponential, about a centre c of the tile, serves both: e = 2^(z log2 e - c), c an integer.
// Other tiles (`wide`: a scale of 100 and cosines from -0.3 to 1, or an Inf or NaN among them) take two.
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

// The rows of the statistics of a side, (count, n): what `Statistics` in robustft/ops/similarity.py names. Those from
// kTeacherMax on only with a teacher.
namespace similarity_statistic {
enum : int64_t { kMax, kLogSum, kGap, kTarget, kTotal, kTeacherMax, kTeacherLogSum, kTeacherGap };
constexpr int64_t count(bool teacher) { return teacher ? kTeacherGap + 1 : kTeacherMax; }
}  // namespace similarity_statistic

// Likewise of a side's coefficients in the gradient: `Coefficients` there, GradientCoefficients below.
namespace similarity_coefficient {
enum : int64_t { kMax, kLogSum, kSoftmax, kTarget, kUniform, kTeacherMax, kTeacherLogSum, kTeacher };
constexpr int64_t count(bool teacher) { return teacher ? kTeacher + 1 : kTeacherMax; }
}  // namespace similarity_coefficient

template <class T>
struct Tile {
  T* s;        // (rows, cols), leading dimension ld
  T* teacher;  // the same for the teacher, or null
  T* e;        // (rows, cols), leading dimension e_ld: where the statistics leave e, or null
  T* teacher_e;
  int64_t ld, e_ld, row0, col0, rows, cols;
  T scale, teacher_scale;  // both >= 0
  const Label<T>* row_labels;
  const Label<T>* col_labels;
  bool same;  // some row and some column may have the same label
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

// What a sweep over one tile finds for each of its rows (or columns).
template <class T>
struct TileStatistics {
  T* max;       // max S
  T* sum;       // sum e, e = 2^(z log2 e - c)
  T* weighted;  // sum e (S - max)
  T* target;
  T* teacher_max;
  T* teacher_sum;       // sum e_t, e_t = 2^(z_t log2 e - c_t)
  T* teacher_weighted;  // sum e_t (S - max)
};

template <class T>
struct Range {
  T low, high;
};

// A tile of gradients: e from the forward where it was kept, else computed from S.
template <class T>
struct GradientTile {
  const T* s;        // (rows, cols), leading dimension ld: S, or e if `exponentials`
  const T* teacher;  // the same of the teacher, or null
  T* g;              // (rows, cols), leading dimension g_ld; may be s
  int64_t ld, g_ld;
  bool exponentials;
  T center, teacher_center;  // NaN in a wide tile, where s is S
};

// Coefficients of each row (or column) in G = a p - b [same label] - u - c p_t, with p = exp(s (S - max) - log_sum).
template <class T>
struct GradientCoefficients {
  const T* max;
  const T* log_sum;
  const T* softmax;      // a
  const T* target;       // b
  const T* uniform;      // u, null if all zero
  const T* teacher_max;  // null without a teacher, like the next two; p_t = exp(st (S_t - max) - log_sum), its own
  const T* teacher_log_sum;
  const T* teacher;  // c
};

// Factors of e and e_t in G of one tile, for its rows (or columns), each as a sum of two numbers: where p and its
// target are both near 1, G is what one product leaves of another.
template <class T>
struct TileFactors {
  T *softmax, *softmax_low;
  T *teacher, *teacher_low;
};

// Half of the widest span of logits that one exponential serves: e, sums of it, and what it is multiplied with in the
// gradient (at most exp(kHalfSpan), the scale and the caller's gradient) stay far from overflow.
template <class T>
constexpr T kHalfSpan = sizeof(T) == 4 ? T(64) : T(500);

// Centres are below this: they and powers near them are then added without rounding.
template <class T>
constexpr T kCenters = sizeof(T) == 4 ? T(1 << 22) : T(int64_t(1) << 51);

#define ROBUSTFT_DECLARE_SIMILARITY(isa)                                                                              \
  namespace isa {                                                                                                     \
  /* Maxima of the tile's rows and columns, and its range; also the teacher's. A range is NaN if anything is. */      \
  template <class T>                                                                                                  \
  void tile_range(const Tile<T>&, const TileStatistics<T>& row, const TileStatistics<T>& col, Range<T>* range,        \
                  Range<T>* teacher_range);                                                                           \
  /* Statistics of a tile with centres, and e where it is wanted. */                                                  \
  template <class T>                                                                                                  \
  void tile_statistics(const Tile<T>&, T center, T teacher_center, const TileStatistics<T>& row,                      \
                       const TileStatistics<T>& col, const RunningStatistics<T>& row_state,                           \
                       const RunningStatistics<T>& col_state);                                                        \
  /* The same of a wide tile; no e. */                                                                                \
  template <class T>                                                                                                  \
  void wide_statistics(const Tile<T>&, const RunningStatistics<T>& row_state, const RunningStatistics<T>& col_state); \
  template <class T>                                                                                                  \
  void tile_totals(const Tile<T>&, T* row_total, T* col_total);                                                       \
  template <class T>                                                                                                  \
  void tile_gradient(const Tile<T>&, const GradientTile<T>&, const GradientCoefficients<T>& row,                      \
                     const GradientCoefficients<T>& col, const TileFactors<T>& row_factors,                           \
                     const TileFactors<T>& col_factors);                                                              \
  template <class T>                                                                                                  \
  void wide_gradient(const Tile<T>&, const GradientTile<T>&, const GradientCoefficients<T>& row,                      \
                     const GradientCoefficients<T>& col);                                                             \
  void exp_values(const float* x, float* y, int64_t n);                                                               \
  void exp_values(const double* x, double* y, int64_t n);                                                             \
  }
ROBUSTFT_DECLARE_SIMILARITY(portable)
ROBUSTFT_DECLARE_SIMILARITY(avx2)
ROBUSTFT_DECLARE_SIMILARITY(avx512)
#undef ROBUSTFT_DECLARE_SIMILARITY

}  // namespace robustft
