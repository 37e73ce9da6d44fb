// The loops over a tile with one exponential a logit (similarity.h): range, statistics, gradient. Compiled once per
// instruction set. A tile is one thread's, so sums have one order.
#include "../lanes.h"
#include "similarity.h"

namespace robustft {
namespace ROBUSTFT_ISA {
namespace {

// The processor's own: b where one of them is NaN.
template <class V>
ROBUSTFT_INLINE V larger(V a, V b) {
  return a > b ? a : b;
}
template <class V>
ROBUSTFT_INLINE V smaller(V a, V b) {
  return a < b ? a : b;
}

// Maxima of `count` rows from `r` on, folded into those of the columns, and the lowest of all; `unordered` has a bit
// where there is a NaN, which the maxima do not show.
template <class T, int kRows>
inline void row_range(const T* s, int64_t ld, int64_t r, int64_t cols, T* of_rows, T* of_cols, Vec<T>* low,
                      Mask<T>* unordered) {
  using V = Vec<T>;
  V highest[kRows];
  for (int q = 0; q < kRows; ++q) highest[q] = V{} - T(__builtin_inf());
  V lowest = *low;
  Mask<T> none = *unordered;
  for_each_vector<T>(cols, [&](int64_t j, int64_t lanes) {
    V column = load_lanes<V>(of_cols + j, lanes, T(0));
    for (int q = 0; q < kRows; ++q) {
      const T* p = s + (r + q) * ld + j;
      // Lanes past the end repeat the first element, which changes neither a maximum nor a minimum.
      const V v = load_lanes<V>(p, lanes, p[0]);
      none |= v != v;
      highest[q] = larger(v, highest[q]);
      lowest = smaller(v, lowest);
      column = larger(v, column);
    }
    store_lanes(of_cols + j, column, lanes);
  });
  for (int q = 0; q < kRows; ++q) of_rows[r + q] = reduce_max<T>(highest[q]);
  *low = lowest, *unordered = none;
}

template <class T>
void matrix_range(const T* s, int64_t ld, int64_t rows, int64_t cols, T* of_rows, T* of_cols, Range<T>* range) {
  const T infinity = __builtin_inf();
  for (int64_t j = 0; j < cols; ++j) of_cols[j] = -infinity;
  Vec<T> low = Vec<T>{} + infinity;
  Mask<T> unordered{};
  int64_t r = 0;
  for (; r + 4 <= rows; r += 4) row_range<T, 4>(s, ld, r, cols, of_rows, of_cols, &low, &unordered);
  for (; r < rows; ++r) row_range<T, 1>(s, ld, r, cols, of_rows, of_cols, &low, &unordered);
  range->high = row_max(of_rows, rows, -infinity);
  range->low = -reduce_max<T>(-low);
  for (int64_t l = 0; l < kLanes<T>; ++l)
    if (unordered[l]) range->high = range->low = __builtin_nan("");
}

// e = 2^(z log2 e - center) of a tile's similarities, z = scale S. The centre is an integer and the factor of S a sum
// of two numbers, so that nothing is rounded before the fraction that the power is taken of: a scale of 100 magnifies
// no error, where the processor has fused multiply-add. What divides by an e must have its bits: by this, and nothing
// else.
template <class T>
struct TileExp {
  using V = Vec<T>;
  using C = ExpConstants<T>;
  static constexpr T kLimit = C::bias - 1;
  T high, low, center, shifter;

  TileExp(T scale, T center) : high(scale * C::log2e), center(center), shifter(C::shifter - center) {
    low = T(__builtin_fma(scale, C::log2e, -double(high))) + scale * C::log2e_low;
  }
  ROBUSTFT_INLINE V operator()(V s) const {
    const V t = s * high + shifter;  // round(z log2 e), and less the centre in the low bits
    const V r = s * low + (s * high - (t - shifter));
    return (V)((Word<T>)polynomial<T>(C::binary, r) + as_exponent<T>((Word<T>)t));
  }
  // Of maxima that may be elsewhere, beside which all of this tile is nothing.
  ROBUSTFT_INLINE V limited(V s) const {
    return s * high - center > kLimit ? V{} + T(__builtin_exp2(kLimit)) : (*this)(s);
  }
};

// Rows [r, r + kRows): e, its sums by row in registers, by column in memory.
template <class T, int kRows, bool kTeacher, bool kSame, bool kKeep>
inline void accumulate_rows(const Tile<T>& tile, const TileExp<T> exp_of, const TileExp<T> exp_of_teacher, int64_t r,
                            const TileStatistics<T>& row, const TileStatistics<T>& col) {
  using V = Vec<T>;
  V sum[kRows] = {}, weighted[kRows] = {}, target[kRows] = {}, teacher_sum[kRows] = {}, teacher_weighted[kRows] = {};
  T highest_of[kRows];
  Label<T> label_of[kRows];
  for (int q = 0; q < kRows; ++q) highest_of[q] = row.max[r + q], label_of[q] = tile.row_labels[tile.row0 + r + q];
  const int64_t ld = tile.ld, kept_ld = tile.e_ld;
  const T *s = tile.s + r * ld, *st = kTeacher ? tile.teacher + r * ld : nullptr;
  T* kept = kKeep ? tile.e + r * kept_ld : nullptr;
  T* teacher_kept = kKeep && kTeacher ? tile.teacher_e + r * kept_ld : nullptr;
  for_each_vector<T>(tile.cols, [&](int64_t j, int64_t lanes) {
    auto of_column = [&](const T* p) { return load_lanes<V>(p + j, lanes, T(0)); };
    const V highest = of_column(col.max);
    V col_sum = of_column(col.sum), col_weighted = of_column(col.weighted), col_target{};
    V col_teacher_sum{}, col_teacher_weighted{};
    Mask<T> labels{};
    if (kSame) {
      labels = load_lanes<Mask<T>>(tile.col_labels + tile.col0 + j, lanes, Label<T>(-1));
      col_target = of_column(col.target);
    }
    if (kTeacher) col_teacher_sum = of_column(col.teacher_sum), col_teacher_weighted = of_column(col.teacher_weighted);
    for (int q = 0; q < kRows; ++q) {
      const V v = load_lanes<V>(s + q * ld + j, lanes, T(0));
      V e = exp_of(v);
      if (kKeep) store_lanes(kept + q * kept_ld + j, e, lanes);
      if (lanes < kLanes<T>) e = load_partial<V>((const T*)&e, lanes, T(0));
      const V row_gap = v - highest_of[q], col_gap = v - highest;
      sum[q] += e;
      weighted[q] += e * row_gap;
      col_sum += e;
      col_weighted += e * col_gap;
      if (kSame) {
        const V same = labels == label_of[q] ? v : V{};
        target[q] += same;
        col_target += same;
      }
      if (kTeacher) {
        V et = exp_of_teacher(load_lanes<V>(st + q * ld + j, lanes, T(0)));
        if (kKeep) store_lanes(teacher_kept + q * kept_ld + j, et, lanes);
        if (lanes < kLanes<T>) et = load_partial<V>((const T*)&et, lanes, T(0));
        teacher_sum[q] += et;
        teacher_weighted[q] += et * row_gap;
        col_teacher_sum += et;
        col_teacher_weighted += et * col_gap;
      }
    }
    store_lanes(col.sum + j, col_sum, lanes);
    store_lanes(col.weighted + j, col_weighted, lanes);
    if (kSame) store_lanes(col.target + j, col_target, lanes);
    if (kTeacher) {
      store_lanes(col.teacher_sum + j, col_teacher_sum, lanes);
      store_lanes(col.teacher_weighted + j, col_teacher_weighted, lanes);
    }
  });
  for (int q = 0; q < kRows; ++q) {
    row.sum[r + q] = reduce_sum<T>(sum[q]);
    row.weighted[r + q] = reduce_sum<T>(weighted[q]);
    row.target[r + q] = reduce_sum<T>(target[q]);
    if (kTeacher) {
      row.teacher_sum[r + q] = reduce_sum<T>(teacher_sum[q]);
      row.teacher_weighted[r + q] = reduce_sum<T>(teacher_weighted[q]);
    }
  }
}

template <class T, bool kTeacher, bool kSame, bool kKeep>
void accumulate_tile(const Tile<T>& tile, const TileExp<T>& exp_of, const TileExp<T>& exp_of_teacher,
                     const TileStatistics<T>& row, const TileStatistics<T>& col) {
  int64_t r = 0;
  for (; r + 2 <= tile.rows; r += 2)
    accumulate_rows<T, 2, kTeacher, kSame, kKeep>(tile, exp_of, exp_of_teacher, r, row, col);
  for (; r < tile.rows; ++r) accumulate_rows<T, 1, kTeacher, kSame, kKeep>(tile, exp_of, exp_of_teacher, r, row, col);
}

template <class T, bool kTeacher>
void accumulate(const Tile<T>& tile, const TileExp<T>& exp_of, const TileExp<T>& exp_of_teacher,
                const TileStatistics<T>& row, const TileStatistics<T>& col) {
  const auto run =
      tile.e ? (tile.same ? accumulate_tile<T, kTeacher, true, true> : accumulate_tile<T, kTeacher, false, true>)
             : (tile.same ? accumulate_tile<T, kTeacher, true, false> : accumulate_tile<T, kTeacher, false, false>);
  run(tile, exp_of, exp_of_teacher, row, col);
}

// A softmax sum and its weighted sum, moved from one reference to another: the sum by the factor `keep`, the values
// that were weighted by `shift` first.
template <class V>
struct Moved {
  V sum, weighted;
  Moved(V sum_of, V weighted_of, V shift, V keep)
      : sum(sum_of * keep), weighted((weighted_of + sum_of * shift) * keep) {}
};

// Folds `count` rows (or columns) of a tile into their running statistics, which start at `state0`.
template <class T>
void fold(const Tile<T>& tile, const TileExp<T>& exp_of, const TileExp<T>& exp_of_teacher, int64_t count,
          const TileStatistics<T>& here, const RunningStatistics<T>& state, int64_t state0) {
  using V = Vec<T>;
  const T lowest = -__builtin_inf();
  for_each_vector<T>(count, [&](int64_t i, int64_t lanes) {
    auto of_tile = [&](const T* p) { return load_lanes<V>(p + i, lanes, T(1)); };
    auto of_state = [&](const T* p) { return load_lanes<V>(p + state0 + i, lanes, T(1)); };
    auto put = [&](T* p, V v) { store_lanes(p + state0 + i, v, lanes); };
    const V old_max = of_state(state.max), tile_max = of_tile(here.max);
    const V highest = max(tile_max, old_max);
    const Mask<T> first = old_max == lowest;
    const V old_shift = first ? V{} : old_max - highest, tile_shift = tile_max - highest;
    // Relative to its largest term a sum is at least 1: losses with hard labels are then never negative.
    const V largest = exp_of(tile_max);
    const V relative = of_tile(here.sum) / largest;
    const V sum = relative < T(1) ? V{} + T(1) : relative;
    const Moved<V> old(of_state(state.sum), of_state(state.weighted), old_shift,
                       first ? V{} : exp<T>(old_shift * tile.scale));
    const Moved<V> added(sum, of_tile(here.weighted) / largest, tile_shift, exp<T>(tile_shift * tile.scale));
    put(state.sum, old.sum + added.sum);
    put(state.weighted, old.weighted + added.weighted);
    put(state.max, highest);
    if (tile.same) put(state.target, of_state(state.target) + of_tile(here.target));
    if (tile.teacher) {
      const V old_teacher = of_state(state.teacher_max), teacher_max = of_tile(here.teacher_max);
      const V teacher_highest = max(teacher_max, old_teacher);
      const V old_keep = first ? V{} : exp<T>((old_teacher - teacher_highest) * tile.teacher_scale);
      const V added_keep = exp<T>((teacher_max - teacher_highest) * tile.teacher_scale);
      const V teacher_largest = exp_of_teacher(teacher_max);
      const Moved<V> old_t(of_state(state.teacher_sum), of_state(state.teacher_weighted), old_shift, old_keep);
      const Moved<V> added_t(of_tile(here.teacher_sum) / teacher_largest,
                             of_tile(here.teacher_weighted) / teacher_largest, tile_shift, added_keep);
      put(state.teacher_sum, old_t.sum + added_t.sum);
      put(state.teacher_weighted, old_t.weighted + added_t.weighted);
      put(state.teacher_max, teacher_highest);
    }
  });
}

// coefficient * exp(-log_sum) / e at the maximum, as high + low: e times this is the coefficient where one logit is all
// of the softmax.
template <class T>
inline void softmax_factor(Vec<T> coefficient, Vec<T> log_sum, Vec<T> largest, T* high, T* low, int64_t lanes) {
  using V = Vec<T>;
  const V wanted = coefficient * exp<T>(-log_sum);
  const V factor = wanted / largest;
  store_lanes(high, factor, lanes);
  store_lanes(low, (wanted - factor * largest) / largest, lanes);
}

template <class T>
void tile_factors(const TileExp<T>& exp_of, const TileExp<T>& exp_of_teacher, int64_t count,
                  const GradientCoefficients<T>& all, int64_t first, const TileFactors<T>& factors) {
  for_each_vector<T>(count, [&](int64_t i, int64_t lanes) {
    auto of = [&](const T* p) { return load_lanes<Vec<T>>(p + first + i, lanes, T(0)); };
    softmax_factor<T>(of(all.softmax), of(all.log_sum), exp_of.limited(of(all.max)), factors.softmax + i,
                      factors.softmax_low + i, lanes);
    if (all.teacher)
      softmax_factor<T>(of(all.teacher), of(all.teacher_log_sum), exp_of_teacher.limited(of(all.teacher_max)),
                        factors.teacher + i, factors.teacher_low + i, lanes);
  });
}

template <class T, int kRows, bool kExponentials, bool kTeacher, bool kSame>
inline void gradient_rows(const Tile<T>& tile, const GradientTile<T>& out, const TileExp<T> exp_of,
                          const TileExp<T> exp_of_teacher, int64_t r, const GradientCoefficients<T>& row_all,
                          const GradientCoefficients<T>& col_all, const TileFactors<T>& row,
                          const TileFactors<T>& col) {
  using V = Vec<T>;
  const T scale = tile.scale;
  const bool uniform = row_all.uniform;
  // What the stores to G might, for all that the compiler knows, change.
  T softmax[kRows], softmax_low[kRows], teacher[kRows], teacher_low[kRows], target[kRows], uniform_of[kRows];
  Label<T> label[kRows];
  for (int q = 0; q < kRows; ++q) {
    const int64_t i = tile.row0 + r + q;
    softmax[q] = row.softmax[r + q], softmax_low[q] = row.softmax_low[r + q];
    if (kTeacher) teacher[q] = row.teacher[r + q], teacher_low[q] = row.teacher_low[r + q];
    if (kSame) target[q] = row_all.target[i], label[q] = tile.row_labels[i];
    if (uniform) uniform_of[q] = row_all.uniform[i];
  }
  const T *s = out.s + r * out.ld, *st = kTeacher ? out.teacher + r * out.ld : nullptr;
  T* g = out.g + r * out.g_ld;
  const int64_t ld = out.ld, g_ld = out.g_ld;
  for_each_vector<T>(tile.cols, [&](int64_t j, int64_t lanes) {
    auto of_column = [&](const T* p) { return load_lanes<V>(p + j, lanes, T(0)); };
    auto of_columns = [&](const T* p) { return load_lanes<V>(p + tile.col0 + j, lanes, T(0)); };
    const V col_softmax = of_column(col.softmax);
    V col_low{}, col_teacher{}, col_teacher_low{}, col_target{}, col_uniform{};
    Mask<T> labels{};
    if (kSame || kTeacher) col_low = of_column(col.softmax_low);
    if (kTeacher) col_teacher = of_column(col.teacher), col_teacher_low = of_column(col.teacher_low);
    if (kSame) {
      labels = load_lanes<Mask<T>>(tile.col_labels + tile.col0 + j, lanes, Label<T>(-1));
      col_target = of_columns(col_all.target);
    }
    if (uniform) col_uniform = of_columns(col_all.uniform);
    for (int q = 0; q < kRows; ++q) {
      V e = load_lanes<V>(s + q * ld + j, lanes, T(0));
      if (!kExponentials) e = exp_of(e);
      V value;
      if (kSame || kTeacher) {
        // Row and column each end near 0 where p is near its target: every product below is one multiply-add away from
        // what it is taken from, and the low parts come last.
        V by_row = e * softmax[q], by_col = e * col_softmax;
        V low = e * (softmax_low[q] + col_low);
        if (kSame) {
          const Mask<T> same = labels == label[q];
          by_row = e * softmax[q] - (same ? V{} + target[q] : V{});
          by_col = e * col_softmax - (same ? col_target : V{});
        }
        if (kTeacher) {
          V et = load_lanes<V>(st + q * ld + j, lanes, T(0));
          if (!kExponentials) et = exp_of_teacher(et);
          by_row -= et * teacher[q];
          by_col -= et * col_teacher;
          low -= et * (teacher_low[q] + col_teacher_low);
        }
        value = by_row + by_col + low;
      } else {
        value = e * (softmax[q] + col_softmax);
      }
      if (uniform) value -= uniform_of[q] + col_uniform;
      store_lanes(g + q * g_ld + j, value * scale, lanes);
    }
  });
}

template <class T, bool kExponentials, bool kTeacher, bool kSame>
void gradient_tile(const Tile<T>& tile, const GradientTile<T>& out, const TileExp<T>& exp_of,
                   const TileExp<T>& exp_of_teacher, const GradientCoefficients<T>& row_all,
                   const GradientCoefficients<T>& col_all, const TileFactors<T>& row, const TileFactors<T>& col) {
  int64_t r = 0;
  for (; r + 4 <= tile.rows; r += 4)
    gradient_rows<T, 4, kExponentials, kTeacher, kSame>(tile, out, exp_of, exp_of_teacher, r, row_all, col_all, row,
                                                        col);
  for (; r < tile.rows; ++r)
    gradient_rows<T, 1, kExponentials, kTeacher, kSame>(tile, out, exp_of, exp_of_teacher, r, row_all, col_all, row,
                                                        col);
}

template <class T, bool kExponentials, bool kTeacher>
void gradient(const Tile<T>& tile, const GradientTile<T>& out, const TileExp<T>& exp_of,
              const TileExp<T>& exp_of_teacher, const GradientCoefficients<T>& row_all,
              const GradientCoefficients<T>& col_all, const TileFactors<T>& row, const TileFactors<T>& col) {
  tile.same
      ? gradient_tile<T, kExponentials, kTeacher, true>(tile, out, exp_of, exp_of_teacher, row_all, col_all, row, col)
      : gradient_tile<T, kExponentials, kTeacher, false>(tile, out, exp_of, exp_of_teacher, row_all, col_all, row, col);
}

}  // namespace

template <class T>
void tile_range(const Tile<T>& tile, const TileStatistics<T>& row, const TileStatistics<T>& col, Range<T>* range,
                Range<T>* teacher_range) {
  matrix_range(tile.s, tile.ld, tile.rows, tile.cols, row.max, col.max, range);
  if (tile.teacher)
    matrix_range<T>(tile.teacher, tile.ld, tile.rows, tile.cols, row.teacher_max, col.teacher_max, teacher_range);
}

template <class T>
void tile_statistics(const Tile<T>& tile, T center, T teacher_center, const TileStatistics<T>& row,
                     const TileStatistics<T>& col, const RunningStatistics<T>& row_state,
                     const RunningStatistics<T>& col_state) {
  const TileExp<T> exp_of(tile.scale, center), exp_of_teacher(tile.teacher_scale, teacher_center);
  auto clear = [&](T* p) { __builtin_memset(p, 0, tile.cols * sizeof(T)); };
  clear(col.sum), clear(col.weighted), clear(col.target);
  if (tile.teacher) clear(col.teacher_sum), clear(col.teacher_weighted);
  const auto run = tile.teacher ? accumulate<T, true> : accumulate<T, false>;
  run(tile, exp_of, exp_of_teacher, row, col);
  fold(tile, exp_of, exp_of_teacher, tile.rows, row, row_state, tile.row0);
  fold(tile, exp_of, exp_of_teacher, tile.cols, col, col_state, tile.col0);
}

// Sums of S, which only label smoothing asks for.
template <class T>
void tile_totals(const Tile<T>& tile, T* row_total, T* col_total) {
  using V = Vec<T>;
  for (int64_t r = 0; r < tile.rows; ++r) {
    V total{};
    for_each_vector<T>(tile.cols, [&](int64_t j, int64_t lanes) {
      const V v = load_lanes<V>(tile.s + r * tile.ld + j, lanes, T(0));
      T* column = col_total + tile.col0 + j;
      total += v;
      store_lanes(column, load_lanes<V>(column, lanes, T(0)) + v, lanes);
    });
    row_total[tile.row0 + r] += reduce_sum<T>(total);
  }
}

template <class T>
void tile_gradient(const Tile<T>& tile, const GradientTile<T>& out, const GradientCoefficients<T>& row,
                   const GradientCoefficients<T>& col, const TileFactors<T>& row_factors,
                   const TileFactors<T>& col_factors) {
  const TileExp<T> exp_of(tile.scale, out.center), exp_of_teacher(tile.teacher_scale, out.teacher_center);
  tile_factors(exp_of, exp_of_teacher, tile.rows, row, tile.row0, row_factors);
  tile_factors(exp_of, exp_of_teacher, tile.cols, col, tile.col0, col_factors);
  const auto run = out.exponentials ? (out.teacher ? gradient<T, true, true> : gradient<T, true, false>)
                                    : (out.teacher ? gradient<T, false, true> : gradient<T, false, false>);
  run(tile, out, exp_of, exp_of_teacher, row, col, row_factors, col_factors);
}

#define ROBUSTFT_INSTANTIATE(T)                                                                                 \
  template void tile_range<T>(const Tile<T>&, const TileStatistics<T>&, const TileStatistics<T>&, Range<T>*,    \
                              Range<T>*);                                                                       \
  template void tile_statistics<T>(const Tile<T>&, T, T, const TileStatistics<T>&, const TileStatistics<T>&,    \
                                   const RunningStatistics<T>&, const RunningStatistics<T>&);                   \
  template void tile_totals<T>(const Tile<T>&, T*, T*);                                                         \
  template void tile_gradient<T>(const Tile<T>&, const GradientTile<T>&, const GradientCoefficients<T>&,        \
                                 const GradientCoefficients<T>&, const TileFactors<T>&, const TileFactors<T>&); \
  void exp_values(const T* x, T* y, int64_t n) {                                                                \
    for_each_vector<T>(n, [&](int64_t j, int64_t lanes) {                                                       \
      store_lanes(y + j, exp<T>(load_lanes<Vec<T>>(x + j, lanes, T(0))), lanes);                                \
    });                                                                                                         \
  }
ROBUSTFT_INSTANTIATE(float)
ROBUSTFT_INSTANTIATE(double)

}  // namespace ROBUSTFT_ISA
}  // namespace robustft
