// Calls the variant of a kernel that suits this processor: ROBUSTFT_CALL(function<T>, arguments...).
#pragma once
#include "isa.h"

#if defined(__x86_64__)
#define ROBUSTFT_CALL(function, ...)                                        \
  switch (::robustft::vector_isa()) {                                       \
    case ::robustft::Isa::amx:                                              \
    case ::robustft::Isa::avx512_bf16:                                      \
    case ::robustft::Isa::avx512: avx512::function(__VA_ARGS__); break;     \
    case ::robustft::Isa::avx2: avx2::function(__VA_ARGS__); break;         \
    case ::robustft::Isa::portable: portable::function(__VA_ARGS__); break; \
  }
#else
#define ROBUSTFT_CALL(function, ...) portable::function(__VA_ARGS__)
#endif
