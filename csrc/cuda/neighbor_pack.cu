// Prepares points for neighbour searches on the GPU: the outputs of cpu/neighbors/pack.cpp, but that
//
//   filter   holds x - c in bfloat16 row by row, each filled up with 0 to a multiple of 32: what neighbor_filter.h
//   reads float32  is the only type: searches of float64 points go through torch
//
// Four launches, the points read once, nothing waits for the host. Memory: 2 n d bytes for the filter, 4 n for the
// bias.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <tuple>

#include "neighbor_rows.h"
#include "neighbor_set.h"

namespace robustft {
namespace {

constexpr int kCentreRows = 4096, kCentreColumns = 32, kCentreGroups = 32;

// The i-th of m sampled rows: one of each m-th part of the n, at a pseudo-random place within it.
__device__ int64_t sampled_row(int64_t i, int64_t m, int64_t n) {
  uint64_t z = uint64_t(i + 1) * 0x9E3779B97F4A7C15u;  // splitmix64
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
  return (i * n + int64_t((z ^ (z >> 31)) % uint64_t(n))) / m;
}

// centre (d) = the mean of m sampled rows. A block takes 32 columns; each of its 32 warps adds every 32nd row.
__global__ void __launch_bounds__(kCentreColumns* kCentreGroups)
    neighbor_centre_kernel(const float* __restrict__ points, int64_t n, int64_t d, int64_t m,
                           float* __restrict__ centre) {
  __shared__ double sums[kCentreGroups][kCentreColumns];
  const int lane = int(threadIdx.x) % kCentreColumns, group = int(threadIdx.x) / kCentreColumns;
  const int64_t column = int64_t(blockIdx.x) * kCentreColumns + lane;
  double sum = 0;
  if (column < d)
    for (int64_t i = group; i < m; i += kCentreGroups) sum += double(points[sampled_row(i, m, n) * d + column]);
  sums[group][lane] = sum;
  __syncthreads();
  if (group != 0 || column >= d) return;
  for (int g = 1; g < kCentreGroups; ++g) sum += sums[g][lane];
  centre[column] = float(sum / double(m));
}

__global__ void neighbor_sample_kernel(const float* __restrict__ points, const float* __restrict__ centre, int64_t n,
                                       int64_t d, int64_t m, float* __restrict__ sample) {
  const int64_t row = sampled_row(blockIdx.x, m, n);
  for (int64_t j = threadIdx.x; j < d; j += blockDim.x)
    sample[int64_t(blockIdx.x) * d + j] = points[row * d + j] - centre[j];
}

__global__ void neighbor_bounds_kernel(const unsigned long long* __restrict__ largest, double* __restrict__ bounds) {
  bounds[neighbor_bound::kNorm] = sqrt(__longlong_as_double(static_cast<long long>(largest[0])));
  bounds[neighbor_bound::kResidual] = sqrt(__longlong_as_double(static_cast<long long>(largest[1])));
  bounds[neighbor_bound::kCentred] = 1;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> neighbor_pack(const Tensor& input, int64_t samples, bool) {
  STD_TORCH_CHECK(input.dim() == 2 && input.size(0) > 0 && input.size(1) > 0,
                  "neighbor_pack: points must be (n, d), n and d at least 1");
  STD_TORCH_CHECK(input.scalar_type() != ScalarType::Double, "neighbor_pack: float64 points are searched without it");
  STD_TORCH_CHECK(input.size(0) <= kMaxNeighborPoints, "neighbor_pack: more than 2^31 - 2^16 points");
  STD_TORCH_CHECK(samples >= 0, "neighbor_pack: samples must not be negative");
  const Tensor points = contiguous_as(input, ScalarType::Float);
  const int64_t n = points.size(0), d = points.size(1), m = std::min(samples, n), depth = filter_depth(d);
  Tensor centre = torch::stable::new_empty(points, {d}), bias = torch::stable::new_empty(points, {n});
  Tensor filter = torch::stable::new_empty(points, {n * depth}, ScalarType::Short);
  Tensor sample = torch::stable::new_empty(points, {m, d});
  Tensor bounds = torch::stable::new_empty(points, {neighbor_bound::kCount}, ScalarType::Double);
  Tensor largest = torch::stable::new_zeros(points, {2}, ScalarType::Long);

  const OnDevice device(points);
  const float* x = points.const_data_ptr<float>();
  float* c = centre.mutable_data_ptr<float>();
  auto* most = reinterpret_cast<unsigned long long*>(largest.mutable_data_ptr<int64_t>());
  device.launch(neighbor_centre_kernel, (d + kCentreColumns - 1) / kCentreColumns, kCentreColumns * kCentreGroups, 0, x,
                n, d, std::min<int64_t>(n, kCentreRows), c);
  device.launch(neighbor_pack_rows_kernel, std::min((n + kRowWarps - 1) / kRowWarps, 16 * device.processors()),
                kRowThreads, 0, x, c, n, d, depth, reinterpret_cast<uint16_t*>(filter.mutable_data_ptr<int16_t>()),
                bias.mutable_data_ptr<float>(), most);
  device.launch(neighbor_bounds_kernel, 1, 1, 0, most, bounds.mutable_data_ptr<double>());
  device.launch(neighbor_sample_kernel, m, kRowThreads, 0, x, c, n, d, m, sample.mutable_data_ptr<float>());
  return {centre, bias, filter, sample, bounds};
}

}  // namespace
}  // namespace robustft

STABLE_TORCH_LIBRARY_IMPL(robustft, CUDA, m) { m.impl("neighbor_pack", TORCH_BOX(&robustft::neighbor_pack)); }
