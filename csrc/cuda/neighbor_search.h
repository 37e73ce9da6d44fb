// The steps of a search around the filter's products, one block or one warp a query. neighbors.cu has the mathematics.
#pragma once
#include "neighbor_rows.h"
#include "neighbor_set.h"
#include "select.h"

namespace robustft {
namespace {

constexpr int kFinishThreads = 256, kDirectThreads = 512;

// Device memory of the search of some queries.
struct NeighborSearch {
  const float *queries, *points, *centre;
  const double* bounds;
  int count;  // of queries
  int64_t n, d, depth, k;
  bool squared;
  double gamma, rounding;  // of the error bound
  // By query: bfloat16 row, bound, threshold, hits.
  uint16_t* packed;
  double* eps;  // 0 where the bound would not hold, NaN for a query that is not finite
  float* thresholds;
  int* counts;
  uint64_t* hits;
  int room;
  int *direct_count, *direct;  // queries left for direct distances
  // Results, one of the two: the k-th distance; or the k nearest in no order, as keys (distance, index).
  float* distances;
  uint64_t* nearest;
};

// The greatest float that is not above x.
__device__ inline float below(double x) {
  const float y = float(x);
  return double(y) > x ? nextafterf(y, __int_as_float(int(0xff800000u))) : y;
}

// eps of a query of this norm, rounded to bfloat16 with this residual.
__device__ inline double score_bound(const NeighborSearch& s, double norm, double residual) {
  const double most = s.bounds[neighbor_bound::kNorm], most_residual = s.bounds[neighbor_bound::kResidual];
  const double scale = norm + most, rounded = norm + residual;
  if (!(scale > 1e-10 && scale < 1e15)) return 0;  // squares leave float's range
  return 1.001 * (residual * most + rounded * most_residual + s.gamma * rounded * (most + most_residual) +
                  s.rounding * scale * scale);
}

// Packs the queries, a warp each, and begins their search.
__global__ void __launch_bounds__(kRowThreads) neighbor_begin_kernel(NeighborSearch s) {
  if (blockIdx.x == 0 && threadIdx.x == 0) *s.direct_count = 0;
  const int64_t q = int64_t(blockIdx.x) * kRowWarps + threadIdx.x / kWarp;
  if (q >= s.count) return;
  const PackedNorms norms = pack_row(s.queries + q * s.d, s.centre, s.d, s.depth, s.packed + q * s.depth);
  if (threadIdx.x % kWarp != 0) return;
  const bool finite = norms.squared == norms.squared;
  s.eps[q] = finite ? score_bound(s, sqrt(norms.squared), sqrt(norms.residual)) : norms.squared;
  s.counts[q] = 0;
}

// Guesses thresholds: the `rank`-th largest (from 0) of a query's scores (count, m) of the sample, less 2 eps. Without
// so many of them every point is a hit.
__global__ void __launch_bounds__(kFinishThreads)
    neighbor_guess_kernel(NeighborSearch s, const float* __restrict__ scores, int64_t m, int64_t rank) {
  __shared__ SelectMemory memory;
  const int64_t q = blockIdx.x;
  const double eps = s.eps[q];
  float threshold = __int_as_float(int(0xff800000u));
  if (!(eps > 0)) {
    threshold = -threshold;
  } else if (rank < m) {
    const float* own = scores + q * m;
    const uint32_t key = select<uint32_t>(m, rank, [=](int64_t i) { return key_of(own[i]); }, memory);
    threshold = below(double(number_of(key)) - 2 * eps);
  }
  if (threadIdx.x == 0) s.thresholds[q] = threshold;
}

// |query - x|^2 by differences in double: nothing cancels. One order of addition for every use, so that the same pair
// always has the same distance. The whole warp calls.
__device__ inline double squared_distance(const float* query, const float* x, int64_t d) {
  double sum = 0;
#pragma unroll 4
  for (int64_t j = int(threadIdx.x) % kWarp; j < d; j += kWarp) {
    const double e = double(query[j]) - double(x[j]);
    sum = fma(e, e, sum);
  }
  return warp_sum(sum);
}

__device__ inline uint32_t distance_key(const NeighborSearch& s, int64_t query, int64_t point) {
  const double squared = squared_distance(s.queries + query * s.d, s.points + point * s.d, s.d);
  return key_of(float(s.squared ? squared : sqrt(squared)));
}

// Writes a query's result: the distance of rank `rank` (from 0) of key(0) ... key(count - 1), or the keys up to there.
// The whole block calls.
template <class KeyAt>
__device__ void write_result(const NeighborSearch& s, int64_t query, int64_t count, int64_t rank, const KeyAt& key,
                             SelectMemory& memory) {
  if (!s.nearest) {
    const auto inverted = [=](int64_t i) { return ~uint32_t(key(i) >> 32); };  // select counts from the largest
    const uint32_t distance = ~select<uint32_t>(count, rank, inverted, memory);
    if (threadIdx.x == 0) s.distances[query] = number_of(distance);
    return;
  }
  __shared__ int places;
  const uint64_t last = ~select<uint64_t>(count, rank, [=](int64_t i) { return ~key(i); }, memory);
  if (threadIdx.x == 0) places = 0;
  __syncthreads();
  for (int64_t i = threadIdx.x; i < count; i += blockDim.x)
    if (key(i) <= last) s.nearest[query * s.k + atomicAdd(&places, 1)] = key(i);
}

// Finishes a query from its hits, or leaves it for direct distances.
__global__ void __launch_bounds__(kFinishThreads) neighbor_finish_kernel(NeighborSearch s) {
  __shared__ SelectMemory memory;
  __shared__ int certain, band;
  const int64_t q = blockIdx.x;
  uint64_t* hits = s.hits + q * s.room;
  const int count = s.counts[q];
  const double eps = s.eps[q];
  bool open = !(eps > 0) || count < s.k || count > s.room;
  double low = 0, high = 0;
  if (!open) {
    const auto score = [=](int64_t i) { return uint32_t(hits[i] >> 32); };
    const double kth = double(number_of(select<uint32_t>(count, s.k - 1, score, memory)));
    low = kth - 2 * eps;
    high = kth + 2 * eps;
    open = low < double(s.thresholds[q]);
  }
  if (open) {
    if (threadIdx.x == 0) s.direct[atomicAdd(s.direct_count, 1)] = int(q);
    return;
  }
  if (threadIdx.x == 0) certain = band = 0;
  for (int begin = 0; begin < count; begin += kFinishThreads) {
    const int i = begin + int(threadIdx.x);
    const uint64_t hit = i < count ? hits[i] : 0;
    const double score = double(number_of(uint32_t(hit >> 32)));
    __syncthreads();  // these hits are read: the band may take their places
    if (i >= count) continue;
    if (!s.nearest && score > high)
      atomicAdd(&certain, 1);
    else if (score >= low)
      hits[atomicAdd(&band, 1)] = hit;
  }
  __syncthreads();
  for (int i = int(threadIdx.x) / kWarp; i < band; i += kFinishThreads / kWarp) {
    const uint64_t point = hits[i] & 0xffffffffu;
    const uint64_t key = uint64_t(distance_key(s, q, int64_t(point))) << 32 | point;
    __syncwarp();
    if (threadIdx.x % kWarp == 0) hits[i] = key;
  }
  __syncthreads();
  write_result(s, q, band, s.k - 1 - certain, [=](int64_t i) { return hits[i]; }, memory);
}

// The queries that are left, by their distances to all points, n keys of memory a block.
__global__ void __launch_bounds__(kDirectThreads) neighbor_direct_kernel(NeighborSearch s, uint32_t* keys) {
  __shared__ SelectMemory memory;
  uint32_t* own = keys + int64_t(blockIdx.x) * s.n;
  const int left = *s.direct_count;
  for (int i = int(blockIdx.x); i < left; i += int(gridDim.x)) {
    const int64_t q = s.direct[i];
    const bool finite = s.eps[q] == s.eps[q];
    for (int64_t point = threadIdx.x / kWarp; point < s.n; point += kDirectThreads / kWarp) {
      const uint32_t key = distance_key(s, q, point);
      if (threadIdx.x % kWarp == 0) own[point] = finite ? key : ~0u;
    }
    __syncthreads();
    write_result(s, q, s.n, s.k - 1, [=](int64_t j) { return uint64_t(own[j]) << 32 | uint64_t(j); }, memory);
    __syncthreads();
  }
}

// Distances and indices of sorted keys.
__global__ void __launch_bounds__(kRowThreads)
    neighbor_decode_kernel(const uint64_t* __restrict__ keys, int64_t n, float* __restrict__ distances,
                           int64_t* __restrict__ indices) {
  const int64_t i = int64_t(blockIdx.x) * kRowThreads + threadIdx.x;
  if (i >= n) return;
  distances[i] = number_of(uint32_t(keys[i] >> 32));
  indices[i] = int64_t(keys[i] & 0xffffffffu);
}

}  // namespace
}  // namespace robustft
