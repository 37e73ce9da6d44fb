// The loop over a tile of the sigmoid losses (sigmoid.h). Compiled once per instruction set. A tile is one thread's, so
// sums have one order.
#include "../lanes.h"
#include "sigmoid.h"

namespace robustft {
namespace ROBUSTFT_ISA {
namespace {

// log(1 + e) = 2 artanh(u), u = e / (2 + e), as 2 u (1 + u^2 / 3 + u^4 / 5 + ...). For e in [0, 1], u^2 is at most 1/9:
// what the series leaves out is below a unit in the last place.
template <class T>
struct LogConstants;
template <>
struct LogConstants<float> {
  static constexpr float series[] = {2.f / 17, 2.f / 15, 2.f / 13, 2.f / 11, 2.f / 9, 2.f / 7, 2.f / 5, 2.f / 3, 2.f};
};
template <>
struct LogConstants<double> {
  static constexpr double series[] = {2. / 33, 2. / 31, 2. / 29, 2. / 27, 2. / 25, 2. / 23, 2. / 21, 2. / 19, 2. / 17,
                                      2. / 15, 2. / 13, 2. / 11, 2. / 9,  2. / 7,  2. / 5,  2. / 3,  2.};
};

template <class T>
ROBUSTFT_INLINE Vec<T> log1p_of_fraction(Vec<T> e) {
  const Vec<T> u = e / (e + T(2));
  return u * polynomial<T>(LogConstants<T>::series, u * u);
}

// Of logits z: their sigmoid and that of -z, each to its own last places however near 0 it is, from e = exp(-|z|).
template <class T>
struct Sigmoid {
  using V = Vec<T>;
  V e, of_z, of_minus_z;
  Mask<T> positive;

  ROBUSTFT_INLINE explicit Sigmoid(V z) : positive(z > T(0)) {
    e = exp_nonpositive<T>(positive ? -z : z);
    const V large = T(1) / (e + T(1)), small = e * large;
    of_z = positive ? large : small;
    of_minus_z = positive ? small : large;
  }
};

// Rows [r, r + kRows).
template <class T, int kRows, bool kTeacher, bool kSame, bool kGradient>
inline void sigmoid_rows(const Tile<T>& tile, const SigmoidRows<T>& rows, const SigmoidGradient<T>& out, int64_t r) {
  using V = Vec<T>;
  const T scale = tile.scale, bias = rows.bias, teacher_scale = tile.teacher_scale, teacher_bias = rows.teacher_bias;
  const int64_t ld = tile.ld, out_ld = out.ld, i0 = tile.row0 + r;
  const T* s = tile.s + r * ld;
  T* to = kGradient ? out.g + r * out_ld : nullptr;
  const T* st = kTeacher ? tile.teacher + r * ld : nullptr;
  V loss[kRows] = {}, by_scale[kRows] = {}, by_bias[kRows] = {};
  V teacher_loss[kRows] = {}, teacher_by_scale[kRows] = {}, teacher_by_bias[kRows] = {};
  T weight[kRows], teacher_weight[kRows];
  Label<T> label[kRows];
  for (int q = 0; q < kRows; ++q) {
    if (kGradient) weight[q] = scale * rows.weight[i0 + q];
    if (kGradient && kTeacher) teacher_weight[q] = scale * rows.weight[rows.n + i0 + q];
    if (kSame) label[q] = tile.row_labels[i0 + q];
  }
  for_each_vector<T>(tile.cols, [&](int64_t j, int64_t lanes) {
    // Lanes past the end hold S = 0, which is a logit like others.
    auto of_lanes = [&](V v) { return lanes < kLanes<T> ? load_partial<V>((const T*)&v, lanes, T(0)) : v; };
    Mask<T> labels{};
    if (kSame) labels = load_lanes<Mask<T>>(tile.col_labels + tile.col0 + j, lanes, Label<T>(-1));
    for (int q = 0; q < kRows; ++q) {
      const V v = load_lanes<V>(s + q * ld + j, lanes, T(0));
      const V z = v * scale + bias;
      const Sigmoid<T> p(z);
      const V rest = log1p_of_fraction<T>(p.e), up = p.positive ? z : V{};
      V more = up, g = p.of_z;
      if (kSame) {
        const Mask<T> same = labels == label[q];
        more = same ? up - z : up;  // max(-z, 0): exact
        g = same ? -p.of_minus_z : g;
      }
      g = of_lanes(g);
      loss[q] += of_lanes(rest + more);
      by_scale[q] += g * v;
      by_bias[q] += g;
      V gradient{};
      if (kGradient) gradient = g * weight[q];
      if (kTeacher) {
        const V zt = load_lanes<V>(st + q * ld + j, lanes, T(0)) * teacher_scale + teacher_bias;
        const Sigmoid<T> t(zt);
        // Of two probabilities near 1 the difference is that of what they lack of it.
        const V h = of_lanes((p.positive & t.positive) ? t.of_minus_z - p.of_minus_z : p.of_z - t.of_z);
        teacher_loss[q] += of_lanes(rest + (p.positive ? t.of_minus_z * z : t.of_z * -z));
        teacher_by_scale[q] += h * v;
        teacher_by_bias[q] += h;
        if (kGradient) gradient += h * teacher_weight[q];
      }
      if (kGradient) store_lanes(to + q * out_ld + j, gradient, lanes);
    }
  });
  for (int q = 0; q < kRows; ++q) {
    auto add = [&](int64_t which, V sum) { rows.sums[which * rows.n + i0 + q] += reduce_sum<T>(sum); };
    add(sigmoid_sum::kLoss, loss[q]);
    add(sigmoid_sum::kByScale, by_scale[q]);
    add(sigmoid_sum::kByBias, by_bias[q]);
    if (kTeacher) {
      add(sigmoid_sum::kTeacherLoss, teacher_loss[q]);
      add(sigmoid_sum::kTeacherByScale, teacher_by_scale[q]);
      add(sigmoid_sum::kTeacherByBias, teacher_by_bias[q]);
    }
  }
}

template <class T, bool kTeacher, bool kSame, bool kGradient>
void all_rows(const Tile<T>& tile, const SigmoidRows<T>& rows, const SigmoidGradient<T>& out) {
  int64_t r = 0;
  for (; r + 2 <= tile.rows; r += 2) sigmoid_rows<T, 2, kTeacher, kSame, kGradient>(tile, rows, out, r);
  for (; r < tile.rows; ++r) sigmoid_rows<T, 1, kTeacher, kSame, kGradient>(tile, rows, out, r);
}

template <class T, bool kTeacher, bool kSame>
void some_rows(const Tile<T>& tile, const SigmoidRows<T>& rows, const SigmoidGradient<T>& out) {
  rows.weight ? all_rows<T, kTeacher, kSame, true>(tile, rows, out)
              : all_rows<T, kTeacher, kSame, false>(tile, rows, out);
}

}  // namespace

template <class T>
void sigmoid_tile(const Tile<T>& tile, const SigmoidRows<T>& rows, const SigmoidGradient<T>& out) {
  const auto run = tile.teacher ? (tile.same ? some_rows<T, true, true> : some_rows<T, true, false>)
                                : (tile.same ? some_rows<T, false, true> : some_rows<T, false, false>);
  run(tile, rows, out);
}

#define ROBUSTFT_INSTANTIATE(T)                                                                    \
  template void sigmoid_tile<T>(const Tile<T>&, const SigmoidRows<T>&, const SigmoidGradient<T>&); \
  void softplus_values(const T* z, T* y, T* slope, int64_t n) {                                    \
    for_each_vector<T>(n, [&](int64_t j, int64_t lanes) {                                          \
      const Vec<T> v = load_lanes<Vec<T>>(z + j, lanes, T(0));                                     \
      const Sigmoid<T> p(v);                                                                       \
      const Vec<T> up = p.positive ? v : Vec<T>{};                                                 \
      store_lanes(y + j, log1p_of_fraction<T>(p.e) + up, lanes);                                   \
      store_lanes(slope + j, p.of_z, lanes);                                                       \
    });                                                                                            \
  }
ROBUSTFT_INSTANTIATE(float)
ROBUSTFT_INSTANTIATE(double)

}  // namespace ROBUSTFT_ISA
}  // namespace robustft
