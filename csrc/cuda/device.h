// What the CUDA kernels share: launches on torch's current stream, and the instructions that have no name in C++.
//
// A test compiles these kernels for the processor (tests/cuda_emulation), with its own thread indices, barriers, warp
// exchanges and the four instructions at the end of this file; nothing else of them changes.
#pragma once
#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

#include <utility>

#include "../cpu/torch_api.h"

namespace robustft {

constexpr int kWarp = 32;
constexpr unsigned kWholeWarp = 0xffffffffu;

// Makes a tensor's device the current one while it lives; kernels go to that device's current stream.
class OnDevice {
 public:
  explicit OnDevice(const Tensor& tensor) : guard_(tensor.get_device_index()) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }

  template <class... Parameters, class... Arguments>
  void launch(void (*kernel)(Parameters...), int64_t blocks, int threads, int64_t shared_bytes,
              Arguments&&... arguments) const {
    if (blocks == 0) return;
    constexpr int64_t kFree = 48 << 10;  // what a kernel may have without asking
    if (shared_bytes > kFree)
      STD_CUDA_CHECK(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                          cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_bytes)));
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(unsigned(blocks));
    config.blockDim = dim3(unsigned(threads));
    config.dynamicSmemBytes = size_t(shared_bytes);
    config.stream = stream_;
    STD_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(std::forward<Arguments>(arguments))...));
  }

  int64_t processors() const {
    int device = 0, count = 0;
    STD_CUDA_CHECK(cudaGetDevice(&device));
    STD_CUDA_CHECK(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device));
    return count;
  }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_;
};

// The sum over the lanes, the same in all of them; `value` of lane l is added in an order that is always the same.
template <class T>
__device__ inline T warp_sum(T value) {
  for (int lane = kWarp / 2; lane > 0; lane /= 2) value += __shfl_xor_sync(kWholeWarp, value, lane);
  return value;
}

#ifdef ROBUSTFT_CUDA_EMULATION
}  // namespace robustft
#include "instructions.h"
#else

__device__ inline char* dynamic_shared() {
  extern __shared__ uint4 dynamic_shared_memory[];
  return reinterpret_cast<char*>(dynamic_shared_memory);
}

// Starts to copy 16 bytes to shared memory, or to fill them with 0.
__device__ inline void copy_async(void* shared, const void* global, bool valid) {
  const unsigned to = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(global), "r"(valid ? 16 : 0) : "memory");
}
__device__ inline void copies_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until all but the `Pending` last groups of this thread's copies are there.
template <int Pending>
__device__ inline void copies_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory");
}

// Four 8 x 8 matrices of 16-bit numbers; lane l names the row l % 8 of matrix l / 8 and gets, of each matrix, the two
// neighbours that start at row l / 4, column 2 (l % 4).
__device__ inline void load_matrices(unsigned (&out)[4], const void* shared_row) {
  const unsigned from = static_cast<unsigned>(__cvta_generic_to_shared(shared_row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(from)
               : "memory");
}

// c (16, 8) += a (16, 16) b (16, 8), bfloat16 factors. Of c, lane l holds rows l / 4 (c[0], c[1]) and l / 4 + 8, and
// the columns from 2 (l % 4). a: the four 8 x 8 quarters, top before bottom, left before right; b: b0 above b1.
__device__ inline void multiply_add(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

}  // namespace robustft
#endif
