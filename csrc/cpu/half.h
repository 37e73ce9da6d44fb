// Rows of bfloat16 and float16 read as vectors of float and written back, rounded to nearest even as torch does.
// Included by *_kernels.cpp only, like simd.h. Integer arithmetic alone: one text for every instruction set, and
// subnormal numbers survive a processor that is told to flush them.
#pragma once
#include "lanes.h"
#include "stored.h"

namespace robustft {
namespace ROBUSTFT_ISA {

typedef uint16_t Half __attribute__((vector_size(ROBUSTFT_VECTOR_BYTES / 2)));
typedef uint32_t Bits __attribute__((vector_size(ROBUSTFT_VECTOR_BYTES)));

inline Vec<float> widen(Bf16, Half h) { return (Vec<float>)(__builtin_convertvector(h, Bits) << 16); }

inline Vec<float> widen(Fp16, Half h) {
  const Bits bits = __builtin_convertvector(h, Bits);
  const Bits magnitude = (bits & 0x7FFF) << 13;  // the exponent now lacks float's larger bias, by 127 - 15
  const Bits normal = magnitude + (112u << 23), special = magnitude + (224u << 23);
  // Subnormal: 2^-14 (1 + m / 1024) - 2^-14.
  const Bits subnormal = (Bits)((Vec<float>)(magnitude + (113u << 23)) - 0x1p-14f);
  const Bits wide = magnitude < (1u << 23) ? subnormal : (magnitude >= (31u << 23) ? special : normal);
  return (Vec<float>)(wide | (bits & 0x8000) << 16);
}

inline Half narrow(Bf16, Vec<float> v) {
  const Bits bits = (Bits)v;
  const Bits rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
  return __builtin_convertvector(v != v ? Bits{} + 0x7FC0 : rounded, Half);
}

inline Half narrow(Fp16, Vec<float> v) {
  const Bits bits = (Bits)v, magnitude = bits & 0x7FFFFFFF;
  const Bits normal = (magnitude - (112u << 23) + 0xFFF + ((magnitude >> 13) & 1)) >> 13;
  // Subnormal: added to 0.5, whose last place is 2^-24, the processor rounds.
  const Bits subnormal = (Bits)((Vec<float>)magnitude + 0.5f) - (126u << 23);
  const Bits special = magnitude > (255u << 23) ? Bits{} + 0x7E00 : Bits{} + 0x7C00;
  const Bits wide = magnitude < (113u << 23) ? subnormal : (magnitude >= (143u << 23) ? special : normal);
  return __builtin_convertvector(wide | (bits & 0x80000000) >> 16, Half);
}

// The numbers at p, as vectors of the type that is computed in; lanes past the end are -inf.
template <class T>
inline Vec<T> load_wide(const T* p, int64_t lanes) {
  return load_lanes<Vec<T>>(p, lanes, T(-__builtin_inf()));
}
template <class H>
inline Vec<float> load_half(const H* p, int64_t lanes, uint16_t lowest) {
  const uint16_t* bits = (const uint16_t*)p;
  return widen(H{}, lanes == kLanes<float> ? load<Half>(bits) : load_partial<Half>(bits, lanes, lowest));
}
inline Vec<float> load_wide(const Bf16* p, int64_t lanes) { return load_half(p, lanes, 0xFF80); }
inline Vec<float> load_wide(const Fp16* p, int64_t lanes) { return load_half(p, lanes, 0xFC00); }

template <class T>
inline void store_narrow(T* p, Vec<T> v, int64_t lanes) {
  store_lanes(p, v, lanes);
}
template <class H>
inline void store_half(H* p, Vec<float> v, int64_t lanes) {
  const Half h = narrow(H{}, v);
  if (lanes == kLanes<float>)
    store((uint16_t*)p, h);
  else
    store_partial((uint16_t*)p, h, lanes);
}
inline void store_narrow(Bf16* p, Vec<float> v, int64_t lanes) { store_half(p, v, lanes); }
inline void store_narrow(Fp16* p, Vec<float> v, int64_t lanes) { store_half(p, v, lanes); }

}  // namespace ROBUSTFT_ISA
}  // namespace robustft
