// Rows of class logits that lie in memory: the classes that rank above the label. See misalignment.cpp.
#pragma once
#include "stored.h"

namespace robustft {

template <class P>
struct LogitRows {
  const P* z;  // (count, k), rows `stride` apart
  int64_t count, stride, k;
  const int64_t* labels;  // (count)
};

#define ROBUSTFT_DECLARE_MISALIGNMENT(isa)                                                              \
  namespace isa {                                                                                       \
  template <class P>                                                                                    \
  void misranked_sums(const LogitRows<P>&, bool top1, Wide<P>* offset, Wide<P>* sum, Wide<P>* label);   \
  template <class P>                                                                                    \
  void misranked_softmax(const LogitRows<P>&, bool top1, const Wide<P>* offset, const Wide<P>* log_sum, \
                         const Wide<P>* coefficient, P* gradient);                                      \
  }
ROBUSTFT_DECLARE_MISALIGNMENT(portable)
ROBUSTFT_DECLARE_MISALIGNMENT(avx2)
ROBUSTFT_DECLARE_MISALIGNMENT(avx512)
#undef ROBUSTFT_DECLARE_MISALIGNMENT

}  // namespace robustft
