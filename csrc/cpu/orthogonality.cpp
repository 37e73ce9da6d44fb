// ||W^T W - I||_F of a projection W (p, d), applied as h W, and its gradient.
//
//   R = W^T W - I    symmetric: tiles on the diagonal and above are multiplied, those below mirrored
//   f = ||R||_F      df/dW = 2 W R / ||R||, zero where R is
//   f = ||R||_F^2    df/dW = 4 W R
//
// R being symmetric, so is df/dR, and autograd's two products with it are one: 3 p d^2 flops and the lower halves of
// the diagonal's tiles, where autograd of the formula takes 6. The forward leaves R (d, d) behind for the backward.
//
// R is a difference of nearly equal numbers, and a projection small beside a batch: float32 is multiplied as IEEE at
// any matmul precision. Products of bfloat16 are exact in float32, so those may go to the matrix unit.
#include <algorithm>
#include <cmath>
#include <tuple>
#include <vector>

#include "tile.h"

namespace robustft {
namespace {

constexpr int64_t kSide = 128;          // of a tile of R
constexpr int64_t kPanel = 256;         // rows of W that a thread multiplies with R
constexpr int64_t kTaskWork = 1 << 20;  // multiplications worth waking a thread for

Arithmetic arithmetic_of_projection(const Tensor& w) { return arithmetic_of(w.scalar_type(), "highest"); }

void check(const Tensor& w, const char* op) { STD_TORCH_CHECK(w.dim() == 2, op, ": w must be (p, d)"); }

// The tile of R at (i, j), which holds a product of W's columns, and where i < j its mirror image; returns the sum of
// the squares of both.
template <class T>
double finish_tile(T* residual, int64_t d, int64_t i, int64_t j) {
  const int64_t rows = std::min(kSide, d - i), cols = std::min(kSide, d - j);
  double squares[kSide] = {};
  for (int64_t a = 0; a < rows; ++a) {
    T* row = residual + (i + a) * d + j;
    if (i == j) row[a] -= T(1);
    for (int64_t b = 0; b < cols; ++b) squares[b] += double(row[b]) * double(row[b]);
    if (i < j)
      for (int64_t b = 0; b < cols; ++b) residual[(j + b) * d + i + a] = row[b];
  }
  double sum = 0;
  for (int64_t b = 0; b < cols; ++b) sum += squares[b];
  return i < j ? 2 * sum : sum;
}

template <class T>
std::tuple<Tensor, Tensor> forward(const Tensor& w, bool squared) {
  const Tensor columns = contiguous_as(torch::stable::transpose(w, 0, 1), scalar_type<T>());
  const int64_t d = columns.size(0), depth = columns.size(1), across = (d + kSide - 1) / kSide;
  const Arithmetic arithmetic = arithmetic_of_projection(w);
  const LeftRows<T> left(columns, 0, d, arithmetic);
  const RightMatrix<T> right(columns, RightMatrix<T>::kColumns, arithmetic);
  Tensor residual = uninitialized({d, d}, columns.scalar_type());
  T* r = residual.mutable_data_ptr<T>();
  const int64_t tiles = across * (across + 1) / 2, work = kSide * kSide * std::max<int64_t>(depth, 1);
  std::vector<double> squares(tiles);
  torch::stable::parallel_for(0, tiles, (kTaskWork + work - 1) / work, [&](int64_t begin, int64_t end) {
    int64_t up = 0;  // the row of tiles that `begin` is in, which starts at up (2 across - up + 1) / 2
    while ((up + 1) * (2 * across - up) / 2 <= begin) ++up;
    for (int64_t tile = begin, q = begin - up * (2 * across - up + 1) / 2 + up; tile < end; ++tile) {
      const int64_t i = up * kSide, j = q * kSide;
      multiply(left, i, std::min(kSide, d - i), right, j, std::min(kSide, d - j), r + i * d + j, d);
      squares[tile] = finish_tile(r, d, i, j);
      if (++q == across) q = ++up;
    }
  });
  double sum = 0;
  for (double part : squares) sum += part;
  Tensor penalty = uninitialized({}, columns.scalar_type());
  *penalty.mutable_data_ptr<T>() = T(squared ? sum : std::sqrt(sum));
  return {penalty, residual};
}

template <class T>
Tensor backward(const Tensor& grad, const Tensor& w, const Tensor& residual, const Tensor& penalty, bool squared) {
  const Tensor rows = contiguous_as(w, scalar_type<T>()), r = contiguous_as(residual, scalar_type<T>());
  const int64_t p = rows.size(0), d = rows.size(1);
  const double g = number_in(grad);
  const double norm = number_in(penalty);
  const T factor = T(squared ? 4 * g : norm == 0 ? 0 * g : 2 * g / norm);
  const RightMatrix<T> right(r, RightMatrix<T>::kRows, arithmetic_of_projection(w));
  Tensor out = uninitialized(rows.sizes(), rows.scalar_type());
  const T* from = rows.const_data_ptr<T>();
  T* to = out.mutable_data_ptr<T>();
  Pool<Scratch> pool;
  const int64_t work = kPanel * std::max<int64_t>(d * d, 1);
  torch::stable::parallel_for(0, (p + kPanel - 1) / kPanel, (kTaskWork + work - 1) / work,
                              [&](int64_t begin, int64_t end) {
                                auto scratch = pool.take([] { return Scratch(); });
                                for (int64_t i = begin * kPanel; i < std::min(p, end * kPanel); i += kPanel) {
                                  const int64_t count = std::min(kPanel, p - i);
                                  add_product(from + i * d, d, count, d, right, 0, to + i * d, true, *scratch);
                                  for (int64_t e = i * d; e < (i + count) * d; ++e) to[e] *= factor;
                                }
                              });
  return contiguous_as(out, w.scalar_type());
}

std::tuple<Tensor, Tensor> orthogonality_penalty(const Tensor& w, bool squared) {
  check(w, "orthogonality_penalty");
  return w.scalar_type() == ScalarType::Double ? forward<double>(w, squared) : forward<float>(w, squared);
}

Tensor orthogonality_penalty_backward(const Tensor& grad, const Tensor& w, const Tensor& residual,
                                      const Tensor& penalty, bool squared) {
  check(w, "orthogonality_penalty_backward");
  STD_TORCH_CHECK(grad.numel() == 1 && penalty.numel() == 1 && residual.dim() == 2 && residual.size(0) == w.size(1) &&
                      residual.size(1) == w.size(1),
                  "orthogonality_penalty_backward: grad and penalty must have one element, residual be (d, d)");
  return w.scalar_type() == ScalarType::Double ? backward<double>(grad, w, residual, penalty, squared)
                                               : backward<float>(grad, w, residual, penalty, squared);
}

}  // namespace
}  // namespace robustft

STABLE_TORCH_LIBRARY_IMPL(robustft, CPU, m) {
  m.impl("orthogonality_penalty", TORCH_BOX(&robustft::orthogonality_penalty));
  m.impl("orthogonality_penalty_backward", TORCH_BOX(&robustft::orthogonality_penalty_backward));
}
