// The operators on S = x t^T that others are made of, as functions: statistics.cpp and gradient.cpp.
#pragma once
#include <optional>
#include <string>
#include <tuple>

#include "../torch_api.h"

namespace robustft {
namespace similarity {

std::tuple<Tensor, Tensor, Tensor, Tensor> similarity_statistics(const Tensor& x, const Tensor& t, const Tensor& scale,
                                                                 const Tensor& x_labels, const Tensor& t_labels,
                                                                 const std::optional<Tensor>& x_teacher,
                                                                 const std::optional<Tensor>& t_teacher,
                                                                 const std::optional<Tensor>& teacher_scale,
                                                                 bool totals, bool keep, std::string precision);

std::tuple<Tensor, Tensor> similarity_gradient(const Tensor& x, const Tensor& t, const Tensor& scale,
                                               const Tensor& x_labels, const Tensor& t_labels,
                                               const std::optional<Tensor>& x_teacher,
                                               const std::optional<Tensor>& t_teacher,
                                               const std::optional<Tensor>& teacher_scale, const Tensor& row,
                                               const Tensor& col, const Tensor& centers, const Tensor& kept,
                                               bool totals, std::string precision);

}  // namespace similarity
}  // namespace robustft
