// Packing and products of bfloat16. The only file compiled with its instructions: like the other kernel files it must
// not call inline functions of the standard library, of which the linker keeps one copy for all.
#include "bf16.h"

#ifndef ROBUSTFT_BF16_EMULATION
#include <immintrin.h>
#elif defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wpsabi"  // vectors wider than the processor's are only passed between functions here
#endif

namespace robustft {
namespace bf16 {
namespace {

typedef float Floats __attribute__((vector_size(64)));
typedef uint32_t Words __attribute__((vector_size(64)));
typedef int32_t Indices __attribute__((vector_size(64)));
typedef uint16_t Halves __attribute__((vector_size(32)));

#ifdef ROBUSTFT_BF16_EMULATION

struct Register {
  alignas(64) unsigned char bytes[16][64];
};
thread_local Register registers[8];

void configure() {}
void release() {}

#define _tile_zero(t) __builtin_memset(&registers[t], 0, sizeof(Register))
#define _tile_loadd(t, base, stride) \
  for (int64_t r = 0; r < 16; ++r) __builtin_memcpy(registers[t].bytes[r], (const char*)(base) + r * (stride), 64)
#define _tile_stored(t, base, stride) \
  for (int64_t r = 0; r < 16; ++r) __builtin_memcpy((char*)(base) + r * (stride), registers[t].bytes[r], 64)
#define _tile_dpbf16ps(c, a, b) emulate_product(registers[c], registers[a], registers[b])

inline float from_bf16(uint16_t h) {
  const uint32_t bits = uint32_t(h) << 16;
  float f;
  __builtin_memcpy(&f, &bits, 4);
  return f;
}

void emulate_product(Register& c, const Register& a, const Register& b) {
  for (int64_t row = 0; row < 16; ++row) {
    float sums[16];
    uint16_t left[32], right[32];
    __builtin_memcpy(sums, c.bytes[row], 64);
    __builtin_memcpy(left, a.bytes[row], 64);
    for (int64_t pair = 0; pair < 16; ++pair) {
      __builtin_memcpy(right, b.bytes[pair], 64);
      for (int64_t col = 0; col < 16; ++col)
        for (int64_t odd = 0; odd < 2; ++odd)
          sums[col] += from_bf16(left[2 * pair + odd]) * from_bf16(right[2 * col + odd]);
    }
    __builtin_memcpy(c.bytes[row], sums, 64);
  }
}

#else

struct alignas(64) Configuration {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

void configure() {
  Configuration c;
  for (int t = 0; t < 8; ++t) c.row_bytes[t] = 64, c.rows[t] = 16;
  asm volatile("" ::"r"(&c) : "memory");  // gcc 12 does not see that the next instruction reads all of c
  _tile_loadconfig(&c);
}

void release() { _tile_release(); }

#endif

// Depth tiles [0, depth) of four products: out tile (0, 0), (0, 1), (1, 0), (1, 1) of the blocks a0, a1 and b0, b1. For
// bf16x3 low * high, high * high and high * low, small terms first where it costs nothing.
template <bool kThree>
inline void multiply_block(const uint16_t* const a[2], const uint16_t* const a_low[2], const uint16_t* const b[2],
                           const uint16_t* const b_low[2], int64_t depth) {
  for (int64_t k = 0; k < depth; ++k) {
    const int64_t o = k * kTile;
    _tile_loadd(6, b[0] + o, 64);
    _tile_loadd(7, b[1] + o, 64);
    if (kThree) {
      _tile_loadd(4, a_low[0] + o, 64);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      _tile_loadd(5, a_low[1] + o, 64);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
    _tile_loadd(4, a[0] + o, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(5, a[1] + o, 64);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
    if (kThree) {
      _tile_loadd(6, b_low[0] + o, 64);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(2, 5, 6);
      _tile_loadd(7, b_low[1] + o, 64);
      _tile_dpbf16ps(1, 4, 7);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
}

template <bool kThree>
void multiply_all(Operand left, int64_t rows, Operand right, int64_t cols, int64_t depth, float* out, int64_t ld,
                  bool accumulate) {
  alignas(64) float edge[32 * 32];
  const int64_t left_step = left.stride * kTile, right_step = right.stride * kTile;
  for (int64_t j = 0; j < cols; j += 32)
    for (int64_t i = 0; i < rows; i += 32) {
      // Where there is no second block of 16 the first is computed twice, and the second result never read.
      const int64_t i1 = i + 16 < rows ? i / 16 + 1 : i / 16, j1 = j + 16 < cols ? j / 16 + 1 : j / 16;
      const uint16_t* a[2] = {left.high + i / 16 * left_step, left.high + i1 * left_step};
      const uint16_t* b[2] = {right.high + j / 16 * right_step, right.high + j1 * right_step};
      const uint16_t *a_low[2] = {}, *b_low[2] = {};
      if (kThree) {
        a_low[0] = left.low + i / 16 * left_step, a_low[1] = left.low + i1 * left_step;
        b_low[0] = right.low + j / 16 * right_step, b_low[1] = right.low + j1 * right_step;
      }
      const int64_t height = rows - i < 32 ? rows - i : 32, width = cols - j < 32 ? cols - j : 32;
      const bool whole = height == 32 && width == 32;
      float* place = out + i * ld + j;
      float* c = whole ? place : edge;
      const int64_t pitch = whole ? ld : 32;
      if (accumulate) {
        if (!whole)
          for (int64_t r = 0; r < height; ++r) __builtin_memcpy(edge + r * 32, place + r * ld, width * sizeof(float));
        _tile_loadd(0, c, pitch * 4);
        _tile_loadd(1, c + 16, pitch * 4);
        _tile_loadd(2, c + 16 * pitch, pitch * 4);
        _tile_loadd(3, c + 16 * pitch + 16, pitch * 4);
      } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
      }
      multiply_block<kThree>(a, a_low, b, b_low, depth);
      _tile_stored(0, c, pitch * 4);
      _tile_stored(1, c + 16, pitch * 4);
      _tile_stored(2, c + 16 * pitch, pitch * 4);
      _tile_stored(3, c + 16 * pitch + 16, pitch * 4);
      if (!whole)
        for (int64_t r = 0; r < height; ++r) __builtin_memcpy(place + r * ld, edge + r * 32, width * sizeof(float));
    }
}

// 16 floats, those from `lanes` on zero.
inline Floats load(const float* p, int64_t lanes) {
  Floats v{};
  if (lanes >= 16)
    __builtin_memcpy(&v, p, sizeof(v));
  else if (lanes > 0)
    __builtin_memcpy(&v, p, lanes * sizeof(float));
  return v;
}

// 16 sums of float32, plus a's two products by b's in each word.
inline Floats dot(Floats sums, Words a, Words b) {
#ifdef ROBUSTFT_BF16_EMULATION
  constexpr uint32_t kUpper = 0xffff0000u;
  return sums + (Floats)(a << 16) * (Floats)(b << 16) + (Floats)(a & kUpper) * (Floats)(b & kUpper);
#else
  return (Floats)_mm512_dpbf16_ps((__m512)sums, (__m512bh)a, (__m512bh)b);
#endif
}

constexpr int64_t kDotRows = 8, kDotBlocks = 3;  // 24 vectors of sums, of 32 registers

// Rows [0, kDotRows) of a tile's block of 16, from `left` on, times kBlocks of 16 columns.
template <int kBlocks>
void multiply_rows(const uint16_t* left, const uint16_t* right, int64_t right_step, int64_t depth, int64_t rows,
                   int64_t cols, float* out, int64_t ld, bool accumulate) {
  Floats sums[kDotRows][kBlocks] = {};
  for (int64_t k = 0; k < depth; ++k)
    for (int64_t p = 0; p < 16; ++p) {
      Words b[kBlocks];
      for (int c = 0; c < kBlocks; ++c) __builtin_memcpy(&b[c], right + c * right_step + k * kTile + p * 32, 64);
      for (int r = 0; r < kDotRows; ++r) {
        uint32_t two;
        __builtin_memcpy(&two, left + k * kTile + r * 32 + p * 2, 4);
        const Words a = two - Words{};
        for (int c = 0; c < kBlocks; ++c) sums[r][c] = dot(sums[r][c], a, b[c]);
      }
    }
  for (int r = 0; r < kDotRows && r < rows; ++r)
    for (int c = 0; c < kBlocks; ++c) {
      float* place = out + r * ld + c * 16;
      const int64_t width = cols - c * 16 < 16 ? cols - c * 16 : 16;
      if (accumulate) sums[r][c] += load(place, width);
      if (width == 16)
        __builtin_memcpy(place, &sums[r][c], 64);
      else
        __builtin_memcpy(place, &sums[r][c], width * sizeof(float));
    }
}

// v rounded to bfloat16, in the upper halves of the words; the lower halves are zero.
inline Words round_to_bf16(Floats v) {
  const Words bits = (Words)v;
  const Words rounded = bits + 0x7fff + ((bits >> 16) & 1);
  return (v != v ? (bits | 0x400000) : rounded) & 0xffff0000u;  // a NaN stays one
}

// 16 words of two bfloat16: `first` in the lower halves, `second` in the upper.
inline Words pair(Words first, Words second) { return (first >> 16) | second; }

// The 32 floats of two vectors as consecutive bfloat16.
inline Words join(Words first, Words second) {
  const Halves halves[2] = {__builtin_convertvector(first >> 16, Halves),
                            __builtin_convertvector(second >> 16, Halves)};
  Words words;
  __builtin_memcpy(&words, halves, sizeof(words));
  return words;
}

// One step of a 16 x 16 transposition: swaps the off-diagonal S x S blocks of every 2S x 2S block.
template <int S>
inline void swap_blocks(Words* m) {
  Indices keep_first, keep_second;
  for (int j = 0; j < 16; ++j) {
    keep_first[j] = j & S ? 16 + j - S : j;
    keep_second[j] = j & S ? 16 + j : j + S;
  }
  for (int i = 0; i < 16; ++i)
    if (!(i & S)) {
      const Words a = m[i], b = m[i + S];
      m[i] = __builtin_shuffle(a, b, keep_first);
      m[i + S] = __builtin_shuffle(a, b, keep_second);
    }
}

inline void transpose(Words* m) {
  swap_blocks<1>(m);
  swap_blocks<2>(m);
  swap_blocks<4>(m);
  swap_blocks<8>(m);
}

// Writes one tile from 16 pairs of vectors; make(r) gives the r-th pair of vectors of 16 floats, and combine makes
// words of two bfloat16 of them.
template <bool kTransposed, class Make, class Combine>
inline void pack_tile(const Make& make, const Combine& combine, uint16_t* high, uint16_t* low) {
  Words h[16], l[16];
  for (int r = 0; r < 16; ++r) {
    Floats first, second;
    make(r, first, second);
    const Words a = round_to_bf16(first), b = round_to_bf16(second);
    h[r] = combine(a, b);
    if (low) l[r] = combine(round_to_bf16(first - (Floats)a), round_to_bf16(second - (Floats)b));
  }
  if (kTransposed) transpose(h);
  __builtin_memcpy(high, h, sizeof(h));
  if (low) {
    if (kTransposed) transpose(l);
    __builtin_memcpy(low, l, sizeof(l));
  }
}

// Pairs of neighbours within rows of a (count, d): blocks of 16 rows, depth along the row.
template <bool kTransposed>
void pack_along_rows(const float* a, int64_t ld, int64_t count, int64_t d, int64_t first, int64_t last, uint16_t* high,
                     uint16_t* low) {
  const int64_t tiles = depth_tiles(d);
  for (int64_t b = first; b < last; ++b)
    for (int64_t k = 0; k < tiles; ++k) {
      auto make = [&](int r, Floats& x, Floats& y) {
        const int64_t row = 16 * b + r, left = row < count ? d - 32 * k : 0;
        const float* p = a + (row < count ? row : 0) * ld + 32 * k;
        x = load(p, left);
        y = load(p + 16, left - 16);
      };
      const int64_t o = (b * tiles + k) * kTile;
      pack_tile<kTransposed>(make, join, high + o, low ? low + o : nullptr);
    }
}

// Pairs of neighbours within columns of a (depth, count): blocks of 16 columns, depth along the column.
template <bool kTransposed>
void pack_along_columns(const float* a, int64_t ld, int64_t depth, int64_t count, int64_t first, int64_t last,
                        uint16_t* high, uint16_t* low) {
  const int64_t tiles = depth_tiles(depth);
  for (int64_t b = first; b < last; ++b)
    for (int64_t k = 0; k < tiles; ++k) {
      auto make = [&](int r, Floats& x, Floats& y) {
        const int64_t row = 32 * k + 2 * r, lanes = count - 16 * b;
        const float* p = a + row * ld + 16 * b;
        x = row < depth ? load(p, lanes) : Floats{};
        y = row + 1 < depth ? load(p + ld, lanes) : Floats{};
      };
      const int64_t o = (b * tiles + k) * kTile;
      pack_tile<kTransposed>(make, pair, high + o, low ? low + o : nullptr);
    }
}

}  // namespace

void pack_rows(const float* a, int64_t ld, int64_t count, int64_t d, int64_t first, int64_t last, uint16_t* high,
               uint16_t* low) {
  pack_along_rows<false>(a, ld, count, d, first, last, high, low);
}

void pack_rows_as_columns(const float* a, int64_t ld, int64_t count, int64_t d, int64_t first, int64_t last,
                          uint16_t* high, uint16_t* low) {
  pack_along_rows<true>(a, ld, count, d, first, last, high, low);
}

void pack_columns(const float* a, int64_t ld, int64_t depth, int64_t count, int64_t first, int64_t last, uint16_t* high,
                  uint16_t* low) {
  pack_along_columns<false>(a, ld, depth, count, first, last, high, low);
}

void pack_columns_as_rows(const float* a, int64_t ld, int64_t depth, int64_t count, int64_t first, int64_t last,
                          uint16_t* high, uint16_t* low) {
  pack_along_columns<true>(a, ld, depth, count, first, last, high, low);
}

void multiply_tiles(Operand left, int64_t rows, Operand right, int64_t cols, int64_t depth, float* out, int64_t ld,
                    bool accumulate) {
  configure();
  if (left.low)
    multiply_all<true>(left, rows, right, cols, depth, out, ld, accumulate);
  else
    multiply_all<false>(left, rows, right, cols, depth, out, ld, accumulate);
  release();
}

void multiply_dots(Operand left, int64_t rows, Operand right, int64_t cols, int64_t depth, float* out, int64_t ld,
                   bool accumulate) {
  const int64_t left_step = left.stride * kTile, right_step = right.stride * kTile;
  for (int64_t i = 0; i < rows; i += kDotRows) {
    const uint16_t* a = left.high + i / 16 * left_step + i % 16 * 32;
    for (int64_t j = 0; j < cols; j += 16 * kDotBlocks) {
      const uint16_t* b = right.high + j / 16 * right_step;
      const int64_t height = rows - i, width = cols - j;
      float* place = out + i * ld + j;
      if (width > 32)
        multiply_rows<3>(a, b, right_step, depth, height, width, place, ld, accumulate);
      else if (width > 16)
        multiply_rows<2>(a, b, right_step, depth, height, width, place, ld, accumulate);
      else
        multiply_rows<1>(a, b, right_step, depth, height, width, place, ld, accumulate);
    }
  }
}

}  // namespace bf16
}  // namespace robustft
