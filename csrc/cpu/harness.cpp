// A program of one instruction set that runs every kernel on made-up numbers and prints what comes out, bit by bit.
//
// It knows no torch, is linked statically, and so runs where nothing else does: under an emulator of a processor that
// is not at hand. `python -m benchmarks.emulate` builds it for several and holds their numbers against each other.
//
//   <kernel>/<case> <type> <count>     then the numbers, each as the hexadecimal digits of its bits
//   end
#include <unistd.h>

#include <cinttypes>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "classes.h"
#include "misalignment.h"
#include "neighbors/neighbors.h"
#include "scores.h"
#include "similarity/sigmoid.h"
#include "similarity/similarity.h"

#define ROBUSTFT_TEXT(x) #x
#define ROBUSTFT_NAME(x) ROBUSTFT_TEXT(x)

namespace robustft {
namespace {

namespace isa = ROBUSTFT_ISA;

constexpr double kInfinity = std::numeric_limits<double>::infinity(), kNan = std::numeric_limits<double>::quiet_NaN();

// splitmix64: the same numbers everywhere.
uint64_t state = 0;
uint64_t random_bits() {
  uint64_t z = state += 0x9E3779B97F4A7C15u;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
  return z ^ (z >> 31);
}
// In [-1, 1), exact in float.
double random_number() { return double(int64_t(random_bits() >> 40) - (1 << 23)) * 0x1p-23; }

template <class T>
std::vector<T> numbers(int64_t count, double scale = 1) {
  std::vector<T> v(count);
  for (T& x : v) x = T(random_number() * scale);
  return v;
}
template <class I>
std::vector<I> integers(int64_t count, int64_t below) {
  std::vector<I> v(count);
  for (I& x : v) x = I(random_bits() % uint64_t(below));
  return v;
}

template <class P>
struct Name;
template <>
struct Name<float> {
  static constexpr const char* text = "float32";
};
template <>
struct Name<double> {
  static constexpr const char* text = "float64";
};
template <>
struct Name<Bf16> {
  static constexpr const char* text = "bfloat16";
};
template <>
struct Name<Fp16> {
  static constexpr const char* text = "float16";
};
template <>
struct Name<int32_t> {
  static constexpr const char* text = "int32";
};
template <>
struct Name<int64_t> {
  static constexpr const char* text = "int64";
};

template <class P>
void show(const std::string& name, const P* p, int64_t count) {
  std::printf("%s %s %" PRId64 "\n", name.c_str(), Name<P>::text, count);
  for (int64_t i = 0; i < count; ++i) {
    uint64_t bits = 0;
    std::memcpy(&bits, p + i, sizeof(P));
    std::printf("%0*" PRIx64 "%c", int(2 * sizeof(P)), bits, (i + 1) % 16 == 0 || i + 1 == count ? '\n' : ' ');
  }
}
template <class P>
void show(const std::string& name, const std::vector<P>& v) {
  show(name, v.data(), int64_t(v.size()));
}

std::string of(int64_t number) { return std::to_string(number); }

// Widths of a row: of one lane, around those of every vector, and of several with a rest.
constexpr int64_t kWidths[] = {1, 3, 4, 8, 15, 16, 17, 33, 70}, kFewWidths[] = {1, 7, 16, 37};

template <class T>
void exponentials(const std::string& type) {
  std::vector<T> x = numbers<T>(61, sizeof(T) == 4 ? 90 : 720);
  for (double more :
       {0.0, -0.0, 1.0, -1e-30, kInfinity, -kInfinity, kNan, 88.7, -87.3, 709.7, -708.3, -1e30, 1e30, 1e-8})
    x.push_back(T(more));
  std::vector<T> y(x.size()), slope(x.size());
  isa::exp_values(x.data(), y.data(), int64_t(x.size()));
  show("exp_values/" + type, y);
  isa::softplus_values(x.data(), y.data(), slope.data(), int64_t(x.size()));
  show("softplus_values/" + type, y);
  show("softplus_values/" + type + ".slope", slope);
}

template <class T>
void scores(const std::string& type) {
  constexpr int64_t n = 4;
  for (int64_t k : kWidths)
    for (double inverse : {100.0, 1.0}) {
      std::vector<T> c = numbers<T>(n * k), out(class_score::kCount * n);
      std::vector<int64_t> prediction(n);
      c[k - 1] = T(kNan), c[2 * k - 1] = T(2);
      isa::class_scores<T>({c.data(), 0, n, n, k, T(inverse), T(100)}, out.data(), prediction.data());
      const std::string name = "class_scores/" + type + "," + of(k) + "," + of(int64_t(inverse));
      show(name, out);
      show(name + ".prediction", prediction);
    }
}

// Numbers as P keeps them: halves by their bits, of which some are subnormal, infinite or NaN.
template <class P>
std::vector<P> stored(int64_t count) {
  return numbers<P>(count, 8);
}
template <>
std::vector<Bf16> stored<Bf16>(int64_t count) {
  std::vector<Bf16> v;
  for (float x : numbers<float>(count, 8)) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    v.push_back(Bf16(bits >> 16));
  }
  return v;
}
template <>
std::vector<Fp16> stored<Fp16>(int64_t count) {
  std::vector<Fp16> v;
  for (int64_t i = 0; i < count; ++i) {
    const uint64_t r = random_bits();
    const uint64_t exponent = r % 19;  // 0: subnormal, up to 2^3
    v.push_back(Fp16((r >> 20 & 1) << 15 | exponent << 10 | (r >> 40 & 0x3ff)));
  }
  return v;
}

template <class P>
void misalignment(const std::string& type) {
  using T = Wide<P>;
  constexpr int64_t n = 5;
  for (int64_t k : kWidths)
    for (bool top1 : {false, true}) {
      const int64_t stride = k + 3;
      const std::vector<P> z = stored<P>(n * stride);
      const std::vector<int64_t> labels = integers<int64_t>(n, k);
      std::vector<T> offset(n), sum(n), label(n), log_sum(n), coefficient = numbers<T>(n);
      std::vector<P> g(n * k);
      const LogitRows<P> rows{z.data(), n, stride, k, labels.data()};
      isa::misranked_sums<P>(rows, top1, offset.data(), sum.data(), label.data());
      const std::string name = "misranked_sums/" + type + "," + of(k) + (top1 ? ",top1" : "");
      show(name + ".offset", offset);
      show(name + ".sum", sum);
      show(name + ".label", label);
      for (int64_t i = 0; i < n; ++i) {
        if (sum[i] == 0) coefficient[i] = 0;
        log_sum[i] = sum[i] == 0 ? T(0) : std::log(sum[i]);
      }
      isa::misranked_softmax<P>(rows, top1, offset.data(), log_sum.data(), coefficient.data(), g.data());
      show("misranked_softmax/" + type + "," + of(k) + (top1 ? ",top1" : ""), g);
    }
}

template <class T>
void classes(const std::string& type) {
  constexpr int64_t n = 4;
  for (int64_t k : kFewWidths)
    for (int kind = 0; kind < 8; ++kind) {
      const bool misranked = kind & 1, means = kind == 3 || kind == 7, soft = kind == 4 || kind == 6, bias = kind & 2;
      const int64_t ld = k + 5;
      const std::vector<T> similarities = numbers<T>(n * ld), b = numbers<T>(k), q = numbers<T>(n * k);
      const std::vector<int64_t> labels = integers<int64_t>(n, k);
      std::vector<T> s = similarities, g(n * ld), sums(k), scratch(k), statistics(class_statistic::kSoftCount * n);
      ClassPanel<T> panel{s.data(),
                          g.data(),
                          ld,
                          0,
                          n,
                          n,
                          k,
                          T(20),
                          bias ? b.data() : nullptr,
                          labels.data(),
                          soft ? q.data() : nullptr,
                          bias ? sums.data() : nullptr};
      isa::class_statistics<T>(panel, {misranked, means}, statistics.data(), scratch.data());
      const std::string name = type + "," + of(k) + "," + of(kind);
      show("class_statistics/" + name, statistics);
      std::vector<T> coefficients(class_coefficient::kCount * n);
      auto put = [&](int64_t which, auto value) {
        for (int64_t i = 0; i < n; ++i) coefficients[which * n + i] = T(value(i));
      };
      auto found = [&](int64_t which) { return [&, which](int64_t i) { return statistics[which * n + i]; }; };
      auto any = [](int64_t) { return random_number(); };
      put(class_coefficient::kMax, found(class_statistic::kMax));
      put(class_coefficient::kLogSum, found(class_statistic::kLogSum));
      put(class_coefficient::kAboveLogSum, found(class_statistic::kAboveLogSum));
      put(class_coefficient::kSoftmax, any);
      put(class_coefficient::kLabel, any);
      put(class_coefficient::kUniform, any);
      put(class_coefficient::kTargets, any);
      put(class_coefficient::kAbove, [&](int64_t i) {
        return misranked && !soft && std::isfinite(statistics[class_statistic::kAboveLogSum * n + i]) ? 0.25 : 0;
      });
      for (bool top1 : {false, true}) {
        const std::string which = name + (top1 ? ",top1" : "");
        isa::class_gradient<T>(panel, coefficients.data(), true, top1);
        show("class_gradient/" + which + ",kept", g);
        ClassPanel<T> again = panel;
        std::vector<T> fresh = similarities;
        again.s = fresh.data();
        isa::class_gradient<T>(again, coefficients.data(), false, top1);
        show("class_gradient/" + which, g);
        if (bias) show("class_gradient/" + which + ".bias", sums);
      }
    }
}

// The vectors of a side of a tile, and running statistics before the first of them.
template <class T>
struct Side {
  int64_t n;
  std::vector<T> data;

  explicit Side(int64_t n) : n(n), data(15 * n, T(0)) {
    for (int64_t which : {0, 5})
      for (int64_t i = 0; i < n; ++i) at(which)[i] = T(-kInfinity);
  }
  T* at(int64_t which) { return data.data() + which * n; }
  RunningStatistics<T> running(bool teacher) {
    return {at(0),
            at(1),
            at(2),
            at(3),
            at(4),
            teacher ? at(5) : nullptr,
            teacher ? at(6) : nullptr,
            teacher ? at(7) : nullptr};
  }
  TileStatistics<T> tile() { return {at(8), at(9), at(10), at(11), at(12), at(13), at(14)}; }
  TileFactors<T> factors() { return {at(8), at(9), at(10), at(11)}; }
  void show_running(const std::string& name) { show(name, data.data(), 8 * n); }
};

// Coefficients of a side that fit its statistics.
template <class T>
struct Coefficients {
  std::vector<T> data;
  GradientCoefficients<T> view;

  Coefficients(const RunningStatistics<T>& found, int64_t n, bool uniform, bool teacher) : data(8 * n) {
    auto row = [&](int64_t which) { return data.data() + which * n; };
    for (int64_t i = 0; i < n; ++i) {
      row(0)[i] = found.max[i], row(1)[i] = std::log(found.sum[i]);
      for (int64_t which : {2, 3, 4, 7}) row(which)[i] = T(random_number());
      if (teacher) row(5)[i] = found.teacher_max[i], row(6)[i] = std::log(found.teacher_sum[i]);
    }
    view = {row(0),
            row(1),
            row(2),
            row(3),
            uniform ? row(4) : nullptr,
            teacher ? row(5) : nullptr,
            teacher ? row(6) : nullptr,
            teacher ? row(7) : nullptr};
  }
};

template <class T>
void similarity(const std::string& type) {
  constexpr T missing = std::numeric_limits<T>::quiet_NaN();
  for (int64_t cols : kFewWidths)
    for (int kind = 0; kind < 8; ++kind) {
      const bool teacher = kind & 1, same = kind & 2, wide = kind & 4;
      const int64_t rows = 6, ld = cols + 7;  // four rows at once, and two
      std::vector<T> s = numbers<T>(rows * ld), st = numbers<T>(rows * ld), e(rows * ld), et(rows * ld), g(rows * ld);
      if (wide) s[ld + cols / 2] = T(60);
      const std::vector<Label<T>> row_labels = integers<Label<T>>(rows, 3), col_labels = integers<Label<T>>(cols, 3);
      Side<T> row(rows), col(cols);
      Tile<T> tile{s.data(),
                   teacher ? st.data() : nullptr,
                   e.data(),
                   teacher ? et.data() : nullptr,
                   ld,
                   ld,
                   0,
                   0,
                   rows,
                   cols,
                   T(20),
                   T(10),
                   row_labels.data(),
                   col_labels.data(),
                   same};
      const std::string name = type + "," + of(cols) + "," + of(kind);
      const RunningStatistics<T> row_state = row.running(teacher), col_state = col.running(teacher);
      T center = missing, teacher_center = missing;
      if (wide) {
        isa::wide_statistics<T>(tile, row_state, col_state);
        isa::wide_statistics<T>(tile, row_state, col_state);  // a second tile of the same rows and columns
      } else {
        Range<T> range{}, teacher_range{};
        isa::tile_range<T>(tile, row.tile(), col.tile(), &range, &teacher_range);
        show("tile_range/" + name, &range.low, 1);
        show("tile_range/" + name + ".high", &range.high, 1);
        center = T(std::nearbyint((double(range.low) + range.high) / 2 * 20 * 1.4426950408889634));
        teacher_center =
            T(std::nearbyint((double(teacher_range.low) + teacher_range.high) / 2 * 10 * 1.4426950408889634));
        isa::tile_statistics<T>(tile, center, teacher_center, row.tile(), col.tile(), row_state, col_state);
        for (int64_t r = 0; r < rows; ++r) show("tile_statistics/" + name + ".e" + of(r), e.data() + r * ld, cols);
        isa::tile_range<T>(tile, row.tile(), col.tile(), &range, &teacher_range);
        isa::tile_statistics<T>(tile, center, teacher_center, row.tile(), col.tile(), row_state, col_state);
      }
      isa::tile_totals<T>(tile, row_state.total, col_state.total);
      const std::string kernel = wide ? "wide_statistics/" : "tile_statistics/";
      row.show_running(kernel + name + ".rows");
      col.show_running(kernel + name + ".cols");
      const Coefficients<T> of_rows(row_state, rows, same, teacher), of_cols(col_state, cols, same, teacher);
      for (bool kept : {false, true}) {
        if (wide && kept) continue;
        GradientTile<T> out{kept ? e.data() : s.data(),
                            teacher ? (kept ? et.data() : st.data()) : nullptr,
                            g.data(),
                            ld,
                            ld,
                            kept,
                            center,
                            teacher_center};
        if (wide)
          isa::wide_gradient<T>(tile, out, of_rows.view, of_cols.view);
        else
          isa::tile_gradient<T>(tile, out, of_rows.view, of_cols.view, row.factors(), col.factors());
        for (int64_t r = 0; r < rows; ++r)
          show((wide ? "wide_gradient/" : "tile_gradient/") + name + (kept ? ",kept" : "") + "." + of(r),
               g.data() + r * ld, cols);
      }
      if (wide) continue;
      std::vector<T> sums(sigmoid_sum::count(teacher) * rows), weight = numbers<T>(2 * rows);
      isa::sigmoid_tile<T>(tile, {T(-10), T(-5), sums.data(), weight.data(), rows}, {g.data(), ld});
      show("sigmoid_tile/" + name, sums);
      for (int64_t r = 0; r < rows; ++r) show("sigmoid_tile/" + name + "." + of(r), g.data() + r * ld, cols);
    }
}

template <class T>
void neighbors(const std::string& type) {
  for (int64_t d : kWidths)
    for (int kind = 0; kind < 4; ++kind) {
      const bool centred = kind & 1, bf16 = kind & 2;
      std::vector<T> x = numbers<T>(d), c = numbers<T>(d, 0.25), out(d);
      RowNorms norms;
      isa::centre_row<T>(x.data(), centred ? c.data() : nullptr, d, bf16, out.data(), &norms);
      const std::string name = "centre_row/" + type + "," + of(d) + "," + of(kind);
      show(name, out);
      show(name + ".norms", &norms.squared, 1);
      show(name + ".residual", &norms.residual, 1);
    }
  for (int64_t count : {1, 5, 64, 67, 300}) {
    const int64_t rows = 3, ld = count + 2;
    const std::vector<T> products = numbers<T>(rows * ld), bias = numbers<T>(count, 0.25);
    T reached;
    isa::score_reached<T>(products.data(), bias.data(), count, 1 + count / 10, &reached);
    show("score_reached/" + type + "," + of(count), &reached, 1);
    std::vector<std::vector<Hit<T>>> hits(rows, std::vector<Hit<T>>(count + 1));
    std::vector<Hit<T>*> at;
    for (auto& of_row : hits) at.push_back(of_row.data());
    std::vector<int64_t> counts(rows, 1);  // one is there already
    const std::vector<T> thresholds{reached, T(0), T(-kInfinity)};
    isa::collect<T>({const_cast<T*>(products.data()), bias.data(), rows, count, ld, 1000}, thresholds.data(), at.data(),
                    counts.data());
    show("collect/" + type + "," + of(count) + ".counts", counts);
    for (int64_t r = 0; r < rows; ++r) {
      std::vector<T> score;
      std::vector<int32_t> point;
      for (int64_t i = 1; i < counts[r]; ++i) score.push_back(hits[r][i].score), point.push_back(hits[r][i].point);
      show("collect/" + type + "," + of(count) + "." + of(r), score);
      show("collect/" + type + "," + of(count) + ".points" + of(r), point);
    }
  }
  for (int64_t d : {1, 8, 31, 64, 131}) {
    constexpr int64_t points = 9;
    const std::vector<T> x = numbers<T>(points * d);
    const std::vector<double> query = numbers<double>(d);
    const std::vector<int32_t> rows = integers<int32_t>(12, points);
    std::vector<double> some(rows.size()), all(points);
    isa::squared_distances<T>(query.data(), x.data(), d, rows.data(), int64_t(rows.size()), some.data());
    isa::squared_distances<T>(query.data(), x.data(), d, nullptr, points, all.data());
    show("squared_distances/" + type + "," + of(d) + ".some", some);
    show("squared_distances/" + type + "," + of(d), all);
  }
}

// Blocks of exact distances: where a point is not there, it is zeros.
void blocks() {
  constexpr int64_t d = kBlockDepth;
  const std::vector<double> x = numbers<double>(kBlockPoints * d), q = numbers<double>(kBlockQueries * d);
  std::vector<double> queries(kBlockQueries * d), block(kBlockPoints * d), distances(kBlockQueries * kBlockPoints);
  isa::pack_block(q.data(), kBlockQueries, d, kBlockQueries, queries.data());
  for (int64_t there = 1; there <= kBlockPoints; ++there) {
    isa::pack_block(x.data(), there, d, kBlockPoints, block.data());
    isa::block_distances(queries.data(), block.data(), d, distances.data(), kBlockPoints);
    show("block_distances/f64," + of(there), distances);
  }
}

// Distances from products: every number of queries that is taken at once, panels that are not full, and one point that
// is a query, whose distance is not certain.
void panels() {
  for (int64_t d : {1, 7, 64})
    for (int64_t count : {1, 2, 3, 4, 9})
      for (int64_t there : {1, 11, 24, 48})
        for (bool squared : {false, true}) {
          std::vector<float> x = numbers<float>(there * d), c = numbers<float>(d, 0.25);
          std::vector<double> q = numbers<double>(count * d), norms(count), packed(kPanelPoints * d);
          for (int64_t j = 0; j < d; ++j) q[j] = double(x[j]) - c[j];
          for (int64_t i = 0; i < count * d; ++i) norms[i / d] += q[i] * q[i];
          std::vector<double> of_points(kPanelPoints);
          isa::pack_panel(x.data(), c.data(), there, d, packed.data(), of_points.data());
          std::vector<float> distances(count * there);
          std::vector<uint64_t> open(count);
          isa::panel_distances({q.data(), norms.data(), count, d, 1e-14, squared},
                               {packed.data(), of_points.data(), there}, distances.data(), there, open.data());
          distances[0] = 0;  // rounding alone
          const std::string name = "f32," + of(d) + "," + of(count) + "," + of(there) + (squared ? ",squared" : "");
          show("pack_panel/" + name, of_points);
          show("panel_distances/" + name, distances);
          show("panel_distances/" + name + ".open", std::vector<int64_t>(open.begin(), open.end()));
        }
}

// Products of queries and points in fixed point, and the rows from which they come: every number of queries that a
// group can have, and points that fill no panel.
void fixed_point() {
  for (int64_t d : kWidths) {
    const std::vector<float> x = numbers<float>(d);
    std::vector<int16_t> whole(d);
    double residual;
    isa::to_fixed(x.data(), d, 1000, whole.data(), &residual);
    show("to_fixed/" + of(d), std::vector<int32_t>(whole.begin(), whole.end()));
    show("to_fixed/" + of(d) + ".residual", &residual, 1);
  }
  for (int64_t pairs : {1, 7, 64})
    for (int64_t rows : {1, 2, 3, 4, 5, 6, 11})
      for (int64_t cols : {1, 15, 16, 39, 64}) {
        const int64_t panels = (cols + kPanel - 1) / kPanel;
        std::vector<int16_t> left, right;
        for (int32_t i : integers<int32_t>(rows * pairs * 2, 5001)) left.push_back(int16_t(i - 2500));
        for (int32_t i : integers<int32_t>(panels * kPanel * pairs * 2, 5001)) right.push_back(int16_t(i - 2500));
        const std::vector<float> factors = numbers<float>(rows);
        std::vector<float> out(rows * cols);
        isa::fixed_products({left.data(), factors.data(), right.data(), rows, cols, pairs}, out.data(), cols);
        show("fixed_products/" + of(pairs) + "," + of(rows) + "," + of(cols), out);
      }
}

template <class T>
void all_of(const std::string& type) {
  exponentials<T>(type);
  scores<T>(type);
  misalignment<T>(type);
  classes<T>(type);
  similarity<T>(type);
  neighbors<T>(type);
}

}  // namespace
}  // namespace robustft

int main() {
  std::printf("kernels %s, vectors of %d bytes\n", ROBUSTFT_NAME(ROBUSTFT_ISA), ROBUSTFT_VECTOR_BYTES);
  robustft::all_of<float>("f32");
  robustft::all_of<double>("f64");
  robustft::blocks();
  robustft::panels();
  robustft::fixed_point();
  robustft::misalignment<robustft::Bf16>("bf16");
  robustft::misalignment<robustft::Fp16>("f16");
  std::puts("end");
  std::fflush(stdout);
  while (getpid() == 1) pause();  // the first program of a system must not end, or the system does not print the rest
  return 0;
}
