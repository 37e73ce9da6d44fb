// The only file that is compiled differently where bfloat16's instructions are emulated, or the compiler does not know
// them.
#include "isa.h"

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace robustft {
namespace {

#if defined(__x86_64__)
#if defined(ROBUSTFT_NO_BF16)
bool detect_amx() { return false; }
bool detect_dots() { return false; }
#else
// Tiles and their bfloat16 product, by the processor (cpuid leaf 7) and by the operating system (XCR0 bits 17, 18).
bool detect_amx() {
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d & (1u << 22)) || !(d & (1u << 24))) return false;
  if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & (1u << 27))) return false;  // xgetbv may be used
  uint32_t low, high;
  asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (low & (3u << 17)) == (3u << 17);
}

// AVX512_BF16, where AVX-512 is there.
bool detect_dots() {
  unsigned a, b, c, d;
  return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & (1u << 5));
}
#endif
#endif

}  // namespace

Isa detect_isa() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl"))
    return detect_amx() ? Isa::amx : detect_dots() ? Isa::avx512_bf16 : Isa::avx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Isa::avx2;
#endif
  return Isa::portable;
}

Isa select_isa() {
  const Isa have = detect_isa();
  const char* wanted = std::getenv("ROBUSTFT_CPU_ISA");
  if (!wanted) return have;
#if defined(ROBUSTFT_BF16_EMULATION)
  for (Isa isa : {Isa::avx512_bf16, Isa::amx})
    if (!std::strcmp(wanted, name(isa))) return isa;
#endif
  for (Isa isa : {Isa::portable, Isa::avx2, Isa::avx512, Isa::avx512_bf16, Isa::amx})
    if (!std::strcmp(wanted, name(isa))) return isa < have ? isa : have;
  return have;
}

Isa vector_isa() {
  static const Isa isa = std::min({select_isa(), detect_isa(), Isa::avx512});
  return isa;
}

bool request_amx() {
#if defined(ROBUSTFT_BF16_EMULATION)
  return true;
#elif defined(__x86_64__) && defined(__linux__)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

bool has_dot_products() {
#if defined(ROBUSTFT_BF16_EMULATION)
  return true;
#elif defined(__x86_64__)
  return detect_dots();
#else
  return false;
#endif
}

}  // namespace robustft
