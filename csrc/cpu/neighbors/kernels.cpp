// Nearest neighbours' loops over rows: norms, thresholds, scores above them, distances. Compiled once per instruction
// set.
#include "../lanes.h"
#include "neighbors.h"
#include "widen.h"

namespace robustft {
namespace ROBUSTFT_ISA {
namespace {

// v less v rounded to bfloat16, rounded as bf16_kernels.cpp does.
inline NarrowVec<float> bf16_residual(NarrowVec<float> v) {
  typedef uint32_t Words __attribute__((vector_size(sizeof(v))));
  const Words bits = (Words)v;
  return v - (NarrowVec<float>)((bits + 0x7fff + ((bits >> 16) & 1)) & 0xffff0000u);
}
inline Vec<double> bf16_residual(Vec<double>) { return Vec<double>{}; }  // double is never rounded

constexpr int64_t kWide = kLanes<double>;
constexpr int64_t kSums = 8;  // vectors of sums of a distance: an addition need not wait for the one before

static_assert(kBlockDepth % (kSums * kWide) == 0, "blocks leave nothing over");

// The sum of a distance's sums, in the order in which every kernel here adds them.
inline double total(const Vec<double>* sums) {
  return reduce_sum<double>(((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((sums[4] + sums[5]) + (sums[6] + sums[7])));
}

}  // namespace

// out = x - c, where c is given; the norms are of x - c and exact but for rounding to double.
template <class T>
void centre_row(const T* x, const T* c, int64_t d, bool bf16, T* out, RowNorms* norms) {
  using N = NarrowVec<T>;
  Vec<double> squared{}, residual{};
  N finite{};  // stays 0 unless the row holds NaN or infinity
  for (int64_t j = 0; j < d; j += kWide) {
    const int64_t lanes = d - j < kWide ? d - j : kWide;
    N v = lanes == kWide ? load<N>(x + j) : load_partial<N>(x + j, lanes, T(0));
    finite += v * T(0);
    if (c) {
      v -= lanes == kWide ? load<N>(c + j) : load_partial<N>(c + j, lanes, T(0));
      lanes == kWide ? store(out + j, v) : store_partial(out + j, v, lanes);
    }
    squared += widen(v) * widen(v);
    if (bf16) {
      const Vec<double> e = widen(bf16_residual(v));
      residual += e * e;
    }
  }
  const double nothing = reduce_sum<double>(widen(finite));
  *norms = {reduce_sum<double>(squared) + nothing, reduce_sum<double>(residual) + nothing};
}

// A value that at least `rank` of the scores reach, and not many more: bisection between the least and the greatest.
template <class T>
void score_reached(const T* products, const T* bias, int64_t count, int64_t rank, T* score) {
  const T infinity = __builtin_inf();
  Vec<T> least = Vec<T>{} + infinity, greatest = -least;
  auto scores = [&](int64_t j, int64_t lanes, T fill) {
    return load_lanes<Vec<T>>(products + j, lanes, fill) - load_lanes<Vec<T>>(bias + j, lanes, T(0));
  };
  for_each_vector<T>(count, [&](int64_t j, int64_t lanes) {
    const Vec<T> v = scores(j, lanes, infinity);
    least = v < least ? v : least;
    greatest = (v > greatest) & (v != infinity) ? v : greatest;
  });
  T low = -reduce_max<T>(-least), high = reduce_max<T>(greatest);
  constexpr int kSteps = 14;
  for (int step = 0; step < kSteps; ++step) {
    const T middle = low + (high - low) / 2;
    Mask<T> above{};
    for_each_vector<T>(count, [&](int64_t j, int64_t lanes) {
      above -= scores(j, lanes, -infinity) >= middle;  // true is -1
    });
    int64_t reached = 0;
    for (int64_t l = 0; l < kLanes<T>; ++l) reached += above[l];
    (reached >= rank ? low : high) = middle;
    if (reached >= rank && reached <= rank + rank / 4 + 2) break;
  }
  *score = low;
}

// Appends each row's scores of at least its threshold; there must be room for `cols` more.
template <class T>
void collect(const Scores<T>& scores, const T* thresholds, Hit<T>* const* hits, int64_t* counts) {
  constexpr int64_t kStep = kLanes<T>, kGroup = 4 * kStep;
  for (int64_t r = 0; r < scores.rows; ++r) {
    const T* s = scores.products + r * scores.ld;
    const T* b = scores.bias;
    const T least = thresholds[r];
    Hit<T>* out = hits[r] + counts[r];
    auto append = [&](int64_t j, uint64_t bits) {
      for (; bits; bits &= bits - 1) {
        const int64_t i = j + __builtin_ctzll(bits);
        *out++ = {s[i] - b[i], int32_t(scores.first + i)};
      }
    };
    int64_t j = 0;
    for (; j + kGroup <= scores.cols; j += kGroup) {
      Mask<T> m[4];
      for (int64_t u = 0; u < 4; ++u) m[u] = load<Vec<T>>(s + j + u * kStep) - load<Vec<T>>(b + j + u * kStep) >= least;
      if (!lane_bits(m[0] | m[1] | m[2] | m[3])) continue;
      uint64_t bits = 0;
      for (int64_t u = 0; u < 4; ++u) bits |= lane_bits(m[u]) << (u * kStep);
      append(j, bits);
    }
    for (; j < scores.cols; ++j) append(j, s[j] - b[j] >= least);
    counts[r] = out - hits[r];
  }
}

// out[i] = |query - points[rows[i]]|^2, or of row i without `rows`: differences and sums in double, so that nothing
// cancels and the result is that of float64 but for the last bits.
template <class T>
void squared_distances(const double* query, const T* points, int64_t d, const int32_t* rows, int64_t count,
                       double* out) {
  constexpr int64_t kAhead = 2, kLine = 64 / sizeof(T);
  for (int64_t i = 0; i < count; ++i) {
    const T* x = points + (rows ? rows[i] : i) * d;
    if (rows && i + kAhead < count) {
      const T* later = points + rows[i + kAhead] * d;
      for (int64_t j = 0; j < d; j += kLine) __builtin_prefetch(later + j);
    }
    Vec<double> sums[kSums] = {};
    int64_t j = 0;
    for (; j + kSums * kWide <= d; j += kSums * kWide)
      for (int64_t u = 0; u < kSums; ++u) {
        const int64_t o = j + u * kWide;
        const Vec<double> e = load<Vec<double>>(query + o) - widen(load<NarrowVec<T>>(x + o));
        sums[u] += e * e;
      }
    double sum = total(sums);
    for (; j < d; ++j) sum += (query[j] - x[j]) * (query[j] - x[j]);
    out[i] = sum;
  }
}

// Up to `side` rows (rows, d), d a multiple of kBlockDepth, side by side: out [8][d / (8 lanes)][side][lanes]. Rows
// that are not there are zeros.
void pack_block(const double* x, int64_t rows, int64_t d, int64_t side, double* out) {
  const int64_t steps = d / (kSums * kWide);
  for (int64_t r = 0; r < side; ++r)
    for (int64_t i = 0; i < steps; ++i)
      for (int64_t u = 0; u < kSums; ++u) {
        const int64_t from = r * d + (i * kSums + u) * kWide;
        store(out + ((u * steps + i) * side + r) * kWide, r < rows ? load<Vec<double>>(x + from) : Vec<double>{});
      }
}

// out (kBlockQueries, kBlockPoints), leading dimension ld: the distances of squared_distances, with the same bits, from
// packed blocks. A number that is read serves several distances, at half the instructions each.
void block_distances(const double* queries, const double* points, int64_t d, double* out, int64_t ld) {
  constexpr int64_t kPairs = kBlockQueries * kBlockPoints;
  const int64_t steps = d / (kSums * kWide);
  Vec<double> sums[kPairs][kSums];
  for (int64_t u = 0; u < kSums; ++u) {
    Vec<double> of_pairs[kBlockQueries][kBlockPoints] = {};
    for (int64_t i = 0; i < steps; ++i) {
      Vec<double> x[kBlockPoints];
      for (int64_t c = 0; c < kBlockPoints; ++c) x[c] = load<Vec<double>>(points + c * kWide);
      for (int64_t r = 0; r < kBlockQueries; ++r) {
        const Vec<double> q = load<Vec<double>>(queries + r * kWide);
        for (int64_t c = 0; c < kBlockPoints; ++c) {
          const Vec<double> e = q - x[c];
          of_pairs[r][c] += e * e;
        }
      }
      queries += kBlockQueries * kWide, points += kBlockPoints * kWide;
    }
    for (int64_t p = 0; p < kPairs; ++p) sums[p][u] = of_pairs[p / kBlockPoints][p % kBlockPoints];
  }
  for (int64_t p = 0; p < kPairs; ++p) out[p / kBlockPoints * ld + p % kBlockPoints] = total(sums[p]);
}

#define ROBUSTFT_INSTANTIATE(T)                                                   \
  template void centre_row<T>(const T*, const T*, int64_t, bool, T*, RowNorms*);  \
  template void score_reached<T>(const T*, const T*, int64_t, int64_t, T*);       \
  template void collect<T>(const Scores<T>&, const T*, Hit<T>* const*, int64_t*); \
  template void squared_distances<T>(const double*, const T*, int64_t, const int32_t*, int64_t, double*);
ROBUSTFT_INSTANTIATE(float)
ROBUSTFT_INSTANTIATE(double)

}  // namespace ROBUSTFT_ISA
}  // namespace robustft
