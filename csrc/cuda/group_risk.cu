// sums_g = sum over {i: groups_i = g} of values_i, and how many there are.
//
// One block a group reads all N pairs: N and the number of groups are small (a batch, a few hundred domains), the reads
// hit L2, and every sum has one writer and one order of addition, so the result repeats bit for bit. Groups outside
// [0, num_groups) are counted nowhere; the host checks them where it can without a synchronisation.
#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <tuple>

namespace robustft {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int kThreads = 256;

template <class T>
__global__ void group_sums_kernel(const T* __restrict__ values, const int64_t* __restrict__ groups, int64_t n,
                                  T* __restrict__ sums, int64_t* __restrict__ counts) {
  __shared__ T shared_sum[kThreads];
  __shared__ int64_t shared_count[kThreads];
  T sum = 0;
  int64_t count = 0;
  for (int64_t i = threadIdx.x; i < n; i += kThreads)
    if (groups[i] == blockIdx.x) {
      sum += values[i];
      ++count;
    }
  shared_sum[threadIdx.x] = sum;
  shared_count[threadIdx.x] = count;
  __syncthreads();
  for (int half = kThreads / 2; half > 0; half /= 2) {
    if (threadIdx.x < half) {
      shared_sum[threadIdx.x] += shared_sum[threadIdx.x + half];
      shared_count[threadIdx.x] += shared_count[threadIdx.x + half];
    }
    __syncthreads();
  }
  if (threadIdx.x == 0) {
    sums[blockIdx.x] = shared_sum[0];
    counts[blockIdx.x] = shared_count[0];
  }
}

template <class T>
void launch(const Tensor& values, const Tensor& groups, int64_t num_groups, Tensor& sums, Tensor& counts,
            void* stream) {
  group_sums_kernel<T><<<static_cast<unsigned>(num_groups), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
      values.const_data_ptr<T>(), groups.const_data_ptr<int64_t>(), values.numel(), sums.mutable_data_ptr<T>(),
      counts.mutable_data_ptr<int64_t>());
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

std::tuple<Tensor, Tensor> group_sums(const Tensor& values, const Tensor& groups, int64_t num_groups) {
  STD_TORCH_CHECK(values.dim() == 1 && groups.dim() == 1 && values.numel() == groups.numel() && num_groups > 0,
                  "group_sums: values and groups must be (n,), num_groups positive");
  const torch::stable::accelerator::DeviceGuard guard(values.get_device_index());
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(values.get_device_index(), &stream));
  const bool wide = values.scalar_type() == ScalarType::Double;
  const Tensor v = torch::stable::contiguous(torch::stable::to(values, wide ? ScalarType::Double : ScalarType::Float));
  const Tensor g = torch::stable::contiguous(torch::stable::to(groups, ScalarType::Long));
  Tensor sums = torch::stable::new_empty(v, {num_groups});
  Tensor counts = torch::stable::new_empty(g, {num_groups});
  wide ? launch<double>(v, g, num_groups, sums, counts, stream) : launch<float>(v, g, num_groups, sums, counts, stream);
  return {sums, counts};
}

}  // namespace
}  // namespace robustft

STABLE_TORCH_LIBRARY_IMPL(robustft, CUDA, m) { m.impl("group_sums", TORCH_BOX(&robustft::group_sums)); }
