// Vectors of T as wide as the instruction set this file is compiled for, and exp on them.
//
// Included only by *_kernels.cpp, which CMake compiles once per instruction set with ROBUSTFT_ISA (a namespace) and
// ROBUSTFT_VECTOR_BYTES set. Those files must not call inline functions of the standard library: the linker keeps one
// copy of each, and it could be the AVX-512 one. GCC's and Clang's vector extension is used instead of intrinsics so
// that one text serves every width, on any processor.
#pragma once
#include <cstdint>

namespace robustft {
namespace ROBUSTFT_ISA {

template <class T>
struct Lanes;
template <>
struct Lanes<float> {
  typedef float Vec __attribute__((vector_size(ROBUSTFT_VECTOR_BYTES)));
  typedef int32_t Mask __attribute__((vector_size(ROBUSTFT_VECTOR_BYTES)));
};
template <>
struct Lanes<double> {
  typedef double Vec __attribute__((vector_size(ROBUSTFT_VECTOR_BYTES)));
  typedef int64_t Mask __attribute__((vector_size(ROBUSTFT_VECTOR_BYTES)));
};

template <class T>
using Vec = typename Lanes<T>::Vec;
template <class T>
using Mask = typename Lanes<T>::Mask;  // also the vector type of labels: an integer as wide as T

template <class T>
constexpr int64_t kLanes = ROBUSTFT_VECTOR_BYTES / sizeof(T);

template <class V, class P>
inline V load(const P* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof(V));
  return v;
}

// The first n lanes from memory, the others `fill`: memory past the end is never read.
template <class V, class P>
inline V load_partial(const P* p, int64_t n, P fill) {
  V v = V{} + fill;
  __builtin_memcpy(&v, p, n * sizeof(P));
  return v;
}

template <class V, class P>
inline void store(P* p, V v) {
  __builtin_memcpy(p, &v, sizeof(V));
}

template <class V, class P>
inline void store_partial(P* p, V v, int64_t n) {
  __builtin_memcpy(p, &v, n * sizeof(P));
}

// A NaN in either argument survives: maxima must not hide one.
template <class V>
inline V max(V a, V b) {
  return (a > b) | (a != a) ? a : b;
}

template <class T>
inline T reduce_max(Vec<T> v) {
  T m = v[0];
  for (int64_t l = 1; l < kLanes<T>; ++l) m = (m > v[l] || m != m) ? m : v[l];
  return m;
}

template <class T>
inline T reduce_sum(Vec<T> v) {
  T s = 0;
  for (int64_t l = 0; l < kLanes<T>; ++l) s += v[l];
  return s;
}

// exp by x = n ln2 + r, |r| <= ln2/2, a Taylor polynomial in r and n added to the exponent. Within 2 units in the last
// place for results that are normal numbers; smaller results are 0, larger ones +inf, NaN stays NaN.
template <class T>
inline Vec<T> exp(Vec<T> x);

template <>
inline Vec<float> exp<float>(Vec<float> x) {
  using V = Vec<float>;
  using M = Mask<float>;
  const float shifter = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer that sits in the low mantissa bits
  const M small = x < -87.33654f, large = x > 88.72283f;
  V y = small ? V{} : (large ? V{} : x);
  const V t = y * 1.44269504088896341f + shifter;
  const V n = t - shifter;
  const V r = (y - n * 0.693359375f) + n * 2.12194440e-4f;
  V p = V{} + 1.98412698e-4f;
  p = p * r + 1.38888889e-3f;
  p = p * r + 8.33333333e-3f;
  p = p * r + 4.16666667e-2f;
  p = p * r + 1.66666667e-1f;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  // Two factors, so that 2^128 * 0.7 does not overflow on its way to a finite result.
  const M k = (M)t - 0x4B400000;
  const M half = k >> 1;
  const V scaled = p * (V)((half + 127) << 23) * (V)((k - half + 127) << 23);
  return small ? V{} : (large ? V{} + __builtin_inff() : scaled);
}

template <>
inline Vec<double> exp<double>(Vec<double> x) {
  using V = Vec<double>;
  using M = Mask<double>;
  const double shifter = 6755399441055744.0;  // 1.5 * 2^52
  const M small = x < -708.3964185322641, large = x > 709.782712893384;
  V y = small ? V{} : (large ? V{} : x);
  const V t = y * 1.4426950408889634 + shifter;
  const V n = t - shifter;
  const V r = (y - n * 0.693147180369123816490) - n * 1.90821492927058770002e-10;
  V p = V{} + 1.6059043836821613e-10;
  p = p * r + 2.08767569878681e-09;
  p = p * r + 2.505210838544172e-08;
  p = p * r + 2.755731922398589e-07;
  p = p * r + 2.7557319223985893e-06;
  p = p * r + 2.48015873015873e-05;
  p = p * r + 1.984126984126984e-04;
  p = p * r + 1.388888888888889e-03;
  p = p * r + 8.333333333333333e-03;
  p = p * r + 4.1666666666666664e-02;
  p = p * r + 1.6666666666666666e-01;
  p = p * r + 0.5;
  p = p * r + 1.0;
  p = p * r + 1.0;
  const M k = (M)t - 0x4338000000000000;
  const M half = k >> 1;
  const V scaled = p * (V)((half + 1023) << 52) * (V)((k - half + 1023) << 52);
  return small ? V{} : (large ? V{} + __builtin_inf() : scaled);
}

}  // namespace ROBUSTFT_ISA
}  // namespace robustft
