// The lowest and the highest norm of the rows of a matrix: row_norms.cpp.
#pragma once
#include "torch_api.h"

namespace robustft {

Tensor row_norms(const Tensor& x);

}  // namespace robustft
