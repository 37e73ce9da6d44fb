// The loops over a wide tile (similarity.h), with an exponential for the row and one for the column of each logit.
// Compiled once per instruction set.
#include "../lanes.h"
#include "similarity.h"

namespace robustft {
namespace ROBUSTFT_ISA {
namespace {

// Moves (sum, weighted) from the old maximum to the new one. Before the first tile there is no old maximum and
// nothing to move; a difference would be inf - inf there.
template <class V>
inline void rebase(V keep, V shift, V* sum, V* weighted) {
  *weighted = (*weighted + *sum * shift) * keep;
  *sum *= keep;
}

template <class T, bool kTeacher>
void row_statistics(const Tile<T>& tile, const RunningStatistics<T>& state) {
  using V = Vec<T>;
  for (int64_t r = 0; r < tile.rows; ++r) {
    const int64_t i = tile.row0 + r;
    const T* s = tile.s + r * tile.ld;
    const T* st = kTeacher ? tile.teacher + r * tile.ld : nullptr;
    const T m = row_max(s, tile.cols, state.max[i]);
    const T mt = kTeacher ? row_max(st, tile.cols, state.teacher_max[i]) : T(0);
    const Label<T> label = tile.row_labels[i];
    V sum{}, weighted{}, target{}, teacher_sum{}, teacher_weighted{};
    for_each_vector<T>(tile.cols, [&](int64_t j, int64_t lanes) {
      const V v = load_lanes<V>(s + j, lanes, T(0));
      const Mask<T> labels = load_lanes<Mask<T>>(tile.col_labels + tile.col0 + j, lanes, Label<T>(-1));
      const V gap = v - m;
      V e = exp<T>(gap * tile.scale);
      V et{};
      if (kTeacher) et = exp<T>((load_lanes<V>(st + j, lanes, T(0)) - mt) * tile.teacher_scale);
      if (lanes < kLanes<T>) {  // the lanes past the end hold S = 0, which only the exponentials do not ignore
        e = load_partial<V>((const T*)&e, lanes, T(0));
        if (kTeacher) et = load_partial<V>((const T*)&et, lanes, T(0));
      }
      sum += e;
      weighted += e * gap;
      target += labels == label ? v : V{};
      if (kTeacher) {
        teacher_sum += et;
        teacher_weighted += et * gap;
      }
    });
    const T old_max = state.max[i];
    const bool first = old_max == -__builtin_inf();
    const T shift = first ? T(0) : old_max - m;
    auto keep = [&](T old_of, T new_of, T scale) { return first ? T(0) : exp<T>(V{} + (old_of - new_of) * scale)[0]; };
    rebase(keep(old_max, m, tile.scale), shift, &state.sum[i], &state.weighted[i]);
    state.sum[i] += reduce_sum<T>(sum);
    state.weighted[i] += reduce_sum<T>(weighted);
    state.target[i] += reduce_sum<T>(target);
    state.max[i] = m;
    if (kTeacher) {
      rebase(keep(state.teacher_max[i], mt, tile.teacher_scale), shift, &state.teacher_sum[i],
             &state.teacher_weighted[i]);
      state.teacher_sum[i] += reduce_sum<T>(teacher_sum);
      state.teacher_weighted[i] += reduce_sum<T>(teacher_weighted);
      state.teacher_max[i] = mt;
    }
  }
}

// One vector of columns at a time, all rows of the tile: the transposed loop without a transposed tile.
template <class T, bool kTeacher>
void column_vector(const Tile<T>& tile, const RunningStatistics<T>& state, int64_t c, int64_t lanes) {
  using V = Vec<T>;
  const int64_t j = tile.col0 + c;
  const T lowest = -__builtin_inf();
  auto s = [&](int64_t r) { return load_lanes<V>(tile.s + r * tile.ld + c, lanes, T(0)); };
  auto st = [&](int64_t r) { return load_lanes<V>(tile.teacher + r * tile.ld + c, lanes, T(0)); };

  const V old_max = load_lanes<V>(state.max + j, lanes, lowest);
  const V old_teacher_max = kTeacher ? load_lanes<V>(state.teacher_max + j, lanes, lowest) : V{};
  V m = old_max, mt = old_teacher_max;
  for (int64_t r = 0; r < tile.rows; ++r) {
    m = max(s(r), m);
    if (kTeacher) mt = max(st(r), mt);
  }
  const Mask<T> labels = load_lanes<Mask<T>>(tile.col_labels + j, lanes, Label<T>(-1));
  V sum{}, weighted{}, target{}, teacher_sum{}, teacher_weighted{};
  for (int64_t r = 0; r < tile.rows; ++r) {
    const V v = s(r);
    const V gap = v - m;
    const V e = exp<T>(gap * tile.scale);
    sum += e;
    weighted += e * gap;
    target += labels == tile.row_labels[tile.row0 + r] ? v : V{};
    if (kTeacher) {
      const V et = exp<T>((st(r) - mt) * tile.teacher_scale);
      teacher_sum += et;
      teacher_weighted += et * gap;
    }
  }
  const Mask<T> first = old_max == lowest;
  const V shift = first ? V{} : old_max - m;
  auto update = [&](T* sum_of, T* weighted_of, V keep, V sum_here, V weighted_here) {
    V running = load_lanes<V>(sum_of + j, lanes, T(0)), running_weighted = load_lanes<V>(weighted_of + j, lanes, T(0));
    rebase(first ? V{} : keep, shift, &running, &running_weighted);
    store_lanes(sum_of + j, running + sum_here, lanes);
    store_lanes(weighted_of + j, running_weighted + weighted_here, lanes);
  };
  update(state.sum, state.weighted, exp<T>((old_max - m) * tile.scale), sum, weighted);
  store_lanes(state.target + j, load_lanes<V>(state.target + j, lanes, T(0)) + target, lanes);
  store_lanes(state.max + j, m, lanes);
  if (kTeacher) {
    update(state.teacher_sum, state.teacher_weighted, exp<T>((old_teacher_max - mt) * tile.teacher_scale), teacher_sum,
           teacher_weighted);
    store_lanes(state.teacher_max + j, mt, lanes);
  }
}

template <class T, bool kTeacher>
void gradient(const Tile<T>& tile, const GradientTile<T>& out, const GradientCoefficients<T>& row,
              const GradientCoefficients<T>& col) {
  using V = Vec<T>;
  for (int64_t r = 0; r < tile.rows; ++r) {
    const int64_t i = tile.row0 + r;
    for_each_vector<T>(tile.cols, [&](int64_t c, int64_t lanes) {
      const int64_t j = tile.col0 + c;
      auto of_column = [&](const T* p) { return load_lanes<V>(p + j, lanes, T(0)); };
      const V v = load_lanes<V>(out.s + r * out.ld + c, lanes, T(0));
      const Mask<T> labels = load_lanes<Mask<T>>(tile.col_labels + j, lanes, Label<T>(-1));
      V g = row.softmax[i] * exp<T>((v - row.max[i]) * tile.scale - row.log_sum[i]);
      g += of_column(col.softmax) * exp<T>((v - of_column(col.max)) * tile.scale - of_column(col.log_sum));
      g -= labels == tile.row_labels[i] ? row.target[i] + of_column(col.target) : V{};
      if (row.uniform) g -= row.uniform[i] + of_column(col.uniform);
      if (kTeacher) {
        const V vt = load_lanes<V>(out.teacher + r * out.ld + c, lanes, T(0));
        g -= row.teacher[i] * exp<T>((vt - row.teacher_max[i]) * tile.teacher_scale - row.teacher_log_sum[i]);
        g -= of_column(col.teacher) *
             exp<T>((vt - of_column(col.teacher_max)) * tile.teacher_scale - of_column(col.teacher_log_sum));
      }
      store_lanes(out.g + r * out.g_ld + c, g * tile.scale, lanes);
    });
  }
}

}  // namespace

template <class T>
void wide_statistics(const Tile<T>& tile, const RunningStatistics<T>& row, const RunningStatistics<T>& col) {
  tile.teacher ? row_statistics<T, true>(tile, row) : row_statistics<T, false>(tile, row);
  for_each_vector<T>(tile.cols, [&](int64_t c, int64_t lanes) {
    tile.teacher ? column_vector<T, true>(tile, col, c, lanes) : column_vector<T, false>(tile, col, c, lanes);
  });
}

template <class T>
void wide_gradient(const Tile<T>& tile, const GradientTile<T>& out, const GradientCoefficients<T>& row,
                   const GradientCoefficients<T>& col) {
  out.teacher ? gradient<T, true>(tile, out, row, col) : gradient<T, false>(tile, out, row, col);
}

#define ROBUSTFT_INSTANTIATE(T)                                                                               \
  template void wide_statistics<T>(const Tile<T>&, const RunningStatistics<T>&, const RunningStatistics<T>&); \
  template void wide_gradient<T>(const Tile<T>&, const GradientTile<T>&, const GradientCoefficients<T>&,      \
                                 const GradientCoefficients<T>&);
ROBUSTFT_INSTANTIATE(float)
ROBUSTFT_INSTANTIATE(double)

}  // namespace ROBUSTFT_ISA
}  // namespace robustft
