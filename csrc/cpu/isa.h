// Which instruction set the kernels use, decided once per process.
//
// Only plain C++ here, no torch: the pybind module and the operator library both include it, and both hold isa.cpp.
#pragma once

namespace robustft {

// The last two are avx512 for vectors, and have instructions for products of bfloat16 (bf16.h): dot products of pairs,
// and the matrix unit.
enum class Isa { portable, avx2, avx512, avx512_bf16, amx };

inline const char* name(Isa isa) {
  switch (isa) {
    case Isa::amx: return "amx";
    case Isa::avx512_bf16: return "avx512_bf16";
    case Isa::avx512: return "avx512";
    case Isa::avx2: return "avx2";
    default: return "portable";
  }
}

// The widest set this processor and operating system have.
Isa detect_isa();

// ROBUSTFT_CPU_ISA can lower the choice (tests use it), never raise it above what the processor has; a build with
// bfloat16's instructions emulated can be asked for them anywhere.
Isa select_isa();

// The set of the vector kernels: the selected one, without bfloat16's instructions.
Isa vector_isa();

// Asks the system to let this process use the matrix unit; once per process, before the first tile.
bool request_amx();

// Whether there are dot products of bfloat16: a virtual machine may show the matrix unit alone.
bool has_dot_products();

}  // namespace robustft
