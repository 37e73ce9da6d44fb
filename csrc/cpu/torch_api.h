// The few tensor operations the CPU kernels need, on torch's stable ABI.
//
// There is no stable wrapper of mm or addmm; the C shims below are exported by every libtorch from 2.10 on. They call
// the CPU kernel directly, below autograd.
#pragma once
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstdint>

namespace robustft {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class T>
constexpr ScalarType scalar_type();
template <>
constexpr ScalarType scalar_type<float>() {
  return ScalarType::Float;
}
template <>
constexpr ScalarType scalar_type<double>() {
  return ScalarType::Double;
}

inline Tensor contiguous_as(const Tensor& a, ScalarType dtype) {
  return torch::stable::contiguous(a.scalar_type() == dtype ? a : torch::stable::to(a, dtype));
}

inline Tensor narrow_rows(const Tensor& a, int64_t start, int64_t length) {
  Tensor view = a;
  return torch::stable::narrow(view, 0, start, length);
}

// Rows of a matrix in T, contiguous, at most `most` at a time. Those that have to be converted are where the last ones
// were: fresh memory for each stretch would cost more than the conversion.
template <class T>
class Stretches {
 public:
  Stretches(const Tensor& matrix, int64_t most)
      : matrix_(matrix),
        room_(torch::stable::new_empty(
            matrix, {matrix.scalar_type() == scalar_type<T>() ? 0 : std::min(most, matrix.size(0)), matrix.size(1)},
            scalar_type<T>())) {}

  Tensor rows(int64_t first, int64_t count) {
    const Tensor source = narrow_rows(matrix_, first, count);
    if (matrix_.scalar_type() == scalar_type<T>()) return torch::stable::contiguous(source);
    Tensor converted = narrow_rows(room_, 0, count);
    torch::stable::copy_(converted, source);
    return converted;
  }

 private:
  const Tensor matrix_;
  Tensor room_;
};

// out = a b
inline void mm_out(Tensor& out, const Tensor& a, const Tensor& b) {
  TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mm_out(out.get(), a.get(), b.get()));
}

// out += a b, or out = a b if that is the first of a sum
inline void sum_mm(Tensor& out, const Tensor& a, const Tensor& b, bool first) {
  if (first)
    mm_out(out, a, b);
  else
    TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_addmm_out(out.get(), out.get(), a.get(), b.get(), 1.0, 1.0));
}

// Shares [0, count) among torch's threads in multiples of 16, in pieces worth about 32k exponentials at the least.
template <class F>
void parallel_blocks(int64_t count, int64_t cost_each, const F& f) {
  constexpr int64_t kBlock = 16, kGrain = 1 << 15;
  const int64_t blocks = (count + kBlock - 1) / kBlock;
  torch::stable::parallel_for(0, blocks, std::max<int64_t>(1, kGrain / (kBlock * cost_each)),
                              [&](int64_t b, int64_t e) { f(b * kBlock, std::min(e * kBlock, count)); });
}

}  // namespace robustft
