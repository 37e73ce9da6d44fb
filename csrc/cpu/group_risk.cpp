// Sums of losses by group, and the risk of each group with its gradient.
//
//   v (n) losses, y (n) groups in [0, G)
//   sums_g  = sum over {i: y_i = g} of v_i,   counts_g how many there are
//   mean_g  = sums_g / counts_g, 0 for an empty group;   worst = the first largest mean of those that are not empty
//   d v_i   = (d mean_{y_i} + [y_i = worst group] d worst) / counts_{y_i}
//
// Serial and in index order: N numbers are nothing beside the losses they come from, and the order makes the result
// exact to repeat. One operator for all of it: at N = 512 a dozen calls of torch cost more than the arithmetic.
#include <optional>
#include <tuple>
#include <vector>

#include "torch_api.h"

namespace robustft {
namespace {

void check_range(const Tensor& groups, int64_t num_groups) {
  const int64_t* y = groups.const_data_ptr<int64_t>();
  for (int64_t i = 0, n = groups.numel(); i < n; ++i)
    STD_TORCH_CHECK(y[i] >= 0 && y[i] < num_groups, "group_sums: group ", y[i], " at index ", i, " is outside [0, ",
                    num_groups, ")");
}

// In kLanes sums a group, each of every kLanes-th value: an addition need not wait for the one before.
template <class T>
void accumulate(const Tensor& values, const int64_t* groups, Tensor& sums, Tensor& counts) {
  constexpr int64_t kLanes = 4;
  struct Partial {
    T sum;
    int64_t count;
  };
  const int64_t n = values.numel(), num_groups = sums.numel();
  const T* v = values.const_data_ptr<T>();
  std::vector<Partial> partial(kLanes * num_groups, Partial{0, 0});
  for (int64_t i = 0; i < n; ++i) {
    Partial& p = partial[i % kLanes * num_groups + groups[i]];
    p.sum += v[i];
    ++p.count;
  }
  T* s = sums.mutable_data_ptr<T>();
  int64_t* c = counts.mutable_data_ptr<int64_t>();
  for (int64_t l = 0; l < kLanes; ++l)
    for (int64_t g = 0; g < num_groups; ++g) {
      s[g] = (l ? s[g] : T(0)) + partial[l * num_groups + g].sum;
      c[g] = (l ? c[g] : 0) + partial[l * num_groups + g].count;
    }
}

std::tuple<Tensor, Tensor> group_sums(const Tensor& values, const Tensor& groups, int64_t num_groups) {
  STD_TORCH_CHECK(values.dim() == 1 && groups.dim() == 1 && values.numel() == groups.numel() && num_groups > 0,
                  "group_sums: values and groups must be (n,), num_groups positive");
  const bool wide = values.scalar_type() == ScalarType::Double;
  const ScalarType dtype = wide ? ScalarType::Double : ScalarType::Float;
  const Tensor v = contiguous_as(values, dtype), g = contiguous_as(groups, ScalarType::Long);
  check_range(g, num_groups);
  Tensor sums = uninitialized({num_groups}, v.scalar_type()), counts = uninitialized({num_groups}, g.scalar_type());
  const int64_t* pg = g.const_data_ptr<int64_t>();
  wide ? accumulate<double>(v, pg, sums, counts) : accumulate<float>(v, pg, sums, counts);
  return {sums, counts};
}

// Divides the sums in place; returns the worst group. A NaN is the largest, as in torch.argmax.
template <class T>
int64_t means(T* sums, const int64_t* counts, int64_t num_groups) {
  int64_t worst = -1;
  for (int64_t g = 0; g < num_groups; ++g) {
    if (counts[g] == 0) continue;
    sums[g] /= T(counts[g]);
    const bool larger = worst < 0 || sums[g] > sums[worst] || (sums[g] != sums[g] && sums[worst] == sums[worst]);
    worst = larger ? g : worst;
  }
  return worst;
}

template <class T>
std::tuple<Tensor, Tensor, Tensor, Tensor> risk_of(Tensor sums, Tensor counts) {
  T* mean = sums.mutable_data_ptr<T>();
  const int64_t index = means(mean, counts.const_data_ptr<int64_t>(), sums.numel());
  Tensor worst = uninitialized({}, sums.scalar_type()), worst_group = uninitialized({}, counts.scalar_type());
  *worst.mutable_data_ptr<T>() = mean[index];
  *worst_group.mutable_data_ptr<int64_t>() = index;
  return {sums, worst, worst_group, counts};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> group_risk(const Tensor& losses, const Tensor& groups, int64_t num_groups) {
  STD_TORCH_CHECK(losses.numel() > 0, "group_risk: no losses");
  auto [sums, counts] = group_sums(losses, groups, num_groups);
  return losses.scalar_type() == ScalarType::Double ? risk_of<double>(sums, counts) : risk_of<float>(sums, counts);
}

template <class T>
Tensor gradient(const std::optional<Tensor>& mean, const std::optional<Tensor>& worst, const Tensor& groups,
                int64_t worst_group, const Tensor& counts) {
  const int64_t num_groups = counts.numel();
  const int64_t* count = counts.const_data_ptr<int64_t>();
  std::vector<T> weight(num_groups, T(0));
  if (mean) {  // by strides: that of a sum of the means is one number
    const Tensor given = mean->scalar_type() == scalar_type<T>() ? *mean : contiguous_as(*mean, scalar_type<T>());
    const T* const by = given.template const_data_ptr<T>();
    for (int64_t g = 0, stride = given.stride(0); g < num_groups; ++g) weight[g] = by[g * stride];
  }
  if (worst) weight[worst_group] += T(number_in(*worst));
  for (int64_t g = 0; g < num_groups; ++g) weight[g] /= T(std::max<int64_t>(1, count[g]));
  Tensor out = uninitialized({groups.numel()}, scalar_type<T>());
  T* d = out.mutable_data_ptr<T>();
  const int64_t* y = groups.const_data_ptr<int64_t>();
  for (int64_t i = 0, n = groups.numel(); i < n; ++i) d[i] = weight[y[i]];
  return out;
}

Tensor group_risk_backward(const std::optional<Tensor>& mean, const std::optional<Tensor>& worst, const Tensor& groups,
                           const Tensor& worst_group, const Tensor& counts) {
  const Tensor y = contiguous_as(groups, ScalarType::Long), c = contiguous_as(counts, ScalarType::Long);
  STD_TORCH_CHECK(mean || worst, "group_risk_backward: no gradient");
  STD_TORCH_CHECK(y.dim() == 1 && c.dim() == 1 && worst_group.numel() == 1 &&
                      (!mean || (mean->dim() == 1 && mean->numel() == c.numel())) && (!worst || worst->numel() == 1),
                  "group_risk_backward: mean and counts must be (G,), worst and worst_group of one element");
  check_range(y, c.numel());
  const int64_t index = *contiguous_as(worst_group, ScalarType::Long).const_data_ptr<int64_t>();
  STD_TORCH_CHECK(index >= 0 && index < c.numel(), "group_risk_backward: worst_group outside [0, G)");
  const bool wide = (mean ? *mean : *worst).scalar_type() == ScalarType::Double;
  return wide ? gradient<double>(mean, worst, y, index, c) : gradient<float>(mean, worst, y, index, c);
}

}  // namespace
}  // namespace robustft

STABLE_TORCH_LIBRARY_IMPL(robustft, CPU, m) {
  m.impl("group_sums", TORCH_BOX(&robustft::group_sums));
  m.impl("group_risk", TORCH_BOX(&robustft::group_risk));
  m.impl("group_risk_backward", TORCH_BOX(&robustft::group_risk_backward));
}
