// Nearest neighbours: the loops over rows, compiled once per instruction set. See neighbors.cpp for the mathematics.
#pragma once
#include <cstdint>

namespace robustft {

// A point whose score reached a query's threshold.
template <class T>
struct Hit {
  T score;
  int32_t point;
};

// What the bound on a row's scores needs: |x - c|^2 and |x - c - bf16(x - c)|^2, or NaN where the row is not finite.
struct RowNorms {
  double squared, residual;
};

// Products (rows, cols), leading dimension ld, of queries by the points from `first` on.
template <class T>
struct Scores {
  T* products;
  const T* bias;  // (cols): score = product - bias
  int64_t rows, cols, ld, first;
};

// Products of queries by points in fixed point (fixed.h), which are whole numbers, times a factor for each query.
struct FixedProducts {
  const int16_t* groups;
  const float* factors;  // (rows)
  const int16_t* panels;
  int64_t rows, cols, pairs;  // pairs: half the depth
};
constexpr int64_t kPanel = 16, kGroup = 6;  // points, and queries, packed side by side

// Rows side by side in a block of exact distances: of queries, and of points; and what their length must be a multiple
// of, whatever the instruction set: the order of the sums of what is left over is the compiler's.
constexpr int64_t kBlockQueries = 4, kBlockPoints = 2, kBlockDepth = 64;

// For distances from products in double (sorted.cpp): queries, and points packed side by side, less a common centre;
// norms are squared.
struct PanelQueries {
  const double *rows, *norms;  // (count, d), (count)
  int64_t count, d;
  double bound;  // of the error of |q|^2 + |x|^2 - 2 q.x, by the sum of the norms
  bool squared;
};
struct Panel {
  const double *points, *norms;  // of pack_panel
  int64_t count;
};
constexpr int64_t kPanelPoints = 48;  // room of a panel: a multiple of what the kernels take at once

#define ROBUSTFT_DECLARE_NEIGHBORS(isa)                                                                       \
  namespace isa {                                                                                             \
  template <class T>                                                                                          \
  void centre_row(const T* x, const T* c, int64_t d, bool bf16, T* out, RowNorms* norms);                     \
  template <class T>                                                                                          \
  void score_reached(const T* products, const T* bias, int64_t count, int64_t rank, T* score);                \
  template <class T>                                                                                          \
  void collect(const Scores<T>& scores, const T* thresholds, Hit<T>* const* hits, int64_t* counts);           \
  template <class T>                                                                                          \
  void squared_distances(const double* query, const T* points, int64_t d, const int32_t* rows, int64_t count, \
                         double* out);                                                                        \
  void pack_block(const double* x, int64_t rows, int64_t d, int64_t side, double* out);                       \
  void block_distances(const double* queries, const double* points, int64_t d, double* out, int64_t ld);      \
  void pack_panel(const float* x, const float* c, int64_t count, int64_t d, double* out, double* norms);      \
  void panel_distances(const PanelQueries& in, const Panel& panel, float* out, int64_t ld, uint64_t* open);   \
  void to_fixed(const float* x, int64_t d, float scale, int16_t* out, double* residual);                      \
  void fixed_products(const FixedProducts& in, float* out, int64_t ld);                                       \
  }
ROBUSTFT_DECLARE_NEIGHBORS(portable)
ROBUSTFT_DECLARE_NEIGHBORS(avx2)
ROBUSTFT_DECLARE_NEIGHBORS(avx512)
#undef ROBUSTFT_DECLARE_NEIGHBORS

}  // namespace robustft
