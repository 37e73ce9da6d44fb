// Distances from products in double (sorted.cpp): points packed side by side, and queries by these. Compiled once per
// instruction set.
#include "neighbors.h"
#include "widen.h"

namespace robustft {
namespace ROBUSTFT_ISA {
namespace {

constexpr int64_t kWide = kLanes<double>;
constexpr int kRows = 4, kVectors = ROBUSTFT_VECTOR_BYTES == 64 ? 6 : 3;  // of queries and of points: sums in registers
constexpr int64_t kColumn = kVectors * kWide;                             // points of a panel that are side by side

static_assert(kPanelPoints % kColumn == 0 && kPanelPoints <= 64, "whole columns, and a bit of a word for each point");

// The distances of kCount queries, from `first` on, from a column of points, from `begin` on: from products, see
// sorted.cpp. `left` points are there.
template <int kCount>
void measure_column(const PanelQueries& in, int64_t first, const Panel& panel, int64_t begin, int64_t left, float* out,
                    int64_t ld, uint64_t* open) {
  const double* x = panel.points + begin * in.d;
  const double* q[kCount];
  for (int r = 0; r < kCount; ++r) q[r] = in.rows + (first + r) * in.d;
  Vec<double> sums[kCount][kVectors] = {};
  for (int64_t j = 0; j < in.d; ++j) {
    Vec<double> of_points[kVectors];
    for (int v = 0; v < kVectors; ++v) of_points[v] = load<Vec<double>>(x + j * kColumn + v * kWide);
    for (int r = 0; r < kCount; ++r)
      for (int v = 0; v < kVectors; ++v) sums[r][v] += q[r][j] * of_points[v];
  }
  for (int r = 0; r < kCount; ++r)
    for (int v = 0; v < kVectors; ++v) {
      const int64_t lanes = left - v * kWide < kWide ? left - v * kWide : kWide;
      if (lanes <= 0) break;
      const Vec<double> norms = load<Vec<double>>(panel.norms + begin + v * kWide) + in.norms[first + r];
      const Vec<double> t = norms - 2 * sums[r][v], e = in.bound * norms, least = t - e;
      Vec<double> low = least > 0 ? least : Vec<double>{}, high = t + e;
      if (!in.squared) low = root(low), high = root(high);
      const NarrowVec<float> rounded = narrow(high);
      float* const to = out + (first + r) * ld + begin + v * kWide;
      lanes == kWide ? store(to, rounded) : store_partial(to, rounded, lanes);
      const uint64_t bits = lane_bits(widen(narrow(low)) != widen(rounded)) & ((uint64_t(1) << lanes) - 1);
      open[first + r] |= bits << (begin + v * kWide);
    }
}

}  // namespace

// Up to kPanelPoints points less c, side by side in double: columns of kColumn, each [d][kColumn]; and their norms.
// Points that are not there are zeros. So few are read at a time that the processor fetches ahead of each.
void pack_panel(const float* x, const float* c, int64_t count, int64_t d, double* out, double* norms) {
  constexpr int64_t kLine = 64 / sizeof(float);
  for (int64_t first = 0; first < kPanelPoints; first += kWide) {
    double* const side = out + first / kColumn * kColumn * d + first % kColumn;
    Vec<double> squares{};
    for (int64_t begin = 0; begin < d; begin += kLine) {
      const int64_t end = d - begin < kLine ? d : begin + kLine;
      for (int64_t p = 0; p < kWide; ++p) {
        const float* const row = x + (first + p) * d;
        const bool there = first + p < count;
        for (int64_t j = begin; j < end; ++j) side[j * kColumn + p] = there ? double(row[j]) - c[j] : 0;
      }
      for (int64_t j = begin; j < end; ++j) {
        const Vec<double> v = load<Vec<double>>(side + j * kColumn);
        squares += v * v;
      }
    }
    store(norms + first, squares);
  }
}

// out (in.count, panel.count), leading dimension ld; open (in.count): a bit for each point whose distance is not
// certain.
void panel_distances(const PanelQueries& in, const Panel& panel, float* out, int64_t ld, uint64_t* open) {
  for (int64_t r = 0; r < in.count; ++r) open[r] = 0;
  for (int64_t begin = 0; begin < panel.count; begin += kColumn) {
    const int64_t left = panel.count - begin;
    int64_t r = 0;
    for (; r + kRows <= in.count; r += kRows) measure_column<kRows>(in, r, panel, begin, left, out, ld, open);
    switch (in.count - r) {
      case 3: measure_column<3>(in, r, panel, begin, left, out, ld, open); break;
      case 2: measure_column<2>(in, r, panel, begin, left, out, ld, open); break;
      case 1: measure_column<1>(in, r, panel, begin, left, out, ld, open); break;
    }
  }
}

}  // namespace ROBUSTFT_ISA
}  // namespace robustft
