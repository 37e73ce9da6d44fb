// Whether the matrix unit can be used: see amx.h. Compiled for any processor, unlike amx_kernels.cpp.
#include "amx.h"

#include <cstring>
#include <vector>

#include "isa.h"

namespace robustft {
namespace amx {
namespace {

// A product of small integers, whose sums are exact in any order. What multiplies wrongly here (an emulator, a virtual
// machine that does not save the unit's state) must not be given anyone's features.
bool multiplies_correctly() {
  constexpr int64_t n = 21, m = 37, d = 45;
  std::vector<float> a(n * d), b(m * d), out(n * m, 1.0f);
  for (int64_t i = 0; i < n * d; ++i) a[i] = float(i % 17 - 8);
  for (int64_t i = 0; i < m * d; ++i) b[i] = float(i % 13 - 6);
  std::vector<uint16_t> left(2 * 2 * kTile), right(3 * 2 * kTile);
  pack_rows(a.data(), d, n, d, 0, 2, left.data(), nullptr);
  pack_rows_as_columns(b.data(), d, m, d, 0, 3, right.data(), nullptr);
  multiply({left.data(), nullptr, 2}, n, {right.data(), nullptr, 2}, m, 2, out.data(), m, true);
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = 0; j < m; ++j) {
      float expected = 1.0f;
      for (int64_t k = 0; k < d; ++k) expected += a[i * d + k] * b[j * d + k];
      if (out[i * m + j] != expected) return false;
    }
  return true;
}

}  // namespace

bool available() {
  static const bool usable = select_isa() == Isa::amx && request_amx() && multiplies_correctly();
  return usable;
}

}  // namespace amx
}  // namespace robustft
