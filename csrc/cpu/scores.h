// A row of cosines with the classes: its scores. See scores.cpp for the mathematics.
#pragma once
#include <cstdint>

namespace robustft {

// The rows of the scores (kCount, n).
namespace class_score {
enum : int64_t { kMaxCosine, kMcm, kMsp, kEnergy, kEntropy, kCount };
}

// Rows [row0, row0 + rows) of the cosines (n, k).
template <class T>
struct CosinePanel {
  const T* cosines;  // (rows, k)
  int64_t row0, rows, n, k;
  T inverse_temperature, scale;
};

#define ROBUSTFT_DECLARE_SCORES(isa)                                        \
  namespace isa {                                                           \
  template <class T>                                                        \
  void class_scores(const CosinePanel<T>&, T* scores, int64_t* prediction); \
  }
ROBUSTFT_DECLARE_SCORES(portable)
ROBUSTFT_DECLARE_SCORES(avx2)
ROBUSTFT_DECLARE_SCORES(avx512)
#undef ROBUSTFT_DECLARE_SCORES

}  // namespace robustft
