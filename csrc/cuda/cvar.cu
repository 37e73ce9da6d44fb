// Conditional value at risk on the GPU: the mathematics and the outputs of cpu/cvar.cpp, in one launch each way.
//
//   cvar      losses (n) -> value (), boundary (2)        one block: five or nine reads of the losses, from cache
//   backward  grad (), losses, boundary -> gradient (n)   one block: ties count in order of index, so it walks in order
//
// One block, because n is a batch: what counts is the number of launches. Each thread adds every kThreads-th loss in
// double and the threads' sums are added in one order, so the result repeats to the bit. Nothing waits for the host.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <tuple>

#include "select.h"

namespace robustft {
namespace {

constexpr int kCvarThreads = 1024, kCvarWarps = kCvarThreads / kWarp;

// The rank from 0 of the last loss that counts, and how much of it does.
struct CvarBudget {
  double budget;
  int64_t last;
  double last_share;

  CvarBudget(int64_t n, double alpha)
      : budget(alpha * double(n)),
        last(std::min<int64_t>(n, std::max<int64_t>(1, int64_t(std::ceil(budget)))) - 1),
        last_share(budget - double(last)) {}
};

template <class T>
__global__ void __launch_bounds__(kCvarThreads) cvar_kernel(const T* __restrict__ losses, int64_t n, CvarBudget b,
                                                            T* __restrict__ value, double* __restrict__ boundary) {
  using Key = decltype(key_of(T()));
  __shared__ SelectMemory memory;
  __shared__ double sums[kCvarWarps];
  __shared__ int64_t counts[kCvarWarps];
  const Key key = select<Key>(n, b.last, [=](int64_t i) { return key_of(losses[i]); }, memory);
  double sum = 0;
  int64_t above = 0;
  for (int64_t i = threadIdx.x; i < n; i += kCvarThreads)
    if (key_of(losses[i]) > key) {
      sum += double(losses[i]);
      ++above;
    }
  sum = warp_sum(sum);
  above = warp_sum(above);
  if (threadIdx.x % kWarp == 0) {
    sums[threadIdx.x / kWarp] = sum;
    counts[threadIdx.x / kWarp] = above;
  }
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int w = 1; w < kCvarWarps; ++w) {
    sum += sums[w];
    above += counts[w];
  }
  const double threshold = double(number_of(key));
  *value = T((sum + (b.budget - double(above)) * threshold) / b.budget);
  boundary[0] = threshold;
  boundary[1] = double(b.last - above);
}

template <class T>
__global__ void __launch_bounds__(kCvarThreads)
    cvar_backward_kernel(const T* __restrict__ grad, const T* __restrict__ losses, int64_t n, CvarBudget b,
                         const double* __restrict__ boundary, T* __restrict__ out) {
  __shared__ int ties[2][kCvarWarps];
  const auto key = key_of(T(boundary[0]));
  const int64_t whole = int64_t(boundary[1]);
  const double g = double(*grad) / b.budget;
  const int lane = int(threadIdx.x) % kWarp, warp = int(threadIdx.x) / kWarp;
  int64_t before = 0;  // ties in the pieces done
  for (int64_t begin = 0, piece = 0; begin < n; begin += kCvarThreads, ++piece) {
    const int64_t i = begin + threadIdx.x;
    const auto own = i < n ? key_of(losses[i]) : decltype(key)(0);
    const unsigned tied = __ballot_sync(kWholeWarp, i < n && own == key);
    // Two rows in turn: a warp may be a piece ahead of the one that still reads.
    if (lane == 0) ties[piece % 2][warp] = __popc(tied);
    __syncthreads();
    int64_t rank = before + __popc(tied & ((1u << lane) - 1));
    for (int w = 0; w < kCvarWarps; ++w) {
      const int count = ties[piece % 2][w];
      rank += w < warp ? count : 0;
      before += count;
    }
    if (i >= n) continue;
    if (own != key)
      out[i] = own > key ? T(g) : T(0);
    else
      out[i] = rank < whole ? T(g) : rank == whole ? T(g * b.last_share) : T(0);
  }
}

void check_cvar(const Tensor& losses, double alpha) {
  STD_TORCH_CHECK(losses.dim() == 1 && losses.numel() > 0, "cvar: losses must be (n,), n at least 1");
  STD_TORCH_CHECK(losses.numel() < int64_t(1) << 31, "cvar: more than 2^31 - 1 losses");
  STD_TORCH_CHECK(alpha > 0 && alpha <= 1, "cvar: alpha is ", alpha, "; expected a fraction in (0, 1]");
}

template <class T>
std::tuple<Tensor, Tensor> cvar_of(const Tensor& losses, double alpha) {
  const Tensor v = contiguous_as(losses, scalar_type<T>());
  Tensor value = torch::stable::new_empty(v, {});
  Tensor boundary = torch::stable::new_empty(v, {2}, ScalarType::Double);
  OnDevice(v).launch(cvar_kernel<T>, 1, kCvarThreads, 0, v.const_data_ptr<T>(), v.numel(), CvarBudget(v.numel(), alpha),
                     value.mutable_data_ptr<T>(), boundary.mutable_data_ptr<double>());
  return {value, boundary};
}

template <class T>
Tensor cvar_gradient(const Tensor& grad, const Tensor& losses, double alpha, const Tensor& boundary) {
  const Tensor v = contiguous_as(losses, scalar_type<T>()), g = contiguous_as(grad, scalar_type<T>());
  const Tensor b = contiguous_as(boundary, ScalarType::Double);
  Tensor out = torch::stable::empty_like(v);
  OnDevice(v).launch(cvar_backward_kernel<T>, 1, kCvarThreads, 0, g.const_data_ptr<T>(), v.const_data_ptr<T>(),
                     v.numel(), CvarBudget(v.numel(), alpha), b.const_data_ptr<double>(), out.mutable_data_ptr<T>());
  return out;
}

std::tuple<Tensor, Tensor> cvar(const Tensor& losses, double alpha) {
  check_cvar(losses, alpha);
  return losses.scalar_type() == ScalarType::Double ? cvar_of<double>(losses, alpha) : cvar_of<float>(losses, alpha);
}

Tensor cvar_backward(const Tensor& grad, const Tensor& losses, double alpha, const Tensor& boundary) {
  check_cvar(losses, alpha);
  STD_TORCH_CHECK(grad.numel() == 1 && boundary.numel() == 2 && boundary.scalar_type() == ScalarType::Double,
                  "cvar_backward: grad must have one element, boundary two of float64");
  const ScalarType dtype = losses.scalar_type();
  if (dtype == ScalarType::Double) return cvar_gradient<double>(grad, losses, alpha, boundary);
  return contiguous_as(cvar_gradient<float>(grad, losses, alpha, boundary), dtype);
}

}  // namespace
}  // namespace robustft

STABLE_TORCH_LIBRARY_IMPL(robustft, CUDA, m) {
  m.impl("cvar", TORCH_BOX(&robustft::cvar));
  m.impl("cvar_backward", TORCH_BOX(&robustft::cvar_backward));
}
