// The operators of csrc/cuda as robustft_emulation::*, for tensors of the CPU: the same sources, run by cuda_runtime.h.
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/stableivalue_conversions.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <array>
#include <optional>
#include <tuple>

namespace torch::stable::accelerator {
struct NoGuard {
  explicit NoGuard(int) {}
};
}  // namespace torch::stable::accelerator

// The emulated calls succeed.
#define torch_c10_cuda_check_msg(error, file, function, line, include, message) ((void)(error), *(message) = nullptr)
#define torch_c10_cuda_free_error_msg(message) ((void)(message))
#define aoti_torch_get_current_cuda_stream(device, stream) (*(stream) = nullptr, 0)
#define DeviceGuard NoGuard
#define ROBUSTFT_CUDA_EMULATION
#define CUDA CPU
#define robustft robustft_emulation

#include "../../csrc/cuda/cvar.cu"
#include "../../csrc/cuda/group_risk.cu"
#include "../../csrc/cuda/neighbor_pack.cu"
#include "../../csrc/cuda/neighbors.cu"
#include "../../csrc/ops.cpp"

// The order of threads and blocks in what follows.
namespace robustft {
static int64_t set_order(int64_t seed) {
  emulation::order.seed(unsigned(seed));
  return seed;
}
}  // namespace robustft
STABLE_TORCH_LIBRARY_FRAGMENT(robustft, m) { m.def("set_order(int seed) -> int"); }
STABLE_TORCH_LIBRARY_IMPL(robustft, CompositeExplicitAutograd, m) {
  m.impl("set_order", TORCH_BOX(&robustft::set_order));
}
