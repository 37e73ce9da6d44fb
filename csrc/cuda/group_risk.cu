// Sums of losses by group, and the risk of each group with its gradient, on the GPU: the mathematics of
// cpu/group_risk.cpp.
//
//   group_sums           v (n), y (n) -> sums (G), counts (G)            one launch: a block a group
//   group_risk           v, y -> mean (G), worst (), worst_group ()      a second one, of one block
//   group_risk_backward  d mean (G), d worst () -> d v (n)               one launch: a thread a loss
//
// A block reads all n pairs: n and G are small (a batch, a few hundred domains) and the reads hit the cache. Every sum
// has one writer and one order of addition, so the result repeats to the bit. To look at the groups would be to wait
// for the GPU: those outside [0, G) are counted nowhere and their losses have no gradient.
#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>

#include "device.h"

namespace robustft {
namespace {

constexpr int kGroupThreads = 256, kGroupWarps = kGroupThreads / kWarp;

template <class T>
__global__ void __launch_bounds__(kGroupThreads)
    group_sums_kernel(const T* __restrict__ values, const int64_t* __restrict__ groups, int64_t n, T* __restrict__ sums,
                      int64_t* __restrict__ counts) {
  __shared__ T warp_sums[kGroupWarps];
  __shared__ int64_t warp_counts[kGroupWarps];
  T sum = 0;
  int64_t count = 0;
  for (int64_t i = threadIdx.x; i < n; i += kGroupThreads)
    if (groups[i] == int64_t(blockIdx.x)) {
      sum += values[i];
      ++count;
    }
  sum = warp_sum(sum);
  count = warp_sum(count);
  if (threadIdx.x % kWarp == 0) {
    warp_sums[threadIdx.x / kWarp] = sum;
    warp_counts[threadIdx.x / kWarp] = count;
  }
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int w = 1; w < kGroupWarps; ++w) {
    sum += warp_sums[w];
    count += warp_counts[w];
  }
  sums[blockIdx.x] = sum;
  counts[blockIdx.x] = count;
}

// The mean of a group as it competes to be the worst: NaN is the largest, as in torch.argmax; of equal ones the first
// group; -1 for none.
template <class T>
struct Worst {
  T mean;
  int64_t group;

  __device__ bool worse_than(const Worst& other) const {
    if (group < 0 || other.group < 0) return other.group < 0 && group >= 0;
    const bool nan = mean != mean, other_nan = other.mean != other.mean;
    if (nan != other_nan) return nan;
    return mean > other.mean || ((nan || mean == other.mean) && group < other.group);
  }
};

// Divides the sums in place and finds the worst group; without a loss in any group that is group 0, of mean 0.
template <class T>
__global__ void __launch_bounds__(kWarp)
    group_means_kernel(T* __restrict__ sums, const int64_t* __restrict__ counts, int64_t num_groups,
                       T* __restrict__ worst_mean, int64_t* __restrict__ worst_group) {
  Worst<T> worst{0, -1};
  for (int64_t g = threadIdx.x; g < num_groups; g += kWarp) {
    if (counts[g] == 0) continue;
    const Worst<T> own{sums[g] / T(counts[g]), g};
    sums[g] = own.mean;
    if (own.worse_than(worst)) worst = own;
  }
  for (int lane = kWarp / 2; lane > 0; lane /= 2) {
    const Worst<T> other{__shfl_xor_sync(kWholeWarp, worst.mean, lane), __shfl_xor_sync(kWholeWarp, worst.group, lane)};
    if (other.worse_than(worst)) worst = other;
  }
  if (threadIdx.x != 0) return;
  *worst_mean = worst.mean;
  *worst_group = worst.group < 0 ? 0 : worst.group;
}

// `mean` or `worst` may be null, for a gradient that is zero.
template <class T>
__global__ void __launch_bounds__(kGroupThreads)
    group_gradient_kernel(const T* __restrict__ mean, const T* __restrict__ worst, const int64_t* __restrict__ groups,
                          int64_t n, const int64_t* __restrict__ worst_group, const int64_t* __restrict__ counts,
                          int64_t num_groups, T* __restrict__ out) {
  const int64_t i = int64_t(blockIdx.x) * kGroupThreads + threadIdx.x;
  if (i >= n) return;
  const int64_t group = groups[i];
  T gradient = 0;
  if (group >= 0 && group < num_groups) {
    if (mean) gradient += mean[group];
    if (worst && group == *worst_group) gradient += *worst;
    gradient /= T(counts[group]);
  }
  out[i] = gradient;
}

template <class T>
std::tuple<Tensor, Tensor> sums_of(const Tensor& values, const Tensor& groups, int64_t num_groups) {
  const Tensor v = contiguous_as(values, scalar_type<T>()), y = contiguous_as(groups, ScalarType::Long);
  Tensor sums = torch::stable::new_empty(v, {num_groups}), counts = torch::stable::new_empty(y, {num_groups});
  OnDevice(v).launch(group_sums_kernel<T>, num_groups, kGroupThreads, 0, v.const_data_ptr<T>(),
                     y.const_data_ptr<int64_t>(), v.numel(), sums.mutable_data_ptr<T>(),
                     counts.mutable_data_ptr<int64_t>());
  return {sums, counts};
}

std::tuple<Tensor, Tensor> group_sums(const Tensor& values, const Tensor& groups, int64_t num_groups) {
  STD_TORCH_CHECK(values.dim() == 1 && groups.dim() == 1 && values.numel() == groups.numel() && num_groups > 0,
                  "group_sums: values and groups must be (n,), num_groups positive");
  STD_TORCH_CHECK(num_groups < int64_t(1) << 31, "group_sums: more than 2^31 - 1 groups");
  const bool wide = values.scalar_type() == ScalarType::Double;
  return wide ? sums_of<double>(values, groups, num_groups) : sums_of<float>(values, groups, num_groups);
}

template <class T>
std::tuple<Tensor, Tensor, Tensor, Tensor> risk_of(Tensor sums, const Tensor& counts) {
  Tensor worst = torch::stable::new_empty(sums, {}), worst_group = torch::stable::new_empty(counts, {});
  OnDevice(sums).launch(group_means_kernel<T>, 1, kWarp, 0, sums.mutable_data_ptr<T>(),
                        counts.const_data_ptr<int64_t>(), sums.numel(), worst.mutable_data_ptr<T>(),
                        worst_group.mutable_data_ptr<int64_t>());
  return {sums, worst, worst_group, counts};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> group_risk(const Tensor& losses, const Tensor& groups, int64_t num_groups) {
  STD_TORCH_CHECK(losses.numel() > 0, "group_risk: no losses");
  const auto [sums, counts] = group_sums(losses, groups, num_groups);
  return losses.scalar_type() == ScalarType::Double ? risk_of<double>(sums, counts) : risk_of<float>(sums, counts);
}

template <class T>
Tensor risk_gradient(const std::optional<Tensor>& mean, const std::optional<Tensor>& worst, const Tensor& groups,
                     const Tensor& worst_group, const Tensor& counts) {
  const Tensor y = contiguous_as(groups, ScalarType::Long), c = contiguous_as(counts, ScalarType::Long);
  const Tensor w = contiguous_as(worst_group, ScalarType::Long);
  std::optional<Tensor> m, h;
  if (mean) m = contiguous_as(*mean, scalar_type<T>());
  if (worst) h = contiguous_as(*worst, scalar_type<T>());
  Tensor out = torch::stable::new_empty(c, {y.numel()}, scalar_type<T>());
  OnDevice(y).launch(group_gradient_kernel<T>, (y.numel() + kGroupThreads - 1) / kGroupThreads, kGroupThreads, 0,
                     m ? m->template const_data_ptr<T>() : nullptr, h ? h->template const_data_ptr<T>() : nullptr,
                     y.const_data_ptr<int64_t>(), y.numel(), w.const_data_ptr<int64_t>(), c.const_data_ptr<int64_t>(),
                     c.numel(), out.mutable_data_ptr<T>());
  return out;
}

Tensor group_risk_backward(const std::optional<Tensor>& mean, const std::optional<Tensor>& worst, const Tensor& groups,
                           const Tensor& worst_group, const Tensor& counts) {
  STD_TORCH_CHECK(mean || worst, "group_risk_backward: no gradient");
  STD_TORCH_CHECK(groups.dim() == 1 && counts.dim() == 1 && worst_group.numel() == 1 &&
                      (!mean || mean->numel() == counts.numel()) && (!worst || worst->numel() == 1),
                  "group_risk_backward: mean and counts must be (G,), worst and worst_group of one element");
  const bool wide = (mean ? *mean : *worst).scalar_type() == ScalarType::Double;
  return wide ? risk_gradient<double>(mean, worst, groups, worst_group, counts)
              : risk_gradient<float>(mean, worst, groups, worst_group, counts);
}

}  // namespace
}  // namespace robustft

STABLE_TORCH_LIBRARY_IMPL(robustft, CUDA, m) {
  m.impl("group_sums", TORCH_BOX(&robustft::group_sums));
  m.impl("group_risk", TORCH_BOX(&robustft::group_risk));
  m.impl("group_risk_backward", TORCH_BOX(&robustft::group_risk_backward));
}
