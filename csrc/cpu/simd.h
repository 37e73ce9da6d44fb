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

template <class T>
struct ExpConstants;

template <>
struct ExpConstants<float> {
  static constexpr float low = -87.33654f, high = 88.72283f;  // results leave the normal numbers here
  static constexpr float shifter = 12582912.0f;               // 1.5 * 2^23: x + shifter holds round(x) in its low bits
  static constexpr int32_t shifter_bits = 0x4B400000, bias = 127, mantissa = 23;
  static constexpr float ln2_high = 0.693359375f, ln2_low = -2.12194440e-4f;  // n * ln2_high is exact
  static constexpr float taylor[] = {1.98412698e-4f, 1.38888889e-3f, 8.33333333e-3f, 4.16666667e-2f,
                                     1.66666667e-1f, 0.5f,           1.0f,           1.0f};
};

template <>
struct ExpConstants<double> {
  static constexpr double low = -708.3964185322641, high = 709.782712893384;
  static constexpr double shifter = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr int64_t shifter_bits = 0x4338000000000000, bias = 1023, mantissa = 52;
  static constexpr double ln2_high = 0.693147180369123816490, ln2_low = 1.90821492927058770002e-10;
  static constexpr double taylor[] = {1.6059043836821613e-10,
                                      2.08767569878681e-09,
                                      2.505210838544172e-08,
                                      2.755731922398589e-07,
                                      2.7557319223985893e-06,
                                      2.48015873015873e-05,
                                      1.984126984126984e-04,
                                      1.388888888888889e-03,
                                      8.333333333333333e-03,
                                      4.1666666666666664e-02,
                                      1.6666666666666666e-01,
                                      0.5,
                                      1.0,
                                      1.0};
};

// exp by x = n ln2 + r, |r| <= ln2 / 2: a Taylor polynomial in r (1 / 7! ... for float, 1 / 13! ... for double), and n
// added to the exponent. Within 2 units in the last place for results that are normal numbers; smaller results are 0,
// larger ones inf, NaN stays NaN. This is exp(r), and n.
template <class T>
inline Vec<T> exp_reduced(Vec<T> x, Mask<T>& k) {
  using V = Vec<T>;
  using C = ExpConstants<T>;
  const V t = x * T(1.4426950408889634) + C::shifter;
  const V n = t - C::shifter;
  const V r = (x - n * C::ln2_high) - n * C::ln2_low;
  V p{};
  for (T coefficient : C::taylor) p = p * r + coefficient;
  k = (Mask<T>)t - C::shifter_bits;
  return p;
}

template <class T>
inline Vec<T> exp(Vec<T> x) {
  using V = Vec<T>;
  using C = ExpConstants<T>;
  const Mask<T> small = x<C::low, large = x> C::high;
  Mask<T> k;
  const V p = exp_reduced<T>((small | large) ? V{} : x, k);
  // Two factors, so that 2^128 * 0.7 does not overflow on its way to a finite result.
  const Mask<T> half = k >> 1;
  const V scaled = p * (V)((half + C::bias) << C::mantissa) * (V)((k - half + C::bias) << C::mantissa);
  return small ? V{} : (large ? V{} + T(__builtin_inf()) : scaled);
}

// The same for x <= 0, whose results need neither a second factor nor a look at large ones.
template <class T>
inline Vec<T> exp_nonpositive(Vec<T> x) {
  using C = ExpConstants<T>;
  const Mask<T> small = x < C::low;
  Mask<T> k;
  const Vec<T> p = exp_reduced<T>(small ? Vec<T>{} : x, k);
  return small ? Vec<T>{} : p * (Vec<T>)((k + C::bias) << C::mantissa);
}

}  // namespace ROBUSTFT_ISA
}  // namespace robustft
