// Rows in 16-bit fixed point, and their products: the filter of float32 searches where bfloat16 is not multiplied.
//
//   xh = round(s x), whole numbers        q.x = qh.xh / (s_q s_x) but for the residuals |q - qh / s_q|, |x - xh / s_x|
//
// Two such multiplications take the time of one in float32, and a product is exact: by Cauchy-Schwarz no sum over any
// part of the depth exceeds |qh| |xh|, and the scales keep
//
//   |xh| <= 2^15 - 1,  |qh| <= 2^16 - 1,  each element of either at most 2^15 - 1
//
// so that 32 bits hold it, whatever the depth. Points share one scale, which follows from their largest norm; each
// query has its own. Rounding adds at most sqrt(d) / 2 to the norm of a row, usually sqrt(d / 12).
//
//   panels   [n / 16][d / 2][16 points][2]      points, zeros after the last and after an odd d
//   groups   [m / 6][d / 2][6 queries][2]       queries; a last group of fewer is as narrow as they are
#pragma once
#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "../dispatch.h"
#include "../tile.h"
#include "neighbors.h"

namespace robustft {
namespace fixed {

inline int64_t pairs(int64_t d) { return (d + 1) / 2; }
inline int64_t panel_size(int64_t d) { return pairs(d) * kPanel * 2; }

// Whether products in fixed point are the faster ones: on processors with AVX2, where rows are not so short that the
// bound, which for float32 shrinks with them, counts for more. With AVX-512 they take as many instructions as float32.
inline bool pays(int64_t d) { return d >= 32 && !bf16::available() && vector_isa() == Isa::avx2; }

// The scale of points of which the longest is this long; 0 where there is none.
inline float scale_of_points(double norm, int64_t d) {
  return norm > 1e-15 && norm < 1e15 && d <= 1 << 20 ? float((32766 - std::sqrt(double(d)) / 2) / norm) : 0;
}

// The scale of a query of this length; 0 where it is as good as none.
inline float scale_of_query(const float* q, double norm, int64_t d) {
  if (!(norm > 1e-25)) return 0;
  float largest = 0;
  for (int64_t j = 0; j < d; ++j) largest = std::max(largest, std::abs(q[j]));
  return float(std::min((65534 - std::sqrt(double(d)) / 2) / norm, 32766 / double(largest)));
}

// Queries on the left of products.
class Queries {
 public:
  Queries(int64_t count, int64_t d)
      : factors_(count), count_(count), d_(d), row_(2 * pairs(d)), groups_(count * 2 * pairs(d)) {}

  // Sets the r-th; returns |q - qh / s|^2.
  double set(int64_t r, const float* q, double norm) {
    const float scale = scale_of_query(q, norm, d_);
    double residual = norm * norm;
    factors_[r] = scale > 0 ? 1 / double(scale) : 0;
    std::fill(row_.begin(), row_.end(), int16_t(0));
    if (scale > 0) ROBUSTFT_CALL(to_fixed, q, d_, scale, row_.data(), &residual);
    const int64_t first = r / kGroup * kGroup, width = std::min(kGroup, count_ - first);
    int16_t* out = groups_.get() + first * 2 * pairs(d_) + (r - first) * 2;
    for (int64_t p = 0; p < pairs(d_); ++p) std::memcpy(out + p * width * 2, row_.data() + 2 * p, 4);
    return residual;
  }

  // out (count, cols), leading dimension cols: products by the points of these panels.
  void multiply(const int16_t* panels, float scale, int64_t cols, float* out) const {
    std::vector<float> factors(count_);
    for (int64_t r = 0; r < count_; ++r) factors[r] = float(factors_[r] / double(scale));
    const FixedProducts products{groups_.get(), factors.data(), panels, count_, cols, pairs(d_)};
    ROBUSTFT_CALL(fixed_products, products, out, cols);
  }

 private:
  std::vector<double> factors_;  // 1 / s
  const int64_t count_, d_;
  std::vector<int16_t> row_;
  Buffer<int16_t> groups_;
};

// `count` points of a panel, from x (count, d) on.
inline void pack_panel(const float* x, int64_t count, int64_t d, float scale, int16_t* panel, double* residual) {
  std::vector<int16_t> rows(kPanel * 2 * pairs(d));
  for (int64_t i = 0; i < count; ++i) {
    double squared;
    ROBUSTFT_CALL(to_fixed, x + i * d, d, scale, rows.data() + i * 2 * pairs(d), &squared);
    *residual = std::max(*residual, squared);
  }
  for (int64_t p = 0; p < pairs(d); ++p)
    for (int64_t i = 0; i < kPanel; ++i)
      std::memcpy(panel + (p * kPanel + i) * 2, rows.data() + (i * pairs(d) + p) * 2, 4);
}

}  // namespace fixed
}  // namespace robustft
