// Prepares points for neighbour searches (neighbors.cpp): reads them once, writes
//
//   centre (d)    c, the mean of a sample. Distances do not change when c is subtracted from everything, but the norms
//                 shrink, and with them the error bounds of the search
//   bias (n)      |x - c|^2 / 2
//   filter        x - c in bfloat16, in column form (bf16.h); or in fixed point, in panels (fixed.h), where that is
//                 asked for and pays; or empty: the points serve themselves
//   sample (m, d) m of the rows x - c, from which searches guess where to start
//   bounds        neighbor_bound in set.h
//
// Fixed point reads them twice: its scale follows from the largest norm.
//
// Memory: 4 (or 8) n bytes for the bias, 2 n d for a filter, the sample; 1 MB of workspace a thread.
#include <cmath>
#include <limits>
#include <numeric>
#include <tuple>
#include <vector>

#include "../dispatch.h"
#include "neighbors.h"
#include "set.h"

namespace robustft {
namespace {

constexpr int64_t kCentreRows = 4096;
constexpr int64_t kPiece = 256;  // rows packed at once, a multiple of 16

template <class T>
void sampled_mean(const T* x, int64_t n, int64_t d, T* mean) {
  const int64_t m = std::min(n, kCentreRows);
  std::vector<double> sums(d);
  for (int64_t i = 0; i < m; ++i) {
    const T* row = x + sample_row(i, m, n) * d;
    for (int64_t j = 0; j < d; ++j) sums[j] += row[j];
  }
  for (int64_t j = 0; j < d; ++j) mean[j] = T(sums[j] / double(m));
}

// Whether subtracting the mean from what stays unpacked is worth its time: when it shortens most vectors tenfold.
template <class T>
bool worth_centring(const T* x, const T* mean, int64_t n, int64_t d) {
  const int64_t m = std::min(n, kCentreRows);
  std::vector<T> centred(d);
  double before = 0, after = 0;
  for (int64_t i = 0; i < m; ++i) {
    RowNorms norms;
    const T* row = x + sample_row(i, m, n) * d;
    ROBUSTFT_CALL(centre_row<T>, row, nullptr, d, false, nullptr, &norms);
    before += norms.squared;
    ROBUSTFT_CALL(centre_row<T>, row, mean, d, false, centred.data(), &norms);
    after += norms.squared;
  }
  return after < 0.01 * before;
}

// The larger of two maxima; NaN if one is.
RowNorms larger(const RowNorms& a, const RowNorms& b) {
  return {a.squared > b.squared || a.squared != a.squared ? a.squared : b.squared, std::max(a.residual, b.residual)};
}

// Calls f(first row, rows, the maxima of these) for one piece of n rows after another, on all threads; what they come
// to.
template <class F>
RowNorms over_pieces(int64_t n, const F& f) {
  const int64_t pieces = (n + kPiece - 1) / kPiece;
  std::vector<RowNorms> largest(pieces, RowNorms{0, 0});
  torch::stable::parallel_for(0, pieces, 8, [&](int64_t first, int64_t last) {
    for (int64_t p = first; p < last; ++p) f(p * kPiece, std::min(kPiece, n - p * kPiece), largest[p]);
  });
  return std::accumulate(largest.begin(), largest.end(), RowNorms{0, 0}, larger);
}

// The points in fixed point; the largest |x - c - xh|^2.
double pack_fixed(const float* x, const float* c, int64_t n, int64_t d, float scale, int16_t* packed) {
  return over_pieces(n,
                     [&](int64_t begin, int64_t count, RowNorms& most) {
                       const Buffer<float> rows(kPanel * d);
                       for (int64_t i = begin; i < begin + count; i += kPanel) {
                         const int64_t of_panel = std::min(kPanel, begin + count - i);
                         for (int64_t r = 0; r < of_panel; ++r) {
                           RowNorms norms;
                           ROBUSTFT_CALL(centre_row<float>, x + (i + r) * d, c, d, false, rows.get() + r * d, &norms);
                         }
                         fixed::pack_panel(rows.get(), of_panel, d, scale, packed + i / kPanel * fixed::panel_size(d),
                                           &most.residual);
                       }
                     })
      .residual;
}

template <class T>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> pack(const Tensor& input, int64_t samples, bool filtering) {
  const Tensor points = contiguous_as(input, scalar_type<T>());
  const int64_t n = points.size(0), d = points.size(1), m = std::min(samples, n);
  const T* x = points.const_data_ptr<T>();
  constexpr bool is_float = std::is_same_v<T, float>;
  const bool bf16 = is_float && bf16::available();
  const bool fixed_point = is_float && filtering && fixed::pays(d);
  Tensor centre = torch::stable::new_empty(points, {d}), bias = torch::stable::new_empty(points, {n});
  Tensor filter = torch::stable::new_empty(points, {bf16 ? filter_size(FilterForm::bf16, n, d) : 0}, ScalarType::Short);
  Tensor sample = torch::stable::new_empty(points, {m, d});
  Tensor bounds = torch::stable::new_empty(points, {neighbor_bound::kCount}, ScalarType::Double);

  T* c = centre.mutable_data_ptr<T>();
  sampled_mean(x, n, d, c);
  const bool centred = bf16 || fixed_point || worth_centring(x, c, n, d);
  T* half = bias.mutable_data_ptr<T>();
  uint16_t* packed = reinterpret_cast<uint16_t*>(filter.mutable_data_ptr<int16_t>());
  RowNorms most = over_pieces(n, [&](int64_t begin, int64_t count, RowNorms& of_piece) {
    const Buffer<T> rows(!centred ? 0 : bf16 ? kPiece * d : d);
    for (int64_t i = 0; i < count; ++i) {
      RowNorms norms;
      ROBUSTFT_CALL(centre_row<T>, x + (begin + i) * d, centred ? c : nullptr, d, bf16, rows.get() + (bf16 ? i * d : 0),
                    &norms);
      half[begin + i] = T(norms.squared / 2);
      of_piece = larger(norms, of_piece);
    }
    if (bf16)
      bf16::pack_rows_as_columns(reinterpret_cast<const float*>(rows.get()), d, count, d, 0, (count + 15) / 16,
                                 packed + begin / 16 * bf16::depth_tiles(d) * bf16::kTile, nullptr);
  });
  const double norm = std::sqrt(most.squared);
  if constexpr (is_float) {
    const float scale = fixed::scale_of_points(norm, d);
    if (fixed_point && scale > 0) {
      filter = torch::stable::new_empty(points, {filter_size(FilterForm::fixed, n, d)}, ScalarType::Short);
      most.residual = pack_fixed(x, c, n, d, scale, filter.mutable_data_ptr<int16_t>());
    }
  }
  for (int64_t i = 0; i < m; ++i) {
    RowNorms norms;
    const T* row = x + sample_row(i, m, n) * d;
    T* out = sample.mutable_data_ptr<T>() + i * d;
    if (centred) {
      ROBUSTFT_CALL(centre_row<T>, row, c, d, false, out, &norms);
    } else {
      std::copy(row, row + d, out);
    }
  }
  double* bound = bounds.mutable_data_ptr<double>();
  bound[neighbor_bound::kNorm] = norm;
  bound[neighbor_bound::kResidual] = std::sqrt(most.residual);
  bound[neighbor_bound::kCentred] = centred;
  return {centre, bias, filter, sample, bounds};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> neighbor_pack(const Tensor& points, int64_t samples, bool filter) {
  STD_TORCH_CHECK(points.dim() == 2 && points.size(0) > 0 && points.size(1) > 0,
                  "neighbor_pack: points must be (n, d), n and d at least 1");
  STD_TORCH_CHECK(points.size(0) <= std::numeric_limits<int32_t>::max(), "neighbor_pack: more than 2^31 - 1 points");
  STD_TORCH_CHECK(samples >= 0, "neighbor_pack: samples must not be negative");
  return points.scalar_type() == ScalarType::Double ? pack<double>(points, samples, filter)
                                                    : pack<float>(points, samples, filter);
}

}  // namespace
}  // namespace robustft

STABLE_TORCH_LIBRARY_IMPL(robustft, CPU, m) { m.impl("neighbor_pack", TORCH_BOX(&robustft::neighbor_pack)); }
