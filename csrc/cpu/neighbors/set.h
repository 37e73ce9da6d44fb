// A set of points prepared for neighbour searches: what neighbor_pack makes and the searches read.
#pragma once
#include "../tile.h"

namespace robustft {

// bfloat16 on the matrix unit where there is one: the search is exact under either, see neighbors.cpp.
template <class T>
Arithmetic neighbor_arithmetic() {
  return scalar_type<T>() == ScalarType::Float && amx::available() ? Arithmetic::bf16 : Arithmetic::ieee;
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
  kResidual,  // max |x - c - bf16(x - c)|, 0 for ieee
  kCentred,   // 1 when c is subtracted from points and queries, else 0
  kCount
};
}

template <class T>
struct PointSet {
  Tensor points, centre, bias, filter, sample;
  int64_t n, d, samples;
  Arithmetic arithmetic;
  bool centred;
  double norm, residual;
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
        arithmetic(filter.numel() ? Arithmetic::bf16 : Arithmetic::ieee),
        columns(this->points.template const_data_ptr<T>(), n, d, packed()) {
    const Tensor in_double = contiguous_as(bounds, ScalarType::Double);
    const double* bound = in_double.const_data_ptr<double>();
    norm = bound[neighbor_bound::kNorm];
    residual = bound[neighbor_bound::kResidual];
    centred = bound[neighbor_bound::kCentred] != 0;
  }

  const T* row(int64_t i) const { return points.const_data_ptr<T>() + i * d; }
  const T* centre_or_null() const { return centred ? centre.const_data_ptr<T>() : nullptr; }
  bool finite() const { return norm == norm; }

 private:
  const uint16_t* packed() const {
    return filter.numel() ? reinterpret_cast<const uint16_t*>(filter.const_data_ptr<int16_t>()) : nullptr;
  }
};

}  // namespace robustft
