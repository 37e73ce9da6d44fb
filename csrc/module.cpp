// robustft._C: what was built and what this processor has. Knows nothing of torch, so that it loads without it and
// pybind11's headers never meet torch's own copy.
#include <pybind11/pybind11.h>

#include "cpu/isa.h"

namespace py = pybind11;

PYBIND11_MODULE(_C, m) {
  m.doc() = "Build facts and processor features of robustft's compiled code.";
  m.def(
      "build_info",
      [] {
        py::dict info;
        info["sources"] = ROBUSTFT_SOURCES;
        info["compiler"] = ROBUSTFT_COMPILER;
        info["torch_target"] = ROBUSTFT_TORCH_TARGET;
        info["torch_headers"] = ROBUSTFT_TORCH_HEADERS;
        info["cpu_variants"] = ROBUSTFT_CPU_VARIANTS;
        info["cuda_compiler"] = ROBUSTFT_CUDA_COMPILER;
        info["cuda_architectures"] = ROBUSTFT_CUDA_ARCHITECTURES;
        return info;
      },
      "The digest of the sources; compilers, torch versions, CPU variants and CUDA architectures this was built with.");
  m.def("detected_isa", [] { return robustft::name(robustft::detect_isa()); }, "The widest variant this CPU can run.");
  m.def(
      "active_isa", [] { return robustft::name(robustft::select_isa()); },
      "The variant in use: the widest, or a lower one named by ROBUSTFT_CPU_ISA.");
}
