// The few tensor operations the CPU kernels need, on torch's stable ABI.
//
// There is no stable wrapper of mm or addmm; the C shims below are exported by every libtorch from 2.10 on. They call
// the CPU kernel directly, below autograd.
#pragma once
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
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
  if (a.scalar_type() != dtype) return torch::stable::contiguous(torch::stable::to(a, dtype));
  return a.is_contiguous() ? a : torch::stable::contiguous(a);
}

// A tensor in memory, contiguous, of nothing yet. torch::stable::new_empty finds its operator by name at every call:
// twenty of them took longer than a loss on 32 pairs.
inline Tensor uninitialized(torch::headeronly::IntHeaderOnlyArrayRef sizes, ScalarType dtype) {
  constexpr size_t kMost = 4;
  STD_TORCH_CHECK(sizes.size() <= kMost, "at most ", kMost, " dimensions");
  int64_t strides[kMost], stride = 1;
  for (size_t i = sizes.size(); i-- > 0; stride *= std::max<int64_t>(1, sizes[i])) strides[i] = stride;
  const int32_t code = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(sizes.size(), sizes.data(), strides, code, aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

template <class T>
Tensor zeros(torch::headeronly::IntHeaderOnlyArrayRef sizes) {
  Tensor out = uninitialized(sizes, scalar_type<T>());
  std::fill_n(out.mutable_data_ptr<T>(), out.numel(), T(0));
  return out;
}

// The one number of a tensor.
inline double number_in(const Tensor& a) {
  if (a.scalar_type() == ScalarType::Double) return *a.const_data_ptr<double>();
  if (a.scalar_type() == ScalarType::Float) return *a.const_data_ptr<float>();
  return *contiguous_as(a, ScalarType::Double).const_data_ptr<double>();
}

// A number in the dtype and shape of a tensor that has one.
inline Tensor like_number(double value, const Tensor& of) {
  if (of.scalar_type() == ScalarType::Float) {
    Tensor out = uninitialized(of.sizes(), ScalarType::Float);
    *out.mutable_data_ptr<float>() = float(value);
    return out;
  }
  Tensor out = uninitialized(of.sizes(), ScalarType::Double);
  *out.mutable_data_ptr<double>() = value;
  return contiguous_as(out, of.scalar_type());
}

// The mean of numbers (n), 0-d.
template <class T>
Tensor mean_of(const Tensor& numbers) {
  const T* const v = numbers.const_data_ptr<T>();
  const int64_t n = numbers.numel();
  double sum = 0;
  for (int64_t i = 0; i < n; ++i) sum += double(v[i]);
  Tensor out = uninitialized({}, scalar_type<T>());
  *out.mutable_data_ptr<T>() = T(sum / double(n));
  return out;
}

// Gradients (n) by n numbers: as they are, or, 0-d, of the numbers' mean.
template <class T>
Tensor gradients_by_each(const Tensor& given, int64_t n) {
  if (given.dim() > 0) return contiguous_as(given, scalar_type<T>());
  Tensor out = uninitialized({n}, scalar_type<T>());
  std::fill_n(out.mutable_data_ptr<T>(), n, T(number_in(given) / double(n)));
  return out;
}

// Whether it is what gradients_by_each takes.
inline bool is_gradient_of(const Tensor& given, int64_t n) {
  return given.dim() == 0 || (given.dim() == 1 && given.numel() == n);
}

inline Tensor narrow_rows(const Tensor& a, int64_t start, int64_t length) {
  if (start == 0 && length == a.size(0)) return a;
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
        room_(uninitialized(
            {matrix.scalar_type() == scalar_type<T>() ? 0 : std::min(most, matrix.size(0)), matrix.size(1)},
            scalar_type<T>())) {}

  Tensor rows(int64_t first, int64_t count) {
    const Tensor source = narrow_rows(matrix_, first, count);
    if (matrix_.scalar_type() == scalar_type<T>()) return contiguous_as(source, scalar_type<T>());
    Tensor converted = narrow_rows(room_, 0, count);
    torch::stable::copy_(converted, source);
    return converted;
  }

 private:
  const Tensor matrix_;
  Tensor room_;
};

// torch.lerp
template <class T>
T between(T a, T b, T weight) {
  return weight < T(0.5) ? a + weight * (b - a) : b - (b - a) * (T(1) - weight);
}

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
