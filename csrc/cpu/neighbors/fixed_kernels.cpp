// Fixed-point products (fixed.h): rows to whole numbers, and the products of panels. Compiled once per instruction set.
#include "../simd.h"
#include "neighbors.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace robustft {
namespace ROBUSTFT_ISA {
namespace {

// Sums that whole numbers of the right size never overflow, but any may.
typedef uint32_t Sums __attribute__((vector_size(ROBUSTFT_VECTOR_BYTES)));
typedef int32_t Signed __attribute__((vector_size(ROBUSTFT_VECTOR_BYTES)));

constexpr int64_t kSums = ROBUSTFT_VECTOR_BYTES / 4;  // points of a vector
constexpr int kVectors = 2;                           // of points, in registers
constexpr int64_t kLeftBytes = 192 << 10;             // queries that stay in the second cache

// For each lane l: a[2 l] b[2 l] + a[2 l + 1] b[2 l + 1].
#if defined(__AVX512BW__)
inline Sums pair_products(Sums a, Sums b) { return (Sums)_mm512_madd_epi16((__m512i)a, (__m512i)b); }
#elif defined(__AVX2__)
inline Sums pair_products(Sums a, Sums b) { return (Sums)_mm256_madd_epi16((__m256i)a, (__m256i)b); }
#elif defined(__SSE2__)
inline Sums pair_products(Sums a, Sums b) { return (Sums)_mm_madd_epi16((__m128i)a, (__m128i)b); }
#else
inline Sums pair_products(Sums a, Sums b) {
  const Sums low = (Sums)(((Signed)(a << 16) >> 16) * ((Signed)(b << 16) >> 16));
  return low + (Sums)(((Signed)a >> 16) * ((Signed)b >> 16));
}
#endif

// The products of kRows queries, packed side by side, by kVectors vectors of points: `first` and `second`, of one panel
// or of two.
template <int kRows>
ROBUSTFT_INLINE void multiply_rows(const int16_t* left, const int16_t* first, const int16_t* second, int64_t pairs,
                                   Sums (&sums)[kRows][kVectors]) {
  for (int r = 0; r < kRows; ++r) sums[r][0] = sums[r][1] = Sums{};
  for (int64_t p = 0; p < pairs; ++p) {
    const Sums a = load<Sums>(first), b = load<Sums>(second);
    for (int r = 0; r < kRows; ++r) {
      uint32_t pair;
      __builtin_memcpy(&pair, left + 2 * r, sizeof(pair));
      const Sums of_row = Sums{} + pair;
      sums[r][0] += pair_products(of_row, a);
      sums[r][1] += pair_products(of_row, b);
    }
    left += 2 * kRows, first += 2 * kPanel, second += 2 * kPanel;
  }
}

// A group of kRows queries by all points from column `col` to `col` + kVectors * kSums.
template <int kRows>
void multiply_group(const FixedProducts& in, int64_t row, int64_t col, float* out, int64_t ld) {
  const auto points = [&](int64_t c) {  // where those of column c stand; of a panel that does not exist, the last one's
    const int64_t last = (in.cols - 1) / kPanel, panel = c / kPanel;
    return in.panels + (panel < last ? panel : last) * in.pairs * kPanel * 2 + c % kPanel * 2;
  };
  Sums sums[kRows][kVectors];
  multiply_rows<kRows>(in.groups + row * in.pairs * 2, points(col), points(col + kSums), in.pairs, sums);
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < kVectors; ++v) {
      const int64_t c = col + v * kSums, left = in.cols - c;
      const Vec<float> product = __builtin_convertvector((Signed)sums[r][v], Vec<float>) * in.factors[row + r];
      float* const to = out + (row + r) * ld + c;
      if (left >= kSums)
        store(to, product);
      else if (left > 0)
        store_partial(to, product, left);
    }
}

}  // namespace

// out = x scale, to the nearest whole numbers; |x - out / scale|^2, exact but for rounding to double.
void to_fixed(const float* x, int64_t d, float scale, int16_t* out, double* residual) {
  constexpr int64_t kWide = kLanes<double>;
  typedef float Floats __attribute__((vector_size(4 * kWide)));
  typedef uint32_t Words __attribute__((vector_size(4 * kWide)));
  typedef int16_t Shorts __attribute__((vector_size(2 * kWide)));
  constexpr float kShifter = ExpConstants<float>::shifter;
  const double unit = 1 / double(scale);
  Vec<double> squared{};
  for (int64_t j = 0; j < d; j += kWide) {
    const int64_t lanes = d - j < kWide ? d - j : kWide;
    const Floats v = lanes == kWide ? load<Floats>(x + j) : load_partial<Floats>(x + j, lanes, 0.0f);
    const Floats shifted = v * scale + kShifter;
    const Shorts whole = __builtin_convertvector((Words)shifted - uint32_t(ExpConstants<float>::shifter_bits), Shorts);
    lanes == kWide ? store(out + j, whole) : store_partial(out + j, whole, lanes);
    const Vec<double> e =
        __builtin_convertvector(v, Vec<double>) - __builtin_convertvector(shifted - kShifter, Vec<double>) * unit;
    squared += e * e;
  }
  *residual = reduce_sum<double>(squared);
}

// out (rows, cols), leading dimension ld.
void fixed_products(const FixedProducts& in, float* out, int64_t ld) {
  const int64_t fit = kLeftBytes / (4 * in.pairs) / kGroup * kGroup, block = fit > kGroup ? fit : kGroup;
  for (int64_t begin = 0; begin < in.rows; begin += block) {
    const int64_t end = begin + block < in.rows ? begin + block : in.rows;
    for (int64_t col = 0; col < in.cols; col += kVectors * kSums)
      for (int64_t row = begin; row < end; row += kGroup) switch (end - row) {
          case 1: multiply_group<1>(in, row, col, out, ld); break;
          case 2: multiply_group<2>(in, row, col, out, ld); break;
          case 3: multiply_group<3>(in, row, col, out, ld); break;
          case 4: multiply_group<4>(in, row, col, out, ld); break;
          case 5: multiply_group<5>(in, row, col, out, ld); break;
          default: multiply_group<6>(in, row, col, out, ld);
        }
  }
}

}  // namespace ROBUSTFT_ISA
}  // namespace robustft
