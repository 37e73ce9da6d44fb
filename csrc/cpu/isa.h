// Which instruction set the kernels use, decided once per process.
//
// Only plain C++ here, no torch: the pybind module and the operator library both include it.
#pragma once
#include <cstdlib>
#include <cstring>

namespace robustft {

enum class Isa { portable, avx2, avx512 };

inline const char* name(Isa isa) {
  switch (isa) {
    case Isa::avx512: return "avx512";
    case Isa::avx2: return "avx2";
    default: return "portable";
  }
}

// The widest set this processor and operating system have.
inline Isa detect_isa() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl"))
    return Isa::avx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Isa::avx2;
#endif
  return Isa::portable;
}

// ROBUSTFT_CPU_ISA can lower the choice (tests use it), never raise it above what the processor has.
inline Isa select_isa() {
  const Isa have = detect_isa();
  const char* wanted = std::getenv("ROBUSTFT_CPU_ISA");
  if (!wanted) return have;
  for (Isa isa : {Isa::portable, Isa::avx2, Isa::avx512})
    if (!std::strcmp(wanted, name(isa))) return isa < have ? isa : have;
  return have;
}

}  // namespace robustft
