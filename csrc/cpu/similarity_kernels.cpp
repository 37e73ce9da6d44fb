// The loops over a tile with one exponential a logit (similarity.h): range, statistics, gradient. Compiled once per
// instruction set. A tile is one thread's, so sums have one order.
#include "lanes.h"
#include "similarity.h"

namespace robustft {
namespace ROBUSTFT_ISA {
namespace {

template <class V>
inline V min(V a, V b) {
  return (a < b) | (a != a) ? a : b;
}

// Maxima of `count` rows from `r` on, folded into those of the columns and into [low, high].
template <class T, int kRows>
inline void row_range(const T* s, int64_t ld, int64_t r, int64_t cols, T* of_rows, T* of_cols, Vec<T>* low) {
  using V = Vec<T>;
  V highest[kRows];
  for (int q = 0; q < kRows; ++q) highest[q] = V{} - T(__builtin_inf());
  V lowest = *low;
  for_each_vector<T>(cols, [&](int64_t j, int64_t lanes) {
    V column = load_lanes<V>(of_cols + j, lanes, T(0));
    for (int q = 0; q < kRows; ++q) {
      const T* p = s + (r + q) * ld + j;
      // Lanes past the end repeat the first element, which changes neither a maximum nor a minimum.
      const V v = load_lanes<V>(p, lanes, p[0]);
      highest[q] = max(v, highest[q]);
      lowest = min(v, lowest);
      column = max(v, column);
    }
    store_lanes(of_cols + j, column, lanes);
  });
  for (int q = 0; q < kRows; ++q) of_rows[r + q] = reduce_max<T>(highest[q]);
  *low = lowest;
}

template <class T>
void matrix_range(const T* s, int64_t ld, int64_t rows, int64_t cols, T* of_rows, T* of_cols, Range<T>* range) {
  const T infinity = __builtin_inf();
  for (int64_t j = 0; j < cols; ++j) of_cols[j] = -infinity;
  Vec<T> low = Vec<T>{} + infinity;
  int64_t r = 0;
  for (; r + 4 <= rows; r += 4) row_range<T, 4>(s, ld, r, cols, of_rows, of_cols, &low);
  for (; r < rows; ++r) row_range<T, 1>(s, ld, r, cols, of_rows, of_cols, &low);
  range->high = row_max(of_rows, rows, -infinity);
  range->low = -reduce_max<T>(-low);
}

// Rows [r, r + kRows): e over S, its sums by row in registers, by column in memory.
template <class T, int kRows, bool kTeacher, bool kSame>
inline void accumulate_rows(const Tile<T>& tile, T center, T teacher_center, int64_t r, const TileStatistics<T>& row,
                            const TileStatistics<T>& col) {
  using V = Vec<T>;
  V sum[kRows] = {}, weighted[kRows] = {}, target[kRows] = {}, teacher_sum[kRows] = {}, teacher_weighted[kRows] = {};
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
      T* p = tile.s + (r + q) * tile.ld + j;
      const V v = load_lanes<V>(p, lanes, T(0));
      V e = exp<T>((v - center) * tile.scale);
      store_lanes(p, e, lanes);
      if (lanes < kLanes<T>) e = load_partial<V>((const T*)&e, lanes, T(0));
      const V row_gap = v - row.max[r + q], col_gap = v - highest;
      sum[q] += e;
      weighted[q] += e * row_gap;
      col_sum += e;
      col_weighted += e * col_gap;
      if (kSame) {
        const V same = labels == tile.row_labels[tile.row0 + r + q] ? v : V{};
        target[q] += same;
        col_target += same;
      }
      if (kTeacher) {
        T* pt = tile.teacher + (r + q) * tile.ld + j;
        V et = exp<T>((load_lanes<V>(pt, lanes, T(0)) - teacher_center) * tile.teacher_scale);
        store_lanes(pt, et, lanes);
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

template <class T, bool kTeacher, bool kSame>
void accumulate(const Tile<T>& tile, T center, T teacher_center, const TileStatistics<T>& row,
                const TileStatistics<T>& col) {
  int64_t r = 0;
  for (; r + 2 <= tile.rows; r += 2) accumulate_rows<T, 2, kTeacher, kSame>(tile, center, teacher_center, r, row, col);
  for (; r < tile.rows; ++r) accumulate_rows<T, 1, kTeacher, kSame>(tile, center, teacher_center, r, row, col);
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
void fold(const Tile<T>& tile, T center, T teacher_center, int64_t count, const TileStatistics<T>& here,
          const RunningStatistics<T>& state, int64_t state0) {
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
    const V largest = exp<T>((tile_max - center) * tile.scale);
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
      const V teacher_largest = exp<T>((teacher_max - teacher_center) * tile.teacher_scale);
      const Moved<V> old_t(of_state(state.teacher_sum), of_state(state.teacher_weighted), old_shift, old_keep);
      const Moved<V> added_t(of_tile(here.teacher_sum) / teacher_largest,
                             of_tile(here.teacher_weighted) / teacher_largest, tile_shift, added_keep);
      put(state.teacher_sum, old_t.sum + added_t.sum);
      put(state.teacher_weighted, old_t.weighted + added_t.weighted);
      put(state.teacher_max, teacher_highest);
    }
  });
}

// coefficient * exp(-log_sum) / exp(s (max - c)) as high + low. The divisor has the bits of e at the maximum, so that e
// times this is the coefficient where one logit is all of the softmax.
template <class T>
inline void softmax_factor(Vec<T> coefficient, Vec<T> log_sum, Vec<T> max_less_center, T scale, T* high, T* low,
                           int64_t lanes) {
  using V = Vec<T>;
  const T limit = ExpConstants<T>::high - 1;  // of maxima elsewhere, beside which this tile is nothing
  const V argument = max_less_center * scale;
  const V largest = exp<T>(argument > limit ? V{} + limit : argument);
  const V wanted = coefficient * exp<T>(-log_sum);
  const V factor = wanted / largest;
  store_lanes(high, factor, lanes);
  store_lanes(low, (wanted - factor * largest) / largest, lanes);
}

template <class T>
void tile_factors(const Tile<T>& tile, const GradientTile<T>& out, int64_t count, const GradientCoefficients<T>& all,
                  int64_t first, const TileFactors<T>& factors) {
  for_each_vector<T>(count, [&](int64_t i, int64_t lanes) {
    auto of = [&](const T* p) { return load_lanes<Vec<T>>(p + first + i, lanes, T(0)); };
    softmax_factor<T>(of(all.softmax), of(all.log_sum), of(all.max) - out.center, tile.scale, factors.softmax + i,
                      factors.softmax_low + i, lanes);
    if (out.teacher)
      softmax_factor<T>(of(all.teacher), of(all.teacher_log_sum), of(all.teacher_max) - out.teacher_center,
                        tile.teacher_scale, factors.teacher + i, factors.teacher_low + i, lanes);
  });
}

template <class T, bool kExponentials, bool kTeacher, bool kSame>
void gradient_rows(const Tile<T>& tile, const GradientTile<T>& out, const GradientCoefficients<T>& row_all,
                   const GradientCoefficients<T>& col_all, const TileFactors<T>& row, const TileFactors<T>& col) {
  using V = Vec<T>;
  for (int64_t r = 0; r < tile.rows; ++r) {
    const int64_t i = tile.row0 + r;
    for_each_vector<T>(tile.cols, [&](int64_t j, int64_t lanes) {
      auto of_column = [&](const T* p) { return load_lanes<V>(p + j, lanes, T(0)); };
      auto of_columns = [&](const T* p) { return load_lanes<V>(p + tile.col0 + j, lanes, T(0)); };
      V e = load_lanes<V>(out.s + r * out.ld + j, lanes, T(0));
      if (!kExponentials) e = exp<T>((e - out.center) * tile.scale);
      V g;
      if (kSame || kTeacher) {
        // Row and column each end near 0 where p is near its target: every product below is one multiply-add away from
        // what it is taken from, and the low parts come last.
        V by_row = e * row.softmax[r], by_col = e * of_column(col.softmax);
        V low = e * (row.softmax_low[r] + of_column(col.softmax_low));
        if (kSame) {
          const Mask<T> labels = load_lanes<Mask<T>>(tile.col_labels + tile.col0 + j, lanes, Label<T>(-1));
          const Mask<T> same = labels == tile.row_labels[i];
          by_row = e * row.softmax[r] - (same ? V{} + row_all.target[i] : V{});
          by_col = e * of_column(col.softmax) - (same ? of_columns(col_all.target) : V{});
        }
        if (kTeacher) {
          V et = load_lanes<V>(out.teacher + r * out.ld + j, lanes, T(0));
          if (!kExponentials) et = exp<T>((et - out.teacher_center) * tile.teacher_scale);
          by_row -= et * row.teacher[r];
          by_col -= et * of_column(col.teacher);
          low -= et * (row.teacher_low[r] + of_column(col.teacher_low));
        }
        g = by_row + by_col + low;
      } else {
        g = e * (row.softmax[r] + of_column(col.softmax));
      }
      if (row_all.uniform) g -= row_all.uniform[i] + of_columns(col_all.uniform);
      store_lanes(out.g + r * out.g_ld + j, g * tile.scale, lanes);
    });
  }
}

template <class T, bool kExponentials, bool kTeacher>
void gradient(const Tile<T>& tile, const GradientTile<T>& out, const GradientCoefficients<T>& row_all,
              const GradientCoefficients<T>& col_all, const TileFactors<T>& row, const TileFactors<T>& col) {
  tile.same ? gradient_rows<T, kExponentials, kTeacher, true>(tile, out, row_all, col_all, row, col)
            : gradient_rows<T, kExponentials, kTeacher, false>(tile, out, row_all, col_all, row, col);
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
  auto clear = [&](T* p) { __builtin_memset(p, 0, tile.cols * sizeof(T)); };
  clear(col.sum), clear(col.weighted), clear(col.target);
  if (tile.teacher) clear(col.teacher_sum), clear(col.teacher_weighted);
  if (tile.teacher)
    tile.same ? accumulate<T, true, true>(tile, center, teacher_center, row, col)
              : accumulate<T, true, false>(tile, center, teacher_center, row, col);
  else
    tile.same ? accumulate<T, false, true>(tile, center, teacher_center, row, col)
              : accumulate<T, false, false>(tile, center, teacher_center, row, col);
  fold(tile, center, teacher_center, tile.rows, row, row_state, tile.row0);
  fold(tile, center, teacher_center, tile.cols, col, col_state, tile.col0);
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
  tile_factors(tile, out, tile.rows, row, tile.row0, row_factors);
  tile_factors(tile, out, tile.cols, col, tile.col0, col_factors);
  const auto run = out.exponentials ? (out.teacher ? gradient<T, true, true> : gradient<T, true, false>)
                                    : (out.teacher ? gradient<T, false, true> : gradient<T, false, false>);
  run(tile, out, row, col, row_factors, col_factors);
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
