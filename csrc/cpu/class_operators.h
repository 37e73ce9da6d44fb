// The operators on class logits that losses are made of, as functions: classes.cpp.
#pragma once
#include <optional>
#include <string>
#include <tuple>

#include "torch_api.h"

namespace robustft {

std::tuple<Tensor, Tensor> class_statistics(const Tensor& x, const Tensor& w, const Tensor& scale,
                                            const std::optional<Tensor>& bias, const Tensor& labels,
                                            const std::optional<Tensor>& targets, int64_t heads, bool misranked,
                                            bool means, bool keep, std::string precision);

std::tuple<Tensor, Tensor, Tensor> class_gradient(const Tensor& x, const Tensor& w, const Tensor& scale,
                                                  const std::optional<Tensor>& bias, const Tensor& labels,
                                                  const std::optional<Tensor>& targets, int64_t heads,
                                                  const Tensor& exponentials, const Tensor& coefficients, bool top1,
                                                  std::string precision);

}  // namespace robustft
