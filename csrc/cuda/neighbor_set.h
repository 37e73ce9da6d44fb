// Points prepared for neighbour searches on the GPU: what neighbor_pack.cu makes and neighbors.cu reads.
#pragma once
#include <cstdint>

namespace robustft {

constexpr int64_t kMaxNeighborPoints = (int64_t(1) << 31) - (1 << 16);  // tiles may end beyond the last, in 32 bits

// Columns of the filter's rows.
inline int64_t filter_depth(int64_t d) { return (d + 31) / 32 * 32; }

// The elements of `bounds`, as in cpu/neighbors/set.h.
namespace neighbor_bound {
enum : int {
  kNorm,      // max |x - c|; NaN when a point is not finite
  kResidual,  // max |x - c - bf16(x - c)|
  kCentred,   // always 1 here
  kCount
};
}

}  // namespace robustft
