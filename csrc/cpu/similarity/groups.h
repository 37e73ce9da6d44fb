// Which samples share a label.
#pragma once
#include <algorithm>
#include <cstdint>
#include <numeric>
#include <optional>
#include <vector>

#include "../torch_api.h"

namespace robustft {
namespace similarity {

struct Groups {
  Tensor index;                 // (n) labels renumbered from 0: the kernels compare 32 bits
  std::vector<int64_t> counts;  // (n) how often each sample's occurs
};

// Of labels (n), or, without any, of samples each of its own.
inline Groups groups_of(int64_t n, const std::optional<Tensor>& labels) {
  Groups groups{uninitialized({n}, ScalarType::Long), {}};
  groups.counts.assign(n, 1);
  int64_t* index = groups.index.mutable_data_ptr<int64_t>();
  if (!labels) {
    std::iota(index, index + n, int64_t(0));
    return groups;
  }
  const Tensor given = contiguous_as(*labels, ScalarType::Long);
  const int64_t* y = given.const_data_ptr<int64_t>();
  std::vector<int64_t> values(y, y + n);
  std::sort(values.begin(), values.end());
  values.erase(std::unique(values.begin(), values.end()), values.end());
  std::vector<int64_t> count(values.size(), 0);
  for (int64_t i = 0; i < n; ++i) {
    index[i] = std::lower_bound(values.begin(), values.end(), y[i]) - values.begin();
    ++count[index[i]];
  }
  for (int64_t i = 0; i < n; ++i) groups.counts[i] = count[index[i]];
  return groups;
}

}  // namespace similarity
}  // namespace robustft
