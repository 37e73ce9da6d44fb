// sums_g = sum over {i: groups_i = g} of values_i, and how many there are. Serial and in index order: N numbers are
// nothing beside the losses they come from, and the order makes the result exact to repeat.
#include <tuple>

#include "torch_api.h"

namespace robustft {
namespace {

template <class T>
void accumulate(const Tensor& values, const int64_t* groups, int64_t num_groups, Tensor& sums, int64_t* counts) {
  const T* v = values.const_data_ptr<T>();
  T* s = sums.mutable_data_ptr<T>();
  for (int64_t i = 0; i < values.numel(); ++i) {
    STD_TORCH_CHECK(groups[i] >= 0 && groups[i] < num_groups, "group_sums: group ", groups[i], " at index ", i,
                    " is outside [0, ", num_groups, ")");
    s[groups[i]] += v[i];
    ++counts[groups[i]];
  }
}

std::tuple<Tensor, Tensor> group_sums(const Tensor& values, const Tensor& groups, int64_t num_groups) {
  STD_TORCH_CHECK(values.dim() == 1 && groups.dim() == 1 && values.numel() == groups.numel() && num_groups > 0,
                  "group_sums: values and groups must be (n,), num_groups positive");
  const bool wide = values.scalar_type() == ScalarType::Double;
  const ScalarType dtype = wide ? ScalarType::Double : ScalarType::Float;
  const Tensor v = contiguous_as(values, dtype), g = contiguous_as(groups, ScalarType::Long);
  Tensor sums = torch::stable::new_zeros(v, {num_groups});
  Tensor counts = torch::stable::new_zeros(g, {num_groups});
  const int64_t* pg = g.const_data_ptr<int64_t>();
  int64_t* pc = counts.mutable_data_ptr<int64_t>();
  wide ? accumulate<double>(v, pg, num_groups, sums, pc) : accumulate<float>(v, pg, num_groups, sums, pc);
  return {sums, counts};
}

}  // namespace
}  // namespace robustft

STABLE_TORCH_LIBRARY_IMPL(robustft, CPU, m) { m.impl("group_sums", TORCH_BOX(&robustft::group_sums)); }
