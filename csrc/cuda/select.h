// Selection by rank within a block: the integer of a given rank among n, 8 bits at a time.
//
// Histograms of integers do not depend on the order of counting, so results repeat. Every thread of the block calls,
// and gets the same answer.
#pragma once
#include <cstring>

#include "device.h"

namespace robustft {

// Unsigned integers in the order of numbers; 0 and -0 are equal, all NaN are equal and above infinity.
__device__ inline uint32_t key_of(float x) {
  constexpr uint32_t kSign = 1u << 31;
  const uint32_t bits = __float_as_uint(x + 0.0f);  // -0 + 0 = 0
  return x == x ? bits ^ (bits & kSign ? ~0u : kSign) : ~0u;
}
__device__ inline uint64_t key_of(double x) {
  constexpr uint64_t kSign = uint64_t(1) << 63;
  const uint64_t bits = uint64_t(__double_as_longlong(x + 0.0));
  return x == x ? bits ^ (bits & kSign ? ~uint64_t(0) : kSign) : ~uint64_t(0);
}

// The number of a key.
__device__ inline float number_of(uint32_t key) {
  constexpr uint32_t kSign = 1u << 31;
  return __uint_as_float(key & kSign ? key ^ kSign : ~key);
}
__device__ inline double number_of(uint64_t key) {
  constexpr uint64_t kSign = uint64_t(1) << 63;
  return __longlong_as_double((long long)(key & kSign ? key ^ kSign : ~key));
}

constexpr int kDigits = 256;

struct SelectMemory {
  unsigned counts[kDigits];
  int digit;
  int64_t rank;
};

// Adds 1 to counts[digit] for every lane that has a digit, not -1. Lanes that share one add together: losses and scores
// share their first bits. The whole warp calls.
__device__ inline void count_digit(unsigned* counts, int digit) {
  const unsigned peers = __match_any_sync(kWholeWarp, digit);
  const int leader = __ffs(int(peers)) - 1;
  if (digit >= 0 && int(threadIdx.x) % kWarp == leader) atomicAdd(&counts[digit], unsigned(__popc(peers)));
}

// In warp 0: the digit that holds the `rank`-th largest, and its rank among those of that digit.
__device__ inline void find_digit(SelectMemory& memory, int64_t rank) {
  constexpr int kEach = kDigits / kWarp;
  const int lane = int(threadIdx.x), first = kDigits - 1 - lane * kEach;  // lane 0 has the largest digits
  int64_t own = 0;
  for (int i = 0; i < kEach; ++i) own += memory.counts[first - i];
  int64_t through = own;
  for (int step = 1; step < kWarp; step *= 2) {
    const int64_t before = __shfl_up_sync(kWholeWarp, through, step);
    through += lane >= step ? before : 0;
  }
  int64_t left = rank - (through - own);
  if (left < 0 || left >= own) return;
  int digit = first;
  for (; left >= memory.counts[digit]; --digit) left -= memory.counts[digit];
  memory.digit = digit;
  memory.rank = left;
}

// The key of rank `rank`, from 0 for the largest, of key(0) ... key(n - 1); 0 <= rank < n < 2^31.
template <class Key, class KeyAt>
__device__ Key select(int64_t n, int64_t rank, const KeyAt& key, SelectMemory& memory) {
  const int64_t rounded = (n + kWarp - 1) / kWarp * kWarp;
  Key prefix = 0;
  for (int shift = 8 * int(sizeof(Key)) - 8; shift >= 0; shift -= 8) {
    for (int i = int(threadIdx.x); i < kDigits; i += int(blockDim.x)) memory.counts[i] = 0;
    __syncthreads();
    for (int64_t i = threadIdx.x; i < rounded; i += blockDim.x) {
      const Key k = i < n ? key(i) : Key(0);
      // The digits above this one; for the first there are none, and a shift by the whole width is undefined.
      const bool candidate = i < n && (k >> shift >> 8) == prefix >> shift >> 8;
      count_digit(memory.counts, candidate ? int((k >> shift) & 255) : -1);
    }
    __syncthreads();
    if (threadIdx.x < kWarp) find_digit(memory, rank);
    __syncthreads();
    prefix |= Key(memory.digit) << shift;
    rank = memory.rank;
  }
  return prefix;
}

}  // namespace robustft
