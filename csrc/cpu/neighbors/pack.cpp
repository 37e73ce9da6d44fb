// Prepares points for neighbour searches (neighbors.cpp): reads them once, writes
//
//   centre (d)    c, the mean of a sample. Distances do not change when c is subtracted from everything, but the norms
//                 shrink, and with them the error bounds of the search
//   bias (n)      |x - c|^2 / 2
//   filter        bf16: x - c in bfloat16, in the matrix unit's column form; ieee: empty, the points serve themselves
//   sample (m, d) m of the rows x - c, from which searches guess where to start
//   bounds        neighbor_bound in set.h
//
// Memory: 4 (or 8) n bytes for the bias, 2 n d for bf16's filter, the sample; 1 MB of workspace a thread.
#include <cmath>
#include <limits>
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

template <class T>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> pack(const Tensor& input, int64_t samples) {
  const Tensor points = contiguous_as(input, scalar_type<T>());
  const int64_t n = points.size(0), d = points.size(1), m = std::min(samples, n);
  const T* x = points.const_data_ptr<T>();
  const bool bf16 = neighbor_arithmetic<T>() == Arithmetic::bf16;
  const int64_t block = amx::depth_tiles(d) * amx::kTile;
  Tensor centre = torch::stable::new_empty(points, {d}), bias = torch::stable::new_empty(points, {n});
  Tensor filter = torch::stable::new_empty(points, {bf16 ? (n + 15) / 16 * block : 0}, ScalarType::Short);
  Tensor sample = torch::stable::new_empty(points, {m, d});
  Tensor bounds = torch::stable::new_empty(points, {neighbor_bound::kCount}, ScalarType::Double);

  T* c = centre.mutable_data_ptr<T>();
  sampled_mean(x, n, d, c);
  const bool centred = bf16 || worth_centring(x, c, n, d);
  T* half = bias.mutable_data_ptr<T>();
  uint16_t* packed = reinterpret_cast<uint16_t*>(filter.mutable_data_ptr<int16_t>());
  const int64_t pieces = (n + kPiece - 1) / kPiece;
  std::vector<RowNorms> largest(pieces, RowNorms{0, 0});
  torch::stable::parallel_for(0, pieces, 8, [&](int64_t first, int64_t last) {
    const Buffer<T> rows(centred ? kPiece * d : 0);
    for (int64_t p = first; p < last; ++p) {
      const int64_t begin = p * kPiece, count = std::min(kPiece, n - begin);
      RowNorms& most = largest[p];
      for (int64_t i = 0; i < count; ++i) {
        RowNorms norms;
        ROBUSTFT_CALL(centre_row<T>, x + (begin + i) * d, centred ? c : nullptr, d, bf16, rows.get() + i * d, &norms);
        half[begin + i] = T(norms.squared / 2);
        most.squared = norms.squared > most.squared || norms.squared != norms.squared ? norms.squared : most.squared;
        most.residual = std::max(most.residual, norms.residual);
      }
      if (bf16)
        amx::pack_rows_as_columns(reinterpret_cast<const float*>(rows.get()), d, count, d, 0, (count + 15) / 16,
                                  packed + begin / 16 * block, nullptr);
    }
  });
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
  double squared = 0, residual = 0;
  for (const RowNorms& most : largest) {
    squared = most.squared > squared || most.squared != most.squared ? most.squared : squared;
    residual = std::max(residual, most.residual);
  }
  double* bound = bounds.mutable_data_ptr<double>();
  bound[neighbor_bound::kNorm] = std::sqrt(squared);
  bound[neighbor_bound::kResidual] = std::sqrt(residual);
  bound[neighbor_bound::kCentred] = centred;
  return {centre, bias, filter, sample, bounds};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> neighbor_pack(const Tensor& points, int64_t samples) {
  STD_TORCH_CHECK(points.dim() == 2 && points.size(0) > 0 && points.size(1) > 0,
                  "neighbor_pack: points must be (n, d), n and d at least 1");
  STD_TORCH_CHECK(points.size(0) <= std::numeric_limits<int32_t>::max(), "neighbor_pack: more than 2^31 - 1 points");
  STD_TORCH_CHECK(samples >= 0, "neighbor_pack: samples must not be negative");
  return points.scalar_type() == ScalarType::Double ? pack<double>(points, samples) : pack<float>(points, samples);
}

}  // namespace
}  // namespace robustft

STABLE_TORCH_LIBRARY_IMPL(robustft, CPU, m) { m.impl("neighbor_pack", TORCH_BOX(&robustft::neighbor_pack)); }
