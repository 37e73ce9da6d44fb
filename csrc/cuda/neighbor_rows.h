// Rows as the filter reads them: less the centre, rounded to bfloat16, filled up with 0; and what rounding left.
#pragma once
#include "device.h"

namespace robustft {

namespace {  // kernels belong to the file that launches them

constexpr int kRowThreads = 256, kRowWarps = kRowThreads / kWarp;  // kernels in which a warp takes a row

// |v|^2 and |v - bf16(v)|^2 of v = x - c, exact but for rounding to double; NaN where the row is not finite.
struct PackedNorms {
  double squared, residual;
};

// bfloat16, to the nearest, ties to even.
__device__ inline uint16_t to_bf16(float x) {
  const uint32_t bits = __float_as_uint(x);
  return uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// Packs a row of d numbers to depth of them; c may be null. The whole warp calls, and every lane gets the norms.
__device__ inline PackedNorms pack_row(const float* x, const float* c, int64_t d, int64_t depth, uint16_t* out) {
  PackedNorms norms{0, 0};
  float finite = 0;  // stays 0 unless the row holds NaN or infinity
  for (int64_t j = int(threadIdx.x) % kWarp; j < depth; j += kWarp) {
    const float v = j < d ? x[j] - (c ? c[j] : 0.0f) : 0.0f;
    const uint16_t rounded = to_bf16(v);
    const double residual = double(v - __uint_as_float(uint32_t(rounded) << 16));
    finite += v * 0.0f;
    norms.squared += double(v) * double(v);
    norms.residual += residual * residual;
    out[j] = rounded;
  }
  return {warp_sum(norms.squared + double(finite)), warp_sum(norms.residual + double(finite))};
}

// Packs rows (n, d) to (n, depth). bias (n) = |v|^2 / 2. largest (2), unless null: the greatest squared norm and
// residual so far, as bits, whose order as integers is that of the numbers, NaN above all.
__global__ void __launch_bounds__(kRowThreads)
    neighbor_pack_rows_kernel(const float* __restrict__ rows, const float* __restrict__ centre, int64_t n, int64_t d,
                              int64_t depth, uint16_t* __restrict__ packed, float* __restrict__ bias,
                              unsigned long long* __restrict__ largest) {
  unsigned long long most[2] = {0, 0};
  const int64_t step = int64_t(gridDim.x) * kRowWarps;
  for (int64_t i = int64_t(blockIdx.x) * kRowWarps + threadIdx.x / kWarp; i < n; i += step) {
    const PackedNorms norms = pack_row(rows + i * d, centre, d, depth, packed + i * depth);
    if (threadIdx.x % kWarp == 0) bias[i] = float(norms.squared / 2);
    const double both[2] = {norms.squared, norms.residual};
    for (int e = 0; e < 2; ++e) {
      const auto bits = static_cast<unsigned long long>(__double_as_longlong(fabs(both[e])));
      most[e] = bits > most[e] ? bits : most[e];
    }
  }
  if (!largest || threadIdx.x % kWarp != 0) return;
  for (int e = 0; e < 2; ++e) atomicMax(&largest[e], most[e]);
}

}  // namespace
}  // namespace robustft
