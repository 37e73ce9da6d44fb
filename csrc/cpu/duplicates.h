// Rows of a matrix that repeat an earlier one bit for bit, as the embeddings of duplicate class names do.
//
// A matrix product may round equal columns differently, by where they lie in it. Where columns are compared, those of
// repeated rows are made equal: each gets the numbers of the first of its kind.
#pragma once
#include <cstring>
#include <utility>
#include <vector>

#include "torch_api.h"

namespace robustft {

template <class T>
class Duplicates {
 public:
  Duplicates() = default;

  // Of a contiguous (m, d) matrix in T. Sorts its rows as strings of bytes: most differ in the first eight already, so
  // that little more than these is read.
  explicit Duplicates(const Tensor& matrix) {
    struct Row {
      uint64_t head;
      int64_t index;
    };
    const int64_t m = matrix.size(0);
    const size_t bytes = matrix.size(1) * sizeof(T);
    if (!bytes) return;  // every product is 0
    const char* data = reinterpret_cast<const char*>(matrix.const_data_ptr<T>());
    const auto compared = [&](const Row& a, const Row& b) {
      return std::memcmp(data + a.index * bytes, data + b.index * bytes, bytes);
    };
    std::vector<Row> rows(m);
    for (int64_t j = 0; j < m; ++j) {
      rows[j] = {0, j};
      std::memcpy(&rows[j].head, data + j * bytes, std::min(bytes, sizeof(uint64_t)));
    }
    std::sort(rows.begin(), rows.end(), [&](const Row& a, const Row& b) {
      if (a.head != b.head) return a.head < b.head;
      const int order = compared(a, b);
      return order ? order < 0 : a.index < b.index;
    });
    for (int64_t j = 1, first = 0; j < m; ++j) {
      if (rows[j].head != rows[first].head || compared(rows[j], rows[first]))
        first = j;
      else
        repeated_.emplace_back(rows[j].index, rows[first].index);
    }
  }

  // products (rows, m), leading dimension ld, with the rows of the matrix as columns.
  void tie(T* products, int64_t rows, int64_t ld) const {
    if (repeated_.empty()) return;
    for (int64_t i = 0; i < rows; ++i)
      for (const auto& [repeated, first] : repeated_) products[i * ld + repeated] = products[i * ld + first];
  }

 private:
  std::vector<std::pair<int64_t, int64_t>> repeated_;  // (row, the first row equal to it)
};

}  // namespace robustft
