// Vectors of double and as many numbers of float: to and fro, and what the vector extension lacks. Included by
// *_kernels.cpp only, like simd.h.
#pragma once
#include "../simd.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace robustft {
namespace ROBUSTFT_ISA {

// One bit a lane. The vector extension has no such operation, and without it scores are tested at half the speed.
#if defined(__AVX512DQ__)
inline uint64_t lane_bits(Mask<float> m) { return _mm512_movepi32_mask((__m512i)m); }
inline uint64_t lane_bits(Mask<double> m) { return _mm512_movepi64_mask((__m512i)m); }
#elif defined(__AVX2__)
inline uint64_t lane_bits(Mask<float> m) { return unsigned(_mm256_movemask_ps((__m256)m)); }
inline uint64_t lane_bits(Mask<double> m) { return unsigned(_mm256_movemask_pd((__m256d)m)); }
#else
template <class M>
inline uint64_t lane_bits(M m) {
  uint64_t bits = 0;
  for (unsigned l = 0; l < sizeof(M) / sizeof(m[0]); ++l) bits |= uint64_t(m[l] & 1) << l;
  return bits;
}
#endif

// As many numbers of T as there are lanes of double.
template <class T>
struct Narrow {
  typedef T Vec __attribute__((vector_size(ROBUSTFT_VECTOR_BYTES / 8 * sizeof(T))));
};
template <class T>
using NarrowVec = typename Narrow<T>::Vec;

// gcc 12 converts vectors in halves and joins them.
#if defined(__AVX512F__)
inline Vec<double> widen(NarrowVec<float> v) { return (Vec<double>)_mm512_maskz_cvtps_pd(0xff, (__m256)v); }
#elif defined(__AVX2__)
inline Vec<double> widen(NarrowVec<float> v) { return (Vec<double>)_mm256_cvtps_pd((__m128)v); }
#else
inline Vec<double> widen(NarrowVec<float> v) { return __builtin_convertvector(v, Vec<double>); }
#endif
inline Vec<double> widen(Vec<double> v) { return v; }

#if defined(__AVX512F__)
inline NarrowVec<float> narrow(Vec<double> v) { return (NarrowVec<float>)_mm512_maskz_cvtpd_ps(0xff, (__m512d)v); }
inline Vec<double> root(Vec<double> v) { return (Vec<double>)_mm512_maskz_sqrt_pd(0xff, (__m512d)v); }
#elif defined(__AVX2__)
inline NarrowVec<float> narrow(Vec<double> v) { return (NarrowVec<float>)_mm256_cvtpd_ps((__m256d)v); }
inline Vec<double> root(Vec<double> v) { return (Vec<double>)_mm256_sqrt_pd((__m256d)v); }
#else
inline NarrowVec<float> narrow(Vec<double> v) { return __builtin_convertvector(v, NarrowVec<float>); }
inline Vec<double> root(Vec<double> v) {
  for (int64_t l = 0; l < kLanes<double>; ++l) v[l] = __builtin_sqrt(v[l]);
  return v;
}
#endif

}  // namespace ROBUSTFT_ISA
}  // namespace robustft
