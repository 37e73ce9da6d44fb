// Loops over a row in vectors, the last of them partial. Included by *_kernels.cpp only, like simd.h.
#pragma once
#include "simd.h"

namespace robustft {
namespace ROBUSTFT_ISA {

// Calls f(first element, lanes in use) for one vector after another of a row of n.
template <class T, class F>
inline void for_each_vector(int64_t n, const F& f) {
  int64_t j = 0;
  for (; j + kLanes<T> <= n; j += kLanes<T>) f(j, kLanes<T>);
  if (j < n) f(j, n - j);
}

template <class V, class P>
inline V load_lanes(const P* p, int64_t lanes, P fill) {
  return lanes * int64_t(sizeof(P)) == ROBUSTFT_VECTOR_BYTES ? load<V>(p) : load_partial<V>(p, lanes, fill);
}

template <class V, class P>
inline void store_lanes(P* p, V v, int64_t lanes) {
  if (lanes * int64_t(sizeof(P)) == ROBUSTFT_VECTOR_BYTES)
    store(p, v);
  else
    store_partial(p, v, lanes);
}

// The largest of m and the n elements of s.
template <class T>
inline T row_max(const T* s, int64_t n, T m) {
  Vec<T> v = Vec<T>{} + m;
  for_each_vector<T>(n, [&](int64_t j, int64_t lanes) { v = max(load_lanes<Vec<T>>(s + j, lanes, m), v); });
  return reduce_max<T>(v);
}

// Where the first of the n elements that equals value stands; 0 if none does (a maximum that is NaN).
template <class T>
inline int64_t first_equal(const T* s, int64_t n, T value) {
  constexpr int64_t kVectors = 8;  // between two looks at the result, which costs more than a comparison
  int64_t j = 0;
  for (; j + kVectors * kLanes<T> <= n; j += kVectors * kLanes<T>) {
    Mask<T> equal{};
    for (int64_t v = 0; v < kVectors; ++v) equal |= load<Vec<T>>(s + j + v * kLanes<T>) == value;
    int64_t words[ROBUSTFT_VECTOR_BYTES / 8], any = 0;
    __builtin_memcpy(words, &equal, sizeof(words));
    for (int64_t word : words) any |= word;
    if (any) break;
  }
  for (; j < n; ++j)
    if (s[j] == value) return j;
  return 0;
}

}  // namespace ROBUSTFT_ISA
}  // namespace robustft
