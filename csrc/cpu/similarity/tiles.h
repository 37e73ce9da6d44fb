// The tiles of a matrix of similarities: how it is cut, which thread has which tile, and the factors of each.
//
// Statistics and gradient walk over the same tiles in the same order: panels of rows times tiles of columns, shared out
// so that no two threads have the same panel or the same tile. Half-precision features are widened once to float32:
// sums and outputs of the tiles are float32.
#pragma once
#include <algorithm>
#include <cmath>
#include <optional>
#include <string>
#include <vector>

#include "../tile.h"
#include "similarity.h"

namespace robustft {
namespace similarity {

constexpr int64_t kMinRows = 64, kMinCols = 128, kMaxRows = 256, kMaxCols = 512;  // of a tile
constexpr int64_t kPanelsAtOnce = 16;

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The tiles of an (n, m) matrix. The gradient takes the statistics' ones, whatever has become of the threads.
struct TileShape {
  int64_t rows = kMaxRows, cols = kMaxCols;

  // As large as they may be, but so many that each thread finds one in a row and a column of tiles of its own.
  static TileShape of(int64_t n, int64_t m) {
    const int64_t threads = torch::stable::get_num_threads();
    TileShape shape;
    for (;;) {
      const int64_t down = ceil_div(n, shape.rows), across = ceil_div(m, shape.cols);
      if (std::min(down, across) >= threads) return shape;
      if (shape.cols > kMinCols && (across <= down || shape.rows == kMinRows))
        shape.cols /= 2;
      else if (shape.rows > kMinRows)
        shape.rows /= 2;
      else
        return shape;
    }
  }
};

// The centres of all tiles, on the grid of the smallest ones, (heads, down, across + 2), and in the two columns more
// the shape of the tiles.
template <class T>
struct Centers {
  T* data;
  int64_t down, across;

  Centers(T* data, int64_t n, int64_t m) : data(data), down(ceil_div(n, kMinRows)), across(ceil_div(m, kMinCols)) {}
  static std::vector<int64_t> sizes(int64_t heads, int64_t n, int64_t m) {
    return {heads, ceil_div(n, kMinRows), ceil_div(m, kMinCols) + 2};
  }
  T& at(int64_t head, int64_t row0, int64_t col0) const {
    return data[(head * down + row0 / kMinRows) * (across + 2) + col0 / kMinCols];
  }
  void keep(const TileShape& shape) const { data[across] = T(shape.rows), data[across + 1] = T(shape.cols); }
  TileShape shape() const { return {int64_t(data[across]), int64_t(data[across + 1])}; }
};

// Calls f(panel, tile) for all of panels x tiles, sharing the calls out among threads so that at no time two of them
// have the same panel or the same tile: each may add to what belongs to its rows and to its columns. Every panel meets
// the tiles, and every tile the panels, in an order that does not depend on the number of threads. prepare(first, last)
// is called before panels [first, last) are met.
template <class P, class F>
void tournament(int64_t panels, int64_t tiles, const P& prepare, const F& f) {
  const int64_t at_once = std::min(std::max<int64_t>(kPanelsAtOnce, torch::stable::get_num_threads()), tiles);
  for (int64_t first = 0; first < panels; first += at_once) {
    const int64_t count = std::min(at_once, panels - first);
    prepare(first, first + count);
    for (int64_t step = 0; step < tiles; ++step)
      torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
        for (int64_t p = begin; p < end; ++p) f(first + p, (p + step) % tiles);
      });
  }
}

template <class T>
T scale_of(const Tensor& scale) {
  const double s = number_in(scale);
  STD_TORCH_CHECK(!(s < 0), "logit_scale is ", s,
                  "; expected the multiplied-out scale exp(...), which is not negative");
  return T(s);
}

template <class T>
std::vector<Label<T>> labels_of(const Tensor& labels) {
  const Tensor wide = contiguous_as(labels, ScalarType::Long);
  const int64_t* p = wide.const_data_ptr<int64_t>();
  return std::vector<Label<T>>(p, p + wide.numel());
}

// Lowest and highest label of every `step` samples.
template <class T>
std::vector<Range<Label<T>>> label_ranges(const std::vector<Label<T>>& labels, int64_t step) {
  std::vector<Range<Label<T>>> ranges;
  for (int64_t i = 0; i < int64_t(labels.size()); i += step) {
    const auto begin = labels.begin() + i, end = labels.begin() + std::min<int64_t>(i + step, labels.size());
    const auto [low, high] = std::minmax_element(begin, end);
    ranges.push_back({*low, *high});
  }
  return ranges;
}

// The arguments that both operators have.
struct Inputs {
  const Tensor &x, &t, &scale, &x_labels, &t_labels;
  const std::optional<Tensor>&x_teacher, &t_teacher, &teacher_scale;
  const std::string& precision;

  int64_t n() const { return x.size(0); }
  int64_t m() const { return t.size(0); }
  int64_t heads() const { return x_teacher ? 2 : 1; }

  void check(const char* op) const {
    STD_TORCH_CHECK(x.dim() == 2 && t.dim() == 2 && x.size(1) == t.size(1) && n() > 0 && m() > 0, op,
                    ": x and t must be (n, d) and (m, d), n and m at least 1");
    STD_TORCH_CHECK(x.scalar_type() == t.scalar_type(), op, ": x and t differ in dtype");
    STD_TORCH_CHECK(scale.numel() == 1, op, ": scale must have one element");
    STD_TORCH_CHECK(x_labels.numel() == n() && t_labels.numel() == m(), op, ": one label per row of x and t");
    STD_TORCH_CHECK(
        x_teacher.has_value() == t_teacher.has_value() && t_teacher.has_value() == teacher_scale.has_value(), op,
        ": x_teacher, t_teacher and teacher_scale go together");
    if (x_teacher)
      STD_TORCH_CHECK(x_teacher->dim() == 2 && t_teacher->dim() == 2 && x_teacher->size(0) == n() &&
                          t_teacher->size(0) == m() && x_teacher->size(1) == t_teacher->size(1),
                      op, ": the teacher's features must match x and t in number");
  }
};

// One of the two matrices S (student, teacher) by its factors, panel by panel.
template <class T>
struct Factors {
  Tensor x, t;
  Arithmetic arithmetic;
  RightMatrix<T> columns;
  std::vector<std::optional<LeftRows<T>>> panels;

  Factors(const Tensor& features, const Tensor& texts, Arithmetic arithmetic, int64_t panels)
      : x(contiguous_as(features, scalar_type<T>())),
        t(contiguous_as(texts, scalar_type<T>())),
        arithmetic(arithmetic),
        columns(t, RightMatrix<T>::kColumns, arithmetic),
        panels(panels) {}

  void prepare(int64_t panel, int64_t rows_of_panel) {
    const int64_t begin = panel * rows_of_panel;
    panels[panel].emplace(x, begin, std::min(rows_of_panel, x.size(0) - begin), arithmetic);
  }
};

// What both operators share: the tiles, their labels, and S of one of them.
template <class T>
struct Tiles {
  const Inputs& in;
  TileShape shape;
  int64_t panels, tiles;
  Arithmetic arithmetic;
  Factors<T> student;
  std::optional<Factors<T>> teacher;
  T scale, teacher_scale = T(0);
  std::vector<Label<T>> row_labels, col_labels;
  std::vector<Range<Label<T>>> row_ranges, col_ranges;

  Tiles(const Inputs& in, const TileShape& shape)
      : in(in),
        shape(shape),
        panels(ceil_div(in.n(), shape.rows)),
        tiles(ceil_div(in.m(), shape.cols)),
        arithmetic(arithmetic_of(in.x.scalar_type(), in.precision)),
        student(in.x, in.t, arithmetic, panels),
        scale(scale_of<T>(in.scale)),
        row_labels(labels_of<T>(in.x_labels)),
        col_labels(labels_of<T>(in.t_labels)),
        row_ranges(label_ranges<T>(row_labels, shape.rows)),
        col_ranges(label_ranges<T>(col_labels, shape.cols)) {
    if (in.x_teacher) {
      teacher.emplace(*in.x_teacher, *in.t_teacher, arithmetic, panels);
      teacher_scale = scale_of<T>(*in.teacher_scale);
    }
  }

  void prepare(int64_t first, int64_t last) {
    torch::stable::parallel_for(first, last, 1, [&](int64_t begin, int64_t end) {
      for (int64_t p = begin; p < end; ++p) {
        student.prepare(p, shape.rows);
        if (teacher) teacher->prepare(p, shape.rows);
      }
    });
  }

  void release(int64_t last) {
    for (auto* factors : {&student, teacher ? &*teacher : nullptr})
      if (factors)
        for (int64_t p = 0; p < last; ++p) factors->panels[p].reset();
  }

  // The tile of a panel and a column tile, over memory that is still to be filled.
  Tile<T> at(int64_t p, int64_t q, T* s, T* teacher_s, int64_t ld) const {
    Tile<T> tile{};
    tile.s = s, tile.teacher = teacher_s, tile.ld = ld;
    tile.row0 = p * shape.rows, tile.col0 = q * shape.cols;
    tile.rows = std::min(shape.rows, in.n() - tile.row0), tile.cols = std::min(shape.cols, in.m() - tile.col0);
    tile.scale = scale, tile.teacher_scale = teacher_scale;
    tile.row_labels = row_labels.data(), tile.col_labels = col_labels.data();
    tile.same = row_ranges[p].low <= col_ranges[q].high && col_ranges[q].low <= row_ranges[p].high;
    return tile;
  }

  void compute(const Tile<T>& tile, int64_t p) const {
    multiply(*student.panels[p], 0, tile.rows, student.columns, tile.col0, tile.cols, tile.s, tile.ld);
    if (tile.teacher)
      multiply(*teacher->panels[p], 0, tile.rows, teacher->columns, tile.col0, tile.cols, tile.teacher, tile.ld);
  }
};

// Leaves S, and the teacher's, where e would be.
template <class T>
void keep_similarities(const Tile<T>& tile) {
  for (int64_t r = 0; r < tile.rows; ++r) {
    std::copy_n(tile.s + r * tile.ld, tile.cols, tile.e + r * tile.e_ld);
    if (tile.teacher) std::copy_n(tile.teacher + r * tile.ld, tile.cols, tile.teacher_e + r * tile.e_ld);
  }
}

// Memory of one thread: tiles and per-row and per-column vectors. No more than a small matrix takes: fresh pages for a
// whole tile cost more than 32 x 32 entries do.
template <class T>
struct Workspace {
  static constexpr int64_t kVectors = 7, kBlock = 64;
  int64_t rows, cols;
  Buffer<T> s, teacher, vectors;
  Scratch scratch;

  Workspace(const Inputs& in, const TileShape& shape, bool teacher)
      : rows(std::min(shape.rows, ceil_div(in.n(), kBlock) * kBlock)),
        cols(std::min(shape.cols, ceil_div(in.m(), kBlock) * kBlock)),
        s(rows * cols),
        teacher(teacher ? rows * cols : 0),
        vectors(kVectors * (rows + cols)) {}

  T* row(int64_t i) const { return vectors.get() + i * rows; }
  T* col(int64_t i) const { return vectors.get() + kVectors * rows + i * cols; }
};

}  // namespace similarity
}  // namespace robustft
