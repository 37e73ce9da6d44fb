// Streamed class scores: out-of-distribution scores of x (n, d) against class embeddings w (k, d), both of unit norm.
//
//   c = x w^T,  m = max c,  a = 1 / temperature,  s scale,  p = softmax(s c)
//   max_cosine = m                                mcm = max softmax(a c) = 1 / sum exp(a (c - m))
//   energy = (1/s) logsumexp(s c)                 msp = max p            = 1 / sum exp(s (c - m))
//   entropy = sum p log p (not positive)          prediction = the first c that is m; of a row with NaN, which makes
//                                                 all its scores NaN, 0
//
// A thread multiplies a panel of rows by all classes and sweeps over its rows twice while it is in cache: for m, then
// for the sums. No (n, k) matrix exists. Features that are not in the dtype of the computation are converted a stretch
// of rows at a time.
//
// unit_scores is class_scores with what its caller looks at next: each score a tensor of its own, and the lowest and
// the highest norm of the rows of x, then of w. For one image a call of torch each would take longer than its scores;
// of many, the rows of a panel are measured while they are in cache for its product.
#include "scores.h"

#include <algorithm>
#include <tuple>
#include <vector>

#include "dispatch.h"
#include "duplicates.h"
#include "row_norms.h"
#include "tile.h"

namespace robustft {
namespace {

constexpr int64_t kPanelBytes = 1 << 21;
constexpr int64_t kMinRows = 32, kMaxRows = 512;
constexpr int64_t kStretchRows = 8192;

// With `norms`, the extremes of the rows of the features go there.
template <class T>
std::tuple<Tensor, Tensor> scores(const Tensor& features, const Tensor& embeddings, double temperature,
                                  const Tensor& logit_scale, const std::string& precision, NormExtremes<T>* norms) {
  const int64_t n = features.size(0), k = embeddings.size(0);
  const Arithmetic arithmetic = arithmetic_of(features.scalar_type(), precision);
  Tensor out = uninitialized({class_score::kCount, n}, scalar_type<T>());
  Tensor prediction = uninitialized({n}, ScalarType::Long);
  CosinePanel<T> shape{};
  shape.n = n, shape.k = k, shape.inverse_temperature = T(1 / temperature);
  shape.scale = T(number_in(logit_scale));
  const Tensor w = contiguous_as(embeddings, scalar_type<T>());
  const RightMatrix<T> right(w, RightMatrix<T>::kColumns, arithmetic);
  const Duplicates<T> duplicates(w);
  const int64_t rows = std::clamp(kPanelBytes / int64_t(sizeof(T)) / k / kMinRows * kMinRows, kMinRows,
                                  std::clamp(round_up(n / 8, kMinRows), 4 * kMinRows, kMaxRows));
  T* result = out.mutable_data_ptr<T>();
  int64_t* classes = prediction.mutable_data_ptr<int64_t>();
  Stretches<T> stretches(features, kStretchRows);
  Pool<Buffer<T>> pool;
  for (int64_t first = 0; first < n; first += kStretchRows) {
    const int64_t count = std::min(kStretchRows, n - first);
    const Tensor x = stretches.rows(first, count);
    std::vector<NormExtremes<T>> of_panels(norms ? (count + rows - 1) / rows : 0);
    torch::stable::parallel_for(0, (count + rows - 1) / rows, 1, [&](int64_t begin, int64_t end) {
      auto cosines = pool.take([&] { return Buffer<T>(rows * k); });
      for (int64_t i = begin * rows; i < std::min(end * rows, count); i += rows) {
        CosinePanel<T> panel = shape;
        panel.cosines = cosines->get(), panel.row0 = first + i, panel.rows = std::min(rows, count - i);
        const LeftRows<T> left(x, i, panel.rows, arithmetic);
        if (norms) of_panels[i / rows] = norm_extremes(left.rows, panel.rows, left.depth);
        multiply(left, 0, panel.rows, right, 0, k, cosines->get(), k);
        duplicates.tie(cosines->get(), panel.rows, k);
        ROBUSTFT_CALL(class_scores<T>, panel, result, classes);
      }
    });
    for (const NormExtremes<T>& of : of_panels) norms->add(of);
  }
  return {out, prediction};
}

void check(const char* op, const Tensor& x, const Tensor& w, const Tensor& scale) {
  STD_TORCH_CHECK(x.dim() == 2 && w.dim() == 2 && x.size(1) == w.size(1) && w.size(0) > 0, op,
                  ": x and w must be (n, d) and (k, d), k at least 1");
  STD_TORCH_CHECK(x.scalar_type() == w.scalar_type(), op, ": x and w differ in dtype");
  STD_TORCH_CHECK(scale.numel() == 1, op, ": scale must have one element");
}

std::tuple<Tensor, Tensor> class_scores(const Tensor& x, const Tensor& w, double temperature, const Tensor& scale,
                                        std::string precision) {
  check("class_scores", x, w, scale);
  return x.scalar_type() == ScalarType::Double ? scores<double>(x, w, temperature, scale, precision, nullptr)
                                               : scores<float>(x, w, temperature, scale, precision, nullptr);
}

template <class T>
Tensor row_of(const Tensor& matrix, int64_t i) {
  const int64_t n = matrix.size(1);
  Tensor out = uninitialized({n}, scalar_type<T>());
  std::copy_n(matrix.const_data_ptr<T>() + i * n, n, out.mutable_data_ptr<T>());
  return out;
}

using UnitScores = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

template <class T>
UnitScores with_norms(const Tensor& x, const Tensor& w, double temperature, const Tensor& scale,
                      const std::string& precision) {
  NormExtremes<T> of_x;
  const auto [all, prediction] = scores<T>(x, w, temperature, scale, precision, &of_x);
  const Tensor of_w = row_norms(w);
  Tensor norms = uninitialized({4}, scalar_type<T>());
  of_x.write(norms.mutable_data_ptr<T>());
  std::copy_n(of_w.const_data_ptr<T>(), 2, norms.mutable_data_ptr<T>() + 2);
  return {row_of<T>(all, class_score::kMaxCosine),
          row_of<T>(all, class_score::kMcm),
          row_of<T>(all, class_score::kMsp),
          row_of<T>(all, class_score::kEnergy),
          row_of<T>(all, class_score::kEntropy),
          prediction,
          norms};
}

UnitScores unit_scores(const Tensor& x, const Tensor& w, double temperature, const Tensor& scale,
                       std::string precision) {
  check("unit_scores", x, w, scale);
  STD_TORCH_CHECK(x.size(0) > 0, "unit_scores: x must have at least one row");
  return x.scalar_type() == ScalarType::Double ? with_norms<double>(x, w, temperature, scale, precision)
                                               : with_norms<float>(x, w, temperature, scale, precision);
}

}  // namespace
}  // namespace robustft

STABLE_TORCH_LIBRARY_IMPL(robustft, CPU, m) {
  m.impl("class_scores", TORCH_BOX(&robustft::class_scores));
  m.impl("unit_scores", TORCH_BOX(&robustft::unit_scores));
}
