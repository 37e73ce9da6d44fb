// Exact nearest neighbours on the GPU: a filter of bfloat16 products with a rigorous error bound, and direct distances
// of what it leaves. The mathematics is that of cpu/neighbors.cpp:
//
//   t = qh.xh - |x|^2 / 2,   |t - s| <= eps for every point,   s = q.x - |x|^2 / 2 = (|q|^2 - |q - x|^2) / 2
//   t_k the k-th largest t:  t > t_k + 2 eps is certainly among the k - 1 best, t < t_k - 2 eps certainly not among the
//   k best, and only the band between is measured, by differences in double
//
// eps = |q - qh| max|x| + |qh| max|x - xh| + gamma |qh| max|xh| + 4 u (|q| + max|x|)^2 with the norms measured when
// packing. gamma = (2 d + 32) 2^-23: tensor cores align a step's products and the sum so far to the largest of them and
// cut the rest off, an error of at most 2^-23 of the sum of absolute values a term, twice that with normalisation.
//
// Launches, for up to 4096 queries (fewer where hits need more than 256 MB):
//
//   begin    queries to bfloat16, their eps                                               a warp a query
//   scores   of the sampled points (m of them)                                            neighbor_filter.h
//   guess    threshold = the r-th largest of those, less 2 eps; r so that k points reach it but for one query in 10^5
//   scores   of all points: hits are t >= threshold                                       neighbor_filter.h
//   finish   t_k, checked: k hits at least, no more than fit, t_k - 2 eps >= threshold; then the band's distances
//   direct   of the queries that failed the check: distances to all points. Idle if there are none
//
// So a bad guess, or more hits than there is room for, costs time and never changes a result. The counts of hits are
// atomic, but every result is selected from a set, by keys that are all different: it repeats to the bit, and does not
// depend on how many queries come together. Nothing waits for the host. nearest_neighbors sorts its keys (distance,
// index) by aten::sort at the end. Memory: 256 MB, or 4 bytes a point if that is more; 16 k bytes a query for nearest.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/stableivalue_conversions.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <tuple>

#include "neighbor_filter.h"
#include "neighbor_search.h"

namespace robustft {
namespace {

constexpr int64_t kMostQueries = 4096, kWorkspace = int64_t(256) << 20;
constexpr int64_t kLeastRoom = 8192;  // hits of a query
constexpr int64_t kStrip = 16;        // tiles of points a block takes one after the other, if there are enough

int64_t tiles_of(int64_t count, int64_t each) { return (count + each - 1) / each; }

// Pieces of one allocation.
class Workspace {
 public:
  template <class T>
  int64_t reserve(int64_t count) {
    const int64_t offset = bytes_;
    bytes_ += (count * int64_t(sizeof(T)) + 255) / 256 * 256;
    return offset;
  }
  void allocate(const Tensor& like) { memory_ = torch::stable::new_empty(like, {bytes_}, ScalarType::Byte); }
  template <class T>
  T* at(int64_t offset) {
    return reinterpret_cast<T*>(memory_.mutable_data_ptr<uint8_t>() + offset);
  }

 private:
  int64_t bytes_ = 0;
  Tensor memory_;
};

struct PreparedPoints {
  Tensor points, centre, bias, filter, sample, bounds;
  int64_t n, d;
};

// Sizes of a search, from what is known without waiting for the GPU.
struct SearchPlan {
  int64_t samples, rank, room, queries, direct_blocks;

  SearchPlan(const PreparedPoints& set, int64_t count, int64_t k, int64_t processors) : samples(set.sample.size(0)) {
    const double m = double(samples), n = double(set.n), expected = double(k) * m / n;
    // Four standard deviations and a little more than what is expected.
    rank = int64_t(std::ceil(expected + 4 * std::sqrt(expected) + 4));
    const bool guessed = rank < samples;
    room = guessed ? std::min(set.n, std::max(kLeastRoom, int64_t(4 * double(rank) * n / m) + 2 * k)) : set.n;
    const int64_t bytes = std::max<int64_t>(room * int64_t(sizeof(uint64_t)), samples * int64_t(sizeof(float)));
    queries = std::clamp<int64_t>(kWorkspace / bytes, 1, std::min(count, kMostQueries));
    const int64_t keys = std::max(queries * bytes / int64_t(sizeof(uint32_t)), set.n);
    direct_blocks = std::clamp<int64_t>(keys / set.n, 1, 2 * processors);
  }

  // Bytes that scores of the sample, hits and keys of direct distances take turns in.
  int64_t shared_bytes(int64_t n) const {
    return std::max({queries * room * int64_t(sizeof(uint64_t)), queries * samples * int64_t(sizeof(float)),
                     direct_blocks * n * int64_t(sizeof(uint32_t))});
  }
};

void scores(const OnDevice& device, TileProducts p, bool collect) {
  const int64_t tiles = tiles_of(p.n, kTilePoints);
  p.query_tiles = int(tiles_of(p.count, kTileQueries));
  // Strips so long that four blocks a processor are left: the last ones to finish then leave little idle.
  p.strip = int(std::clamp<int64_t>(tiles * p.query_tiles / (4 * device.processors()), 1, kStrip));
  device.launch(collect ? neighbor_scores_kernel<true> : neighbor_scores_kernel<false>,
                tiles_of(tiles, p.strip) * p.query_tiles, kTileThreads, kTileSharedBytes, p);
}

void search(const Tensor& queries, const PreparedPoints& set, int64_t k, bool squared, float* distances,
            uint64_t* nearest) {
  const int64_t total = queries.size(0), depth = filter_depth(set.d);
  if (total == 0) return;
  const OnDevice device(queries);
  const SearchPlan plan(set, total, k, device.processors());
  const int64_t m = plan.rank < plan.samples ? plan.samples : 0;

  Workspace workspace;
  const int64_t packed = workspace.reserve<uint16_t>(plan.queries * depth);
  const int64_t eps = workspace.reserve<double>(plan.queries), thresholds = workspace.reserve<float>(plan.queries);
  const int64_t counts = workspace.reserve<int>(plan.queries), direct = workspace.reserve<int>(plan.queries + 1);
  const int64_t sample = workspace.reserve<uint16_t>(m * depth), sample_bias = workspace.reserve<float>(m);
  const int64_t shared = workspace.reserve<char>(plan.shared_bytes(set.n));
  workspace.allocate(queries);

  NeighborSearch s = {};
  s.points = set.points.const_data_ptr<float>();
  s.centre = set.centre.const_data_ptr<float>();
  s.bounds = set.bounds.const_data_ptr<double>();
  s.n = set.n, s.d = set.d, s.depth = depth, s.k = k, s.squared = squared;
  s.gamma = (2 * double(depth) + 32) * 0x1p-23;
  s.rounding = 4 * 0x1p-24;
  s.packed = workspace.at<uint16_t>(packed);
  s.eps = workspace.at<double>(eps);
  s.thresholds = workspace.at<float>(thresholds);
  s.counts = workspace.at<int>(counts);
  s.hits = workspace.at<uint64_t>(shared);
  s.room = int(plan.room);
  s.direct_count = workspace.at<int>(direct);
  s.direct = s.direct_count + 1;

  TileProducts all = {};
  all.queries = s.packed;
  all.points = reinterpret_cast<const uint16_t*>(set.filter.const_data_ptr<int16_t>());
  all.bias = set.bias.const_data_ptr<float>();
  all.n = int(set.n), all.depth = int(depth);
  all.thresholds = s.thresholds, all.hits = s.hits, all.counts = s.counts, all.room = plan.room;
  TileProducts sampled = all;
  sampled.points = workspace.at<uint16_t>(sample);
  sampled.bias = workspace.at<float>(sample_bias);
  sampled.n = int(m);
  sampled.scores = workspace.at<float>(shared);
  device.launch(neighbor_pack_rows_kernel, tiles_of(m, kRowWarps), kRowThreads, 0, set.sample.const_data_ptr<float>(),
                nullptr, m, set.d, depth, workspace.at<uint16_t>(sample), workspace.at<float>(sample_bias), nullptr);

  for (int64_t first = 0; first < total; first += plan.queries) {
    s.count = all.count = sampled.count = int(std::min(plan.queries, total - first));
    s.queries = queries.const_data_ptr<float>() + first * set.d;
    s.distances = distances ? distances + first : nullptr;
    s.nearest = nearest ? nearest + first * k : nullptr;
    device.launch(neighbor_begin_kernel, tiles_of(s.count, kRowWarps), kRowThreads, 0, s);
    if (m) scores(device, sampled, false);
    device.launch(neighbor_guess_kernel, s.count, kFinishThreads, 0, s, sampled.scores, m, plan.rank - 1);
    scores(device, all, true);
    device.launch(neighbor_finish_kernel, s.count, kFinishThreads, 0, s);
    device.launch(neighbor_direct_kernel, plan.direct_blocks, kDirectThreads, 0, s, workspace.at<uint32_t>(shared));
  }
}

PreparedPoints prepared(const char* op, const Tensor& queries, const Tensor& points, const Tensor& centre,
                        const Tensor& bias, const Tensor& filter, const Tensor& sample, const Tensor& bounds,
                        int64_t k) {
  STD_TORCH_CHECK(queries.dim() == 2 && points.dim() == 2 && queries.size(1) == points.size(1), op,
                  ": queries and points must be (m, d) and (n, d)");
  STD_TORCH_CHECK(points.scalar_type() != ScalarType::Double, op, ": float64 points are searched without it");
  STD_TORCH_CHECK(k >= 1 && k <= points.size(0), op, ": k is ", k, "; expected 1 to the number of points");
  const int64_t n = points.size(0), d = points.size(1);
  STD_TORCH_CHECK(n <= kMaxNeighborPoints && centre.numel() == d && bias.numel() == n &&
                      filter.numel() == n * filter_depth(d) && filter.scalar_type() == ScalarType::Short &&
                      bounds.numel() == neighbor_bound::kCount && sample.dim() == 2 && sample.size(1) == d &&
                      sample.size(0) <= kMaxNeighborPoints,
                  op, ": not what neighbor_pack made of these points");
  const Tensor rows = torch::stable::contiguous(filter);
  STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(rows.const_data_ptr<int16_t>()) % 16 == 0, op,
                  ": the filter is not aligned to 16 bytes");
  return {contiguous_as(points, ScalarType::Float),
          contiguous_as(centre, ScalarType::Float),
          contiguous_as(bias, ScalarType::Float),
          rows,
          contiguous_as(sample, ScalarType::Float),
          contiguous_as(bounds, ScalarType::Double),
          n,
          d};
}

Tensor kth_neighbor_distance(const Tensor& queries, const Tensor& points, const Tensor& centre, const Tensor& bias,
                             const Tensor& filter, const Tensor& sample, const Tensor& bounds, int64_t k,
                             bool squared) {
  const PreparedPoints set =
      prepared("kth_neighbor_distance", queries, points, centre, bias, filter, sample, bounds, k);
  const Tensor q = contiguous_as(queries, ScalarType::Float);
  Tensor distances = torch::stable::new_empty(q, {q.size(0)});
  search(q, set, k, squared, distances.mutable_data_ptr<float>(), nullptr);
  return distances;
}

// keys (Q, k), each row ascending.
Tensor sorted(const Tensor& keys) {
  std::array<StableIValue, 3> stack{torch::stable::detail::from(keys), torch::stable::detail::from(int64_t(-1)),
                                    torch::stable::detail::from(false)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::sort", "", stack.data(), TORCH_ABI_VERSION));
  torch::stable::detail::to<Tensor>(stack[1]);  // the order, owned so that it is freed
  return torch::stable::detail::to<Tensor>(stack[0]);
}

std::tuple<Tensor, Tensor> nearest_neighbors(const Tensor& queries, const Tensor& points, const Tensor& centre,
                                             const Tensor& bias, const Tensor& filter, const Tensor& sample,
                                             const Tensor& bounds, int64_t k, bool squared) {
  const PreparedPoints set = prepared("nearest_neighbors", queries, points, centre, bias, filter, sample, bounds, k);
  const Tensor q = contiguous_as(queries, ScalarType::Float);
  Tensor distances = torch::stable::new_empty(q, {q.size(0), k});
  Tensor indices = torch::stable::new_empty(q, {q.size(0), k}, ScalarType::Long);
  if (q.size(0) == 0) return {distances, indices};
  // As signed integers all keys are negative, for distances are not, so that aten sorts them as they are meant.
  Tensor keys = torch::stable::new_empty(q, {q.size(0), k}, ScalarType::Long);
  search(q, set, k, squared, nullptr, reinterpret_cast<uint64_t*>(keys.mutable_data_ptr<int64_t>()));
  const OnDevice device(q);
  keys = torch::stable::contiguous(sorted(keys));
  device.launch(neighbor_decode_kernel, tiles_of(keys.numel(), kRowThreads), kRowThreads, 0,
                reinterpret_cast<const uint64_t*>(keys.const_data_ptr<int64_t>()), keys.numel(),
                distances.mutable_data_ptr<float>(), indices.mutable_data_ptr<int64_t>());
  return {distances, indices};
}

}  // namespace
}  // namespace robustft

STABLE_TORCH_LIBRARY_IMPL(robustft, CUDA, m) {
  m.impl("kth_neighbor_distance", TORCH_BOX(&robustft::kth_neighbor_distance));
  m.impl("nearest_neighbors", TORCH_BOX(&robustft::nearest_neighbors));
}
