// The operators on class logits that losses are made of, as functions: classes.cpp.
#pragma once
#include <optional>
#include <string>
#include <tuple>

#include "classes.h"
#include "torch_api.h"

namespace robustft {

// See classes.cpp. The embeddings of two heads may come as two matrices: then w is the first's, `second` the other's.
struct ClassInputs {
  const Tensor &x, &w, &scale;
  const std::optional<Tensor>& bias;
  const Tensor& labels;
  const std::optional<Tensor>& targets;
  int64_t heads;
  const std::string& precision;
  const Tensor* second = nullptr;

  int64_t n() const { return x.size(0); }
  int64_t cols() const { return second ? heads * w.size(0) : w.size(0); }
  int64_t k() const { return cols() / heads; }

  void check(const char* op) const;
};

std::tuple<Tensor, Tensor> statistics_of_classes(const ClassInputs& in, const ClassStatisticsWanted& wanted, bool keep);

std::tuple<Tensor, Tensor, Tensor> gradient_of_classes(const ClassInputs& in, const Tensor& exponentials,
                                                       const Tensor& coefficients, bool top1);

}  // namespace robustft
