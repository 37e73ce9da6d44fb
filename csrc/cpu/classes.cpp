// Streamed class logits: z = s x w^T + b, its softmax and the classes that rank above the label, and the gradient.
//
//   x (n, d) features, w (h k, d) class embeddings of h heads one below the other, or of two heads two matrices, b (h
//   k) optional bias, y (n) labels, q (n, k) optional soft targets of the last head statistics   per head and row,
//   class_statistic in classes.h; `above` is the softmax over {z > z_y}, strictly gradient     G = a p - b_y 1_y - u -
//   v q + c (above - 1_y), coefficients per head and row, class_coefficient
//                dx = s G w,  dw = s G^T x,  db = column sums of G; what lies in memory as G is s G
//
// A panel of rows holds all classes of all heads (some MB, at least kMinRows rows); the thread that owns it
// multiplies it and sweeps over its rows while it is in cache. The gradient goes by stretches of panels: first their
// owners write G and its dx, then, G of the whole stretch being there, threads own blocks of classes and add to dw. For
// few classes dw is summed in `parts` over the rows of a stretch, to give all threads something to do. Sizes
// follow from the shapes, and so do the bits of the result; only with more than two threads may panels get smaller, and
// where the whole product is too small to be shared out here aten may share it out: both round otherwise.
//
// Two matrices are multiplied each by itself where copying them into one would take longer than another product.
//
// With `keep` e = exp(z - max z) (n, h k) is returned, and the gradient reads it instead of multiplying again.
#include "classes.h"

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "class_operators.h"
#include "dispatch.h"
#include "duplicates.h"
#include "tile.h"

namespace robustft {
namespace {

constexpr int64_t kPanelBytes = 1 << 20;
constexpr int64_t kAtenPanelBytes = 1 << 22;      // aten packs w anew for every product: few of them
constexpr int64_t kMinRows = 64, kMaxRows = 512;  // of a panel; products of fewer rows are slower
constexpr int64_t kRowStep = 32;                  // what they are a multiple of
constexpr int64_t kStretchBytes = 1 << 23;        // of G
constexpr int64_t kMinStretch = 256;              // below, dw would be read and written too often
constexpr int64_t kConvertedRows = 8192;          // of features that are not in T are in memory at a time
constexpr int64_t kClassBlock = 256;
constexpr int64_t kClassTasks = 8;         // blocks times parts
constexpr int64_t kTaskWork = 1 << 20;     // multiplications worth waking a thread for
constexpr int64_t kJoinedBytes = 1 << 17;  // of two matrices that are copied into one

// The embeddings in T, contiguous: a matrix of all heads, or one each.
template <class T>
std::vector<Tensor> embeddings(const ClassInputs& in) {
  std::vector<Tensor> parts{contiguous_as(in.w, scalar_type<T>())};
  if (!in.second) return parts;
  parts.push_back(contiguous_as(*in.second, scalar_type<T>()));
  const int64_t size = parts[0].numel(), d = in.w.size(1);
  if (2 * size * int64_t(sizeof(T)) > kJoinedBytes) return parts;
  Tensor joined = uninitialized({in.cols(), d}, scalar_type<T>());
  for (int64_t i = 0; i < 2; ++i)
    std::copy_n(parts[i].template const_data_ptr<T>(), size, joined.mutable_data_ptr<T>() + i * size);
  return {joined};
}

// The inputs in the dtype of the computation, and how they are cut.
template <class T>
struct Classes {
  const ClassInputs& in;
  const Arithmetic arithmetic;
  const int64_t n, k, cols, d;      // cols: of all heads
  const std::vector<Tensor> parts;  // of w
  const int64_t width;              // classes of a part
  const Tensor labels;
  std::optional<Tensor> bias;
  const T scale;
  int64_t rows;  // of a panel

  explicit Classes(const ClassInputs& in)
      : in(in),
        arithmetic(arithmetic_of(in.x.scalar_type(), in.precision)),
        n(in.n()),
        k(in.k()),
        cols(in.cols()),
        d(in.x.size(1)),
        parts(embeddings<T>(in)),
        width(cols / int64_t(parts.size())),
        labels(contiguous_as(in.labels, ScalarType::Long)),
        scale(T(number_in(in.scale))) {
    if (in.bias) bias = contiguous_as(*in.bias, scalar_type<T>());
    // As the cache wants it, but not below the number of panels that threads want, nor that below what products want.
    const int64_t bytes = arithmetic == Arithmetic::ieee ? kAtenPanelBytes : kPanelBytes;
    const int64_t fitting = bytes / int64_t(sizeof(T)) / cols / kRowStep * kRowStep;
    rows = std::min(std::clamp(fitting, kMinRows, kMaxRows), std::max(4 * kMinRows, round_up((n + 7) / 8, kRowStep)));
    const int64_t threads = std::max<int64_t>(2, torch::stable::get_num_threads());
    rows = std::min(rows, std::max(kMinRows, round_up((n + threads - 1) / threads, kRowStep)));
    const int64_t* p = labels.const_data_ptr<int64_t>();
    for (int64_t i = 0; i < n; ++i)
      STD_TORCH_CHECK(p[i] >= 0 && p[i] < k, "label ", p[i], " at index ", i, " is outside [0, ", k, ")");
  }

  // Rows of a stretch of whole panels, `wanted` or a few more.
  int64_t stretch(int64_t wanted) const { return std::min(n, round_up(wanted, rows)); }

  // A head's part of the panel of rows [row0, row0 + height); `first` is the first row of the targets at hand.
  ClassPanel<T> panel(int64_t head, T* s, T* g, int64_t row0, int64_t height, const std::optional<Tensor>& targets,
                      int64_t first) const {
    ClassPanel<T> p{};
    p.s = s + head * k, p.g = g ? g + head * k : nullptr, p.ld = cols;
    p.row0 = row0, p.rows = height, p.n = n, p.k = k, p.scale = scale;
    p.bias = bias ? bias->template const_data_ptr<T>() + head * k : nullptr;
    p.labels = labels.const_data_ptr<int64_t>();
    p.targets = targets && head == in.heads - 1 ? targets->template const_data_ptr<T>() + (row0 - first) * k : nullptr;
    return p;
  }

  // The classes that must tie, if logits are multiplied now: those of several heads are not compared.
  Duplicates<T> duplicates(bool multiplied) const {
    return multiplied && in.heads == 1 ? Duplicates<T>(parts[0]) : Duplicates<T>();
  }

  // The parts on the right of a product, or, where they are not `wanted`, nothing.
  std::vector<RightMatrix<T>> right(typename RightMatrix<T>::Use use, bool wanted = true) const {
    std::vector<RightMatrix<T>> all;
    for (size_t p = 0; wanted && p < parts.size(); ++p) all.emplace_back(parts[p], use, arithmetic);
    return all;
  }

  // How many tasks of that many dot products are worth a thread.
  int64_t grain(int64_t products) const {
    return std::max<int64_t>(1, kTaskWork / (products * std::max<int64_t>(d, 1)));
  }

  // s (left.count, cols) = S of these rows
  void products(const LeftRows<T>& left, const std::vector<RightMatrix<T>>& columns, T* s) const {
    for (size_t p = 0; p < columns.size(); ++p)
      multiply(left, 0, left.count, columns[p], 0, width, s + p * width, cols);
  }

  // Calls f(first row, end) for every panel of rows [begin, begin + count), on all threads.
  template <class F>
  void for_each_panel(int64_t begin, int64_t count, const F& f) const {
    torch::stable::parallel_for(0, (count + rows - 1) / rows, grain(rows * cols), [&](int64_t first, int64_t last) {
      for (int64_t p = first; p < last; ++p) f(begin + p * rows, std::min(begin + (p + 1) * rows, begin + count));
    });
  }
};

std::optional<Tensor> rows_of(const std::optional<Tensor>& a, int64_t start, int64_t length, ScalarType dtype) {
  if (!a) return std::nullopt;
  return contiguous_as(narrow_rows(*a, start, length), dtype);
}

template <class T>
std::tuple<Tensor, Tensor> statistics(const ClassInputs& in, const ClassStatisticsWanted& wanted, bool keep) {
  struct Workspace {
    Buffer<T> s, z;
  };
  const Classes<T> c(in);
  const int64_t n = c.n, cols = c.cols, stretch = c.stretch(kConvertedRows);
  const int64_t kinds = in.heads * class_statistic::kHardCount +
                        (in.targets ? class_statistic::kSoftCount - class_statistic::kHardCount : 0);
  Tensor out = uninitialized({kinds, n}, scalar_type<T>());
  Tensor exponentials = uninitialized({keep ? n : 0, cols}, scalar_type<T>());
  T *result = out.mutable_data_ptr<T>(), *kept = exponentials.mutable_data_ptr<T>();
  const std::vector<RightMatrix<T>> right = c.right(RightMatrix<T>::kColumns);
  const Duplicates<T> duplicates = c.duplicates(true);
  Stretches<T> x_stretches(in.x, stretch);
  Pool<Workspace> pool;
  for (int64_t first = 0; first < n; first += stretch) {
    const int64_t count = std::min(stretch, n - first);
    const Tensor x = x_stretches.rows(first, count);
    const std::optional<Tensor> targets = rows_of(in.targets, first, count, scalar_type<T>());
    c.for_each_panel(first, count, [&](int64_t i, int64_t end) {
      auto work = pool.take([&] { return Workspace{Buffer<T>(keep ? 0 : c.rows * cols), Buffer<T>(c.k)}; });
      T* s = keep ? kept + i * cols : work->s.get();
      const LeftRows<T> left(x, i - first, end - i, c.arithmetic);
      c.products(left, right, s);
      duplicates.tie(s, end - i, cols);
      for (int64_t head = 0; head < in.heads; ++head) {
        T* of_head = result + head * class_statistic::kHardCount * n;
        const ClassPanel<T> panel = c.panel(head, s, nullptr, i, end - i, targets, first);
        ROBUSTFT_CALL(class_statistics<T>, panel, wanted, of_head, work->z.get());
      }
    });
  }
  return {out, exponentials};
}

// dw (cols, d), summed over stretches.
template <class T>
class ColumnGradient {
 public:
  explicit ColumnGradient(const Classes<T>& c)
      : c_(c),
        blocks_((c.cols + kClassBlock - 1) / kClassBlock),
        parts_(std::clamp<int64_t>((kClassTasks + blocks_ - 1) / blocks_, 1, std::max<int64_t>(1, c.n / kMinStretch))),
        dw_(uninitialized({c.cols, c.d}, scalar_type<T>())),
        more_(uninitialized({(parts_ - 1) * c.cols, c.d}, scalar_type<T>())) {}

  // From g (count, cols) and x (count, d) of a stretch.
  void add(const T* g, const Tensor& x) {
    const int64_t count = x.size(0), cols = c_.cols, height = round_up((count + parts_ - 1) / parts_, kRowStep);
    const RightMatrix<T> right(x, RightMatrix<T>::kRows, c_.arithmetic);
    torch::stable::parallel_for(
        0, parts_ * blocks_, c_.grain(height * std::min(cols, kClassBlock)), [&](int64_t first, int64_t last) {
          auto scratch = pool_.take([] { return Scratch(); });
          for (int64_t task = first; task < last; ++task) {
            const int64_t i = task / blocks_ * height, j = task % blocks_ * kClassBlock;
            const int64_t rows = std::min(height, count - i), width = std::min(kClassBlock, cols - j);
            T* out = part(task / blocks_) + j * c_.d;
            if (rows > 0)
              add_transposed_product(g + i * cols + j, cols, rows, width, right, i, out, !begun_, *scratch);
            else if (!begun_)
              std::fill(out, out + width * c_.d, T(0));
          }
        });
    begun_ = true;
  }

  // The parts, added in their order.
  Tensor sum() {
    T* total = part(0);
    const int64_t d = c_.d;
    torch::stable::parallel_for(0, c_.cols, c_.grain(parts_), [&](int64_t begin, int64_t end) {
      for (int64_t p = 1; p < parts_; ++p) {
        const T* more = part(p);
        for (int64_t i = begin * d; i < end * d; ++i) total[i] += more[i];
      }
    });
    return dw_;
  }

 private:
  T* part(int64_t p) {
    return p == 0 ? dw_.template mutable_data_ptr<T>()
                  : more_.template mutable_data_ptr<T>() + (p - 1) * c_.cols * c_.d;
  }

  const Classes<T>& c_;
  const int64_t blocks_, parts_;
  Tensor dw_, more_;
  bool begun_ = false;
  Pool<Scratch> pool_;
};

template <class T>
std::tuple<Tensor, Tensor, Tensor> gradient(const ClassInputs& in, const Tensor& exponentials,
                                            const Tensor& coefficients, bool top1) {
  const Classes<T> c(in);
  const int64_t n = c.n, cols = c.cols, d = c.d;
  const int64_t stretch = c.stretch(std::max(kMinStretch, kStretchBytes / int64_t(sizeof(T)) / cols));
  const T* kept = exponentials.size(0) == n ? exponentials.const_data_ptr<T>() : nullptr;
  const Tensor wide = contiguous_as(coefficients, scalar_type<T>());
  const bool converted = in.x.scalar_type() != scalar_type<T>();
  Tensor dx = uninitialized({n, d}, in.x.scalar_type());
  Tensor dx_stretch = uninitialized({converted ? stretch : int64_t(0), d}, scalar_type<T>());
  const std::vector<RightMatrix<T>> w_columns = c.right(RightMatrix<T>::kColumns, !kept);
  const std::vector<RightMatrix<T>> w_rows = c.right(RightMatrix<T>::kRows);
  const Duplicates<T> duplicates = c.duplicates(!kept);
  const Buffer<T> g(stretch * cols);
  ColumnGradient<T> dw(c);
  const int64_t panels = c.bias ? (n + c.rows - 1) / c.rows : 0;
  const Buffer<T> bias_gradients(panels * cols);
  Stretches<T> x_stretches(in.x, stretch);
  Pool<Scratch> pool;
  for (int64_t first = 0; first < n; first += stretch) {
    const int64_t count = std::min(stretch, n - first);
    const Tensor x = x_stretches.rows(first, count);
    const std::optional<Tensor> targets = rows_of(in.targets, first, count, scalar_type<T>());
    T* dx_first = converted ? dx_stretch.mutable_data_ptr<T>() : dx.mutable_data_ptr<T>() + first * d;
    c.for_each_panel(first, count, [&](int64_t i, int64_t end) {
      T* g_rows = g.get() + (i - first) * cols;
      T* s = kept ? const_cast<T*>(kept) + i * cols : g_rows;  // only read if kept
      if (!kept) {
        const LeftRows<T> left(x, i - first, end - i, c.arithmetic);
        c.products(left, w_columns, g_rows);
        duplicates.tie(g_rows, end - i, cols);
      }
      for (int64_t head = 0; head < in.heads; ++head) {
        const T* of_head = wide.const_data_ptr<T>() + head * class_coefficient::kCount * n;
        ClassPanel<T> panel = c.panel(head, s, g_rows, i, end - i, targets, first);
        if (c.bias) panel.bias_gradient = bias_gradients.get() + i / c.rows * cols + head * c.k;
        ROBUSTFT_CALL(class_gradient<T>, panel, of_head, kept, top1);
      }
      auto scratch = pool.take([] { return Scratch(); });
      for (size_t p = 0; p < w_rows.size(); ++p)
        add_product(g_rows + p * c.width, cols, end - i, c.width, w_rows[p], 0, dx_first + (i - first) * d, p == 0,
                    *scratch);
    });
    dw.add(g.get(), x);
    if (converted) {
      Tensor rows = narrow_rows(dx, first, count);
      torch::stable::copy_(rows, narrow_rows(dx_stretch, 0, count));
    }
  }
  Tensor db = zeros<T>({cols});
  T* bias_gradient = db.mutable_data_ptr<T>();
  for (int64_t p = 0; p < panels; ++p)
    for (int64_t j = 0; j < cols; ++j) bias_gradient[j] += bias_gradients.get()[p * cols + j];
  return {dx, contiguous_as(dw.sum(), in.x.scalar_type()), db};
}

std::tuple<Tensor, Tensor> class_statistics(const Tensor& x, const Tensor& w, const Tensor& scale,
                                            const std::optional<Tensor>& bias, const Tensor& labels,
                                            const std::optional<Tensor>& targets, int64_t heads, bool misranked,
                                            bool means, bool keep, std::string precision) {
  const ClassInputs in{x, w, scale, bias, labels, targets, heads, precision};
  in.check("class_statistics");
  return statistics_of_classes(in, {misranked, means}, keep);
}

std::tuple<Tensor, Tensor, Tensor> class_gradient(const Tensor& x, const Tensor& w, const Tensor& scale,
                                                  const std::optional<Tensor>& bias, const Tensor& labels,
                                                  const std::optional<Tensor>& targets, int64_t heads,
                                                  const Tensor& exponentials, const Tensor& coefficients, bool top1,
                                                  std::string precision) {
  const ClassInputs in{x, w, scale, bias, labels, targets, heads, precision};
  in.check("class_gradient");
  STD_TORCH_CHECK(coefficients.dim() == 2 && coefficients.size(0) == heads * class_coefficient::kCount &&
                      coefficients.size(1) == x.size(0),
                  "class_gradient: coefficients must be (heads ", int64_t(class_coefficient::kCount), ", n)");
  return gradient_of_classes(in, exponentials, coefficients, top1);
}

}  // namespace

void ClassInputs::check(const char* op) const {
  STD_TORCH_CHECK(
      x.dim() == 2 && w.dim() == 2 && x.size(1) == w.size(1) && heads > 0 && cols() % heads == 0 && n() > 0 && k() > 0,
      op, ": x and w must be (n, d) and (heads k, d), n and k at least 1");
  STD_TORCH_CHECK(!second || (heads == 2 && second->dim() == 2 && second->size(0) == w.size(0) &&
                              second->size(1) == w.size(1) && second->scalar_type() == w.scalar_type()),
                  op, ": the two heads' embeddings must be alike");
  STD_TORCH_CHECK(x.scalar_type() == w.scalar_type(), op, ": x and w differ in dtype");
  STD_TORCH_CHECK(scale.numel() == 1, op, ": scale must have one element");
  STD_TORCH_CHECK(!bias || bias->numel() == cols(), op, ": bias must have one element a class");
  STD_TORCH_CHECK(labels.dim() == 1 && labels.numel() == n(), op, ": labels must be (n,)");
  STD_TORCH_CHECK(!targets || (targets->dim() == 2 && targets->size(0) == n() && targets->size(1) == k()), op,
                  ": targets must be (n, k)");
}

std::tuple<Tensor, Tensor> statistics_of_classes(const ClassInputs& in, const ClassStatisticsWanted& wanted,
                                                 bool keep) {
  return in.x.scalar_type() == ScalarType::Double ? statistics<double>(in, wanted, keep)
                                                  : statistics<float>(in, wanted, keep);
}

std::tuple<Tensor, Tensor, Tensor> gradient_of_classes(const ClassInputs& in, const Tensor& exponentials,
                                                       const Tensor& coefficients, bool top1) {
  return in.x.scalar_type() == ScalarType::Double ? gradient<double>(in, exponentials, coefficients, top1)
                                                  : gradient<float>(in, exponentials, coefficients, top1);
}

}  // namespace robustft

STABLE_TORCH_LIBRARY_IMPL(robustft, CPU, m) {
  m.impl("class_statistics", TORCH_BOX(&robustft::class_statistics));
  m.impl("class_gradient", TORCH_BOX(&robustft::class_gradient));
}
