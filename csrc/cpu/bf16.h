// Products of bfloat16 factors packed into tiles, float32 sums: on the matrix unit (AMX), or by AVX-512's dot products
// (AVX512_BF16).
//
// The matrix unit's tile is 16 rows of 64 bytes. tdpbf16ps multiplies a tile of 16 rows x 32 depth by one of 16 depth
// pairs x 16 columns x 2 into 16 x 16 floats; vdpbf16ps adds a pair's two products to 16 of these. Packed factors are
// arrays of such 1 KB tiles, depth innermost and padded with zeros, `high` and, for bf16x3, `low`:
//
//   row form     tile[b][k] : [16 rows][32 depth]             left factors
//   column form  tile[b][k] : [16 depth pairs][16 columns][2]   right factors
//
// Everything here runs on the calling thread. Built with ROBUSTFT_BF16_EMULATION the instructions are spelt out in C++,
// so that the whole path can be tested on any processor.
#pragma once
#include <cstdint>

namespace robustft {
namespace bf16 {

constexpr int64_t kTile = 512;  // elements of a packed tile

// What multiplies. Dot products take half the time of products in float32, so three of them more, and there is no
// bf16x3; the matrix unit takes a sixteenth.
enum class Unit { none, dots, tiles };

// The one that is there, that the system lets this process use, and that multiplied a known tile correctly; asked once.
Unit unit();
inline bool available() { return unit() != Unit::none; }

inline int64_t depth_tiles(int64_t depth) { return (depth + 31) / 32; }

// Blocks of 16 [first, last) of the packed forms. low may be null.
//   row form of a (count, d), leading dimension ld
void pack_rows(const float* a, int64_t ld, int64_t count, int64_t d, int64_t first, int64_t last, uint16_t* high,
               uint16_t* low);
//   column form of a^T: the rows of a (count, d) become columns, d is the depth
void pack_rows_as_columns(const float* a, int64_t ld, int64_t count, int64_t d, int64_t first, int64_t last,
                          uint16_t* high, uint16_t* low);
//   column form of a (depth, d): its columns are the columns, its rows the depth; blocks of 16 of the d columns
void pack_columns(const float* a, int64_t ld, int64_t depth, int64_t d, int64_t first, int64_t last, uint16_t* high,
                  uint16_t* low);
//   row form of a^T: the columns of a (depth, count) become rows
void pack_columns_as_rows(const float* a, int64_t ld, int64_t depth, int64_t count, int64_t first, int64_t last,
                          uint16_t* high, uint16_t* low);

// One factor of a product: where its tiles start and how far apart blocks of 16 lie, in tiles.
struct Operand {
  const uint16_t* high;
  const uint16_t* low;  // null for bf16
  int64_t stride;
};

// out (rows, cols), leading dimension ld: (+)= left right over `depth` tiles of depth. Columns of out may lie anywhere.
void multiply(Operand left, int64_t rows, Operand right, int64_t cols, int64_t depth, float* out, int64_t ld,
              bool accumulate);

// The same on one of the units: `multiply` calls that of this processor.
void multiply_tiles(Operand left, int64_t rows, Operand right, int64_t cols, int64_t depth, float* out, int64_t ld,
                    bool accumulate);
void multiply_dots(Operand left, int64_t rows, Operand right, int64_t cols, int64_t depth, float* out, int64_t ld,
                   bool accumulate);  // no `low`

}  // namespace bf16
}  // namespace robustft
