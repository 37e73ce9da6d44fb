// Streamed class logits: z = s x w^T + b, its softmax and the classes that rank above the label, and the gradient.
//
//   x (n, d) features, w (k, d) class embeddings, b (k) optional bias, y (n) labels, q (n, k) optional soft targets
//   statistics   per row, class_statistic in classes.h; `above` is the softmax over {z > z_y}, strictly
//   gradient     G = a p - b_y 1_y - u - v q + c (above - 1_y), coefficients per row, class_coefficient in classes.h
//                dx = s G w,  dw = s G^T x,  db = column sums of G
//
// A panel of rows holds all k classes (kPanelBytes, at least kMinRows rows), so both sweeps over a row run in cache.
// With `keep` the similarities S (n, k) are returned and the gradient reads them instead of multiplying again.
#include "classes.h"

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "dispatch.h"
#include "torch_api.h"

namespace robustft {
namespace {

constexpr int64_t kPanelBytes = 1 << 20;
constexpr int64_t kMinRows = 16;

struct ClassInputs {
  const Tensor &x, &w, &scale;
  const std::optional<Tensor>& bias;
  const Tensor& labels;
  const std::optional<Tensor>& targets;

  int64_t n() const { return x.size(0); }
  int64_t k() const { return w.size(0); }

  void check(const char* op) const {
    STD_TORCH_CHECK(x.dim() == 2 && w.dim() == 2 && x.size(1) == w.size(1) && n() > 0 && k() > 0, op,
                    ": x and w must be (n, d) and (k, d), n and k at least 1");
    STD_TORCH_CHECK(x.scalar_type() == w.scalar_type(), op, ": x and w differ in dtype");
    STD_TORCH_CHECK(scale.numel() == 1, op, ": scale must have one element");
    STD_TORCH_CHECK(!bias || bias->numel() == k(), op, ": bias must have one element a class");
    STD_TORCH_CHECK(labels.dim() == 1 && labels.numel() == n(), op, ": labels must be (n,)");
    STD_TORCH_CHECK(!targets || (targets->dim() == 2 && targets->size(0) == n() && targets->size(1) == k()), op,
                    ": targets must be (n, k)");
  }
};

// The inputs in the dtype of the computation, and how rows of S are made.
template <class T>
struct Classes {
  Tensor x, w, labels;
  std::optional<Tensor> bias, targets;
  T scale;
  int64_t rows;  // of a panel

  explicit Classes(const ClassInputs& in)
      : x(contiguous_as(in.x, scalar_type<T>())),
        w(contiguous_as(in.w, scalar_type<T>())),
        labels(contiguous_as(in.labels, ScalarType::Long)),
        scale(T(*contiguous_as(in.scale, ScalarType::Double).template const_data_ptr<double>())) {
    if (in.bias) bias = contiguous_as(*in.bias, scalar_type<T>());
    if (in.targets) targets = contiguous_as(*in.targets, scalar_type<T>());
    rows = std::min(in.n(), std::max<int64_t>(kMinRows, kPanelBytes / int64_t(sizeof(T)) / in.k()));
    const int64_t* p = labels.const_data_ptr<int64_t>();
    for (int64_t i = 0; i < in.n(); ++i)
      STD_TORCH_CHECK(p[i] >= 0 && p[i] < in.k(), "label ", p[i], " at index ", i, " is outside [0, ", in.k(), ")");
  }

  ClassPanel<T> panel(Tensor& s, int64_t row0) const {
    ClassPanel<T> p{};
    p.s = s.mutable_data_ptr<T>();
    p.row0 = row0, p.rows = s.size(0), p.n = x.size(0), p.k = w.size(0), p.scale = scale;
    p.bias = bias ? bias->const_data_ptr<T>() : nullptr;
    p.labels = labels.const_data_ptr<int64_t>();
    p.targets = targets ? targets->const_data_ptr<T>() : nullptr;
    return p;
  }

  // S for rows [i, i + out.size(0)), into out.
  void multiply(Tensor& out, int64_t i) const {
    Tensor all = w;
    mm_out(out, narrow_rows(x, i, out.size(0)), torch::stable::transpose(all, 0, 1));
  }
};

template <class T>
std::tuple<Tensor, Tensor> statistics(const ClassInputs& in, bool keep) {
  const Classes<T> classes(in);
  const int64_t n = in.n(), k = in.k();
  const int64_t kinds = in.targets ? class_statistic::kSoftCount : class_statistic::kHardCount;
  Tensor out = torch::stable::new_empty(in.x, {kinds, n}, scalar_type<T>());
  Tensor similarity = torch::stable::new_empty(in.x, {keep ? n : int64_t(0), k}, scalar_type<T>());
  Tensor workspace = torch::stable::new_empty(in.x, {keep ? int64_t(0) : classes.rows, k}, scalar_type<T>());
  T* result = out.mutable_data_ptr<T>();
  for (int64_t i = 0; i < n; i += classes.rows) {
    const int64_t rows = std::min(classes.rows, n - i);
    Tensor s = keep ? narrow_rows(similarity, i, rows) : narrow_rows(workspace, 0, rows);
    classes.multiply(s, i);
    const ClassPanel<T> panel = classes.panel(s, i);
    parallel_blocks(rows, k, [&](int64_t begin, int64_t end) {
      std::vector<T> z(k);
      ROBUSTFT_CALL(class_statistics<T>, panel, result, z.data(), begin, end);
    });
  }
  return {out, similarity};
}

template <class T>
std::tuple<Tensor, Tensor, Tensor> gradient(const ClassInputs& in, const Tensor& similarity, const Tensor& coefficients,
                                            bool top1) {
  const Classes<T> classes(in);
  const int64_t n = in.n(), k = in.k();
  const bool kept = similarity.size(0) == n;
  const Tensor c = contiguous_as(coefficients, scalar_type<T>());
  const T* per_row = c.const_data_ptr<T>();
  Tensor dx = torch::stable::new_zeros(classes.x, classes.x.sizes());
  Tensor dw = torch::stable::new_zeros(classes.w, classes.w.sizes());
  Tensor db = torch::stable::new_zeros(classes.w, {k});
  T* bias_gradient = db.mutable_data_ptr<T>();
  Tensor g = torch::stable::new_empty(in.x, {classes.rows, k}, scalar_type<T>());
  for (int64_t i = 0; i < n; i += classes.rows) {
    const int64_t rows = std::min(classes.rows, n - i);
    Tensor s = narrow_rows(g, 0, rows);
    if (kept)
      torch::stable::copy_(s, narrow_rows(similarity, i, rows));
    else
      classes.multiply(s, i);
    const ClassPanel<T> panel = classes.panel(s, i);
    parallel_blocks(rows, k, [&](int64_t begin, int64_t end) {
      ROBUSTFT_CALL(class_gradient<T>, panel, per_row, top1, begin, end);
    });
    parallel_blocks(k, rows, [&](int64_t begin, int64_t end) {
      for (int64_t r = 0; r < rows; ++r)
        for (int64_t j = begin; j < end; ++j) bias_gradient[j] += panel.s[r * k + j];
    });
    Tensor dx_rows = narrow_rows(dx, i, rows);
    add_mm(dx_rows, s, classes.w, double(classes.scale));
    add_mm(dw, torch::stable::transpose(s, 0, 1), narrow_rows(classes.x, i, rows), double(classes.scale));
  }
  const ScalarType dtype = in.x.scalar_type();
  return {contiguous_as(dx, dtype), contiguous_as(dw, dtype), db};
}

std::tuple<Tensor, Tensor> class_statistics(const Tensor& x, const Tensor& w, const Tensor& scale,
                                            const std::optional<Tensor>& bias, const Tensor& labels,
                                            const std::optional<Tensor>& targets, bool keep) {
  const ClassInputs in{x, w, scale, bias, labels, targets};
  in.check("class_statistics");
  return x.scalar_type() == ScalarType::Double ? statistics<double>(in, keep) : statistics<float>(in, keep);
}

std::tuple<Tensor, Tensor, Tensor> class_gradient(const Tensor& x, const Tensor& w, const Tensor& scale,
                                                  const std::optional<Tensor>& bias, const Tensor& labels,
                                                  const std::optional<Tensor>& targets, const Tensor& similarity,
                                                  const Tensor& coefficients, bool top1) {
  const ClassInputs in{x, w, scale, bias, labels, targets};
  in.check("class_gradient");
  STD_TORCH_CHECK(
      coefficients.dim() == 2 && coefficients.size(0) == class_coefficient::kCount && coefficients.size(1) == x.size(0),
      "class_gradient: coefficients must be (", int64_t(class_coefficient::kCount), ", n)");
  return x.scalar_type() == ScalarType::Double ? gradient<double>(in, similarity, coefficients, top1)
                                               : gradient<float>(in, similarity, coefficients, top1);
}

}  // namespace
}  // namespace robustft

STABLE_TORCH_LIBRARY_IMPL(robustft, CPU, m) {
  m.impl("class_statistics", TORCH_BOX(&robustft::class_statistics));
  m.impl("class_gradient", TORCH_BOX(&robustft::class_gradient));
}
