// A set of points prepared for neighbour searches: what neighbor_pack makes and the searches read.
#pragma once
#include "fixed.h"

namespace robustft {

// What the filter multiplies. The search is exact under any, see neighbors.cpp.
enum class FilterForm {
  points,  // the points themselves
  bf16,    // bfloat16, where the processor multiplies it
  fixed    // 16-bit fixed point
};

// The numbers of a filter of n points.
inline int64_t filter_size(FilterForm form, int64_t n, int64_t d) {
  const int64_t panels = (n + 15) / 16;
  switch (form) {
    case FilterForm::bf16: return panels * bf16::depth_tiles(d) * bf16::kTile;
    case FilterForm::fixed: return panels * fixed::panel_size(d);
    default: return 0;
  }
}

// The i-th of m sampled rows: one of each m-th part of the n, at a pseudo-random place within it. Sorted data are
// sampled evenly so, and no period in them can be met.
inline int64_t sample_row(int64_t i, int64_t m, int64_t n) {
  uint64_t z = uint64_t(i + 1) * 0x9E3779B97F4A7C15u;  // splitmix64
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
  const double place = double((z ^ (z >> 31)) >> 11) * 0x1p-53;
  return std::min(n - 1, int64_t((double(i) + place) * double(n) / double(m)));
}

// The elements of `bounds`.
namespace neighbor_bound {
enum : int64_t {
  kNorm,      // max |x - c|; NaN when a point is not finite
  kResidual,  // max |x - c - xh|, xh what the filter has of x - c
  kCentred,   // 1 when c is subtracted from points and queries, else 0
  kCount
};
}

template <class T>
struct PointSet {
  Tensor points, centre, bias, filter, sample;
  int64_t n, d, samples;
  FilterForm form;
  Arithmetic arithmetic;  // of products that are not in fixed point
  bool centred;
  double norm, residual;
  float scale;             // of points in fixed point
  RightMatrix<T> columns;  // points, or for bf16 what is packed of them

  PointSet(const Tensor& points, const Tensor& centre, const Tensor& bias, const Tensor& filter, const Tensor& sample,
           const Tensor& bounds)
      : points(contiguous_as(points, scalar_type<T>())),
        centre(contiguous_as(centre, scalar_type<T>())),
        bias(contiguous_as(bias, scalar_type<T>())),
        filter(torch::stable::contiguous(filter)),
        sample(contiguous_as(sample, scalar_type<T>())),
        n(points.size(0)),
        d(points.size(1)),
        samples(sample.size(0)),
        form(!filter.numel()     ? FilterForm::points
             : bf16::available() ? FilterForm::bf16
                                 : FilterForm::fixed),
        arithmetic(form == FilterForm::bf16 ? Arithmetic::bf16 : Arithmetic::ieee),
        columns(this->points.template const_data_ptr<T>(), n, d, packed()) {
    const Tensor in_double = contiguous_as(bounds, ScalarType::Double);
    const double* bound = in_double.const_data_ptr<double>();
    norm = bound[neighbor_bound::kNorm];
    residual = bound[neighbor_bound::kResidual];
    centred = bound[neighbor_bound::kCentred] != 0;
    scale = fixed::scale_of_points(norm, d);
  }

  const T* row(int64_t i) const { return points.const_data_ptr<T>() + i * d; }
  const T* centre_or_null() const { return centred ? centre.const_data_ptr<T>() : nullptr; }
  bool finite() const { return norm == norm; }
  const int16_t* panels(int64_t i) const {
    return filter.const_data_ptr<int16_t>() + i / kPanel * fixed::panel_size(d);
  }

 private:
  const uint16_t* packed() const {
    return form == FilterForm::bf16 ? reinterpret_cast<const uint16_t*>(filter.const_data_ptr<int16_t>()) : nullptr;
  }
};

}  // namespace robustft
