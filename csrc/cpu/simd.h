// Vectors of T as wide as the instruction set this file is compiled for, and exp on them.
//
// Included only by *_kernels.cpp, which CMake compiles once per instruction set with ROBUSTFT_ISA (a namespace) and
// ROBUSTFT_VECTOR_BYTES set. Those files must not call inline functions of the standard library: the linker keeps one
// copy of each, and it could be the AVX-512 one. GCC's and Clang's vector extension is used instead of intrinsics so
// that one text serves every width, on any processor.
#pragma once
#include <cstdint>

// The callers' sums stay in registers only if nothing in their loops is called.
#define ROBUSTFT_INLINE inline __attribute__((always_inline))

namespace robustft {
namespace ROBUSTFT_ISA {

template <class T>
struct Lanes;
template <>
struct Lanes<float> {
  typedef float Vec __attribute__((vector_size(ROBUSTFT_VECTOR_BYTES)));
  typedef int32_t Mask __attribute__((vector_size(ROBUSTFT_VECTOR_BYTES)));
  typedef uint32_t Word __attribute__((vector_size(ROBUSTFT_VECTOR_BYTES)));
};
template <>
struct Lanes<double> {
  typedef double Vec __attribute__((vector_size(ROBUSTFT_VECTOR_BYTES)));
  typedef int64_t Mask __attribute__((vector_size(ROBUSTFT_VECTOR_BYTES)));
  typedef uint64_t Word __attribute__((vector_size(ROBUSTFT_VECTOR_BYTES)));
};

template <class T>
using Vec = typename Lanes<T>::Vec;
template <class T>
using Mask = typename Lanes<T>::Mask;  // also the vector type of labels: an integer as wide as T

template <class T>
constexpr int64_t kLanes = ROBUSTFT_VECTOR_BYTES / sizeof(T);

template <class T>
using Word = typename Lanes<T>::Word;  // the bits of T; sums of those of unused lanes may wrap

template <class V, class P>
ROBUSTFT_INLINE V load(const P* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof(V));
  return v;
}

// The first n lanes from memory, the others `fill`: memory past the end is never read.
template <class V, class P>
ROBUSTFT_INLINE V load_partial(const P* p, int64_t n, P fill) {
  V v = V{} + fill;
  __builtin_memcpy(&v, p, n * sizeof(P));
  return v;
}

template <class V, class P>
ROBUSTFT_INLINE void store(P* p, V v) {
  __builtin_memcpy(p, &v, sizeof(V));
}

template <class V, class P>
ROBUSTFT_INLINE void store_partial(P* p, V v, int64_t n) {
  __builtin_memcpy(p, &v, n * sizeof(P));
}

// A NaN in either argument survives: maxima must not hide one.
template <class V>
ROBUSTFT_INLINE V max(V a, V b) {
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
  static constexpr float log2e = 1.44269502f, log2e_low = 1.92596303e-8f;
  static constexpr float ln2_high = 0.693359375f, ln2_low = -2.12194440e-4f;  // n * ln2_high is exact
  static constexpr float taylor[] = {1.98412698e-4f, 1.38888889e-3f, 8.33333333e-3f, 4.16666667e-2f,
                                     1.66666667e-1f, 0.5f,           1.0f,           1.0f};
  // 2^r for |r| <= 1/2, of least relative error among the polynomials that are 1 at 0
  static constexpr float binary[] = {
      1.53147703e-4f, 1.33854139e-3f, 9.61844902e-3f, 5.55037595e-2f, 2.40226507e-1f, 6.93147182e-1f, 1.0f};
};

template <>
struct ExpConstants<double> {
  static constexpr double low = -708.3964185322641, high = 709.782712893384;
  static constexpr double shifter = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr int64_t shifter_bits = 0x4338000000000000, bias = 1023, mantissa = 52;
  static constexpr double log2e = 1.4426950408889634, log2e_low = 2.0355273740931033e-17;
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
  static constexpr double binary[] = {1.3691488853904124e-12, 2.5678435993488196e-11,
                                      4.44553827187081e-10,   7.054911620801121e-09,
                                      1.0178086009239696e-07, 1.3215486790144305e-06,
                                      1.5252733804059838e-05, 0.00015403530393381606,
                                      0.0013333558146428441,  0.009618129107628477,
                                      0.055504108664821576,   0.2402265069591007,
                                      0.6931471805599453,     1.0};  // Taylor's: ln(2)^k / k!
};

// c[0] r^n + c[1] r^(n - 1) + ...
template <class T, int kCount>
ROBUSTFT_INLINE Vec<T> polynomial(const T (&c)[kCount], Vec<T> r) {
  Vec<T> p = c[0] * r + c[1];
  for (int i = 2; i < kCount; ++i) p = p * r + c[i];
  return p;
}

// n of the bits of n + shifter where an exponent has its bits: the shifter's own leave on the left.
template <class T>
ROBUSTFT_INLINE Word<T> as_exponent(Word<T> bits) {
  return bits << ExpConstants<T>::mantissa;
}

// exp by x = n ln2 + r, |r| <= ln2 / 2: a Taylor polynomial in r (1 / 7! ... for float, 1 / 13! ... for double), and n
// added to the exponent. Within 2 units in the last place for results that are normal numbers; smaller results are 0,
// larger ones inf, NaN stays NaN. This is exp(r), and in the low bits of `bits` n.
template <class T>
ROBUSTFT_INLINE Vec<T> exp_reduced(Vec<T> x, Mask<T>& bits) {
  using V = Vec<T>;
  using C = ExpConstants<T>;
  const V t = x * C::log2e + C::shifter;
  const V n = t - C::shifter;
  const V r = (x - n * C::ln2_high) - n * C::ln2_low;
  bits = (Mask<T>)t;
  return polynomial<T>(C::taylor, r);
}

template <class T>
ROBUSTFT_INLINE Vec<T> exp(Vec<T> x) {
  using V = Vec<T>;
  using C = ExpConstants<T>;
  const Mask<T> small = x<C::low, large = x> C::high;
  Mask<T> bits;
  const V p = exp_reduced<T>((small | large) ? V{} : x, bits);
  // Two factors, so that 2^128 * 0.7 does not overflow on its way to a finite result.
  const Mask<T> k = bits - C::shifter_bits, half = k >> 1;
  const V scaled = p * (V)((half + C::bias) << C::mantissa) * (V)((k - half + C::bias) << C::mantissa);
  return small ? V{} : (large ? V{} + T(__builtin_inf()) : scaled);
}

// The same for x <= 0, whose results need neither two factors nor a look at large ones.
template <class T>
ROBUSTFT_INLINE Vec<T> exp_nonpositive(Vec<T> x) {
  const Mask<T> small = x < ExpConstants<T>::low;
  Mask<T> bits;
  const Vec<T> p = exp_reduced<T>(small ? Vec<T>{} : x, bits);
  // Multiplied, that a NaN stays one.
  return small ? Vec<T>{} : p * (Vec<T>)as_exponent<T>((Word<T>)bits + ExpConstants<T>::bias);
}

}  // namespace ROBUSTFT_ISA
}  // namespace robustft
