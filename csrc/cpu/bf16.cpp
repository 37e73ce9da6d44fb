// What can be used of bfloat16's instructions: see bf16.h. Compiled for any processor, unlike bf16_kernels.cpp.
#include "bf16.h"

#include <cstring>
#include <vector>

#include "isa.h"

namespace robustft {
namespace bf16 {
namespace {

// A product of small integers, whose sums are exact in any order. What multiplies wrongly here (an emulator, a virtual
// machine that does not save the unit's state) must not be given anyone's features.
bool multiplies_correctly(decltype(multiply)& product) {
  constexpr int64_t n = 21, m = 37, d = 45;
  std::vector<float> a(n * d), b(m * d), out(n * m, 1.0f);
  for (int64_t i = 0; i < n * d; ++i) a[i] = float(i % 17 - 8);
  for (int64_t i = 0; i < m * d; ++i) b[i] = float(i % 13 - 6);
  std::vector<uint16_t> left(2 * 2 * kTile), right(3 * 2 * kTile);
  pack_rows(a.data(), d, n, d, 0, 2, left.data(), nullptr);
  pack_rows_as_columns(b.data(), d, m, d, 0, 3, right.data(), nullptr);
  product({left.data(), nullptr, 2}, n, {right.data(), nullptr, 2}, m, 2, out.data(), m, true);
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = 0; j < m; ++j) {
      float expected = 1.0f;
      for (int64_t k = 0; k < d; ++k) expected += a[i * d + k] * b[j * d + k];
      if (out[i * m + j] != expected) return false;
    }
  return true;
}

}  // namespace

Unit unit() {
  static const Unit usable = [] {
    const Isa isa = select_isa();
    if (isa == Isa::amx && request_amx() && multiplies_correctly(multiply_tiles)) return Unit::tiles;
    if (isa >= Isa::avx512_bf16 && has_dot_products() && multiplies_correctly(multiply_dots)) return Unit::dots;
    return Unit::none;
  }();
  return usable;
}

void multiply(Operand left, int64_t rows, Operand right, int64_t cols, int64_t depth, float* out, int64_t ld,
              bool accumulate) {
  const auto product = unit() == Unit::tiles ? multiply_tiles : multiply_dots;
  product(left, rows, right, cols, depth, out, ld, accumulate);
}

}  // namespace bf16
}  // namespace robustft
