// The filter's products: scores t = qh.xh - bias of bfloat16 rows, a tile of 128 queries by 256 points at a time.
//
//   queries (count, depth), points (n, depth): bfloat16, depth a multiple of 32, filled up with 0;  bias (n)
//   store:    scores (count, n) = t
//   collect:  the hits t >= threshold of each query, as integers (score, point) in the order of the scores, into its
//             `room` places, in no particular order; counts (count) says how many there were, if more than fit
//
// A block of eight warps takes a strip of point tiles for one tile of queries. Tiles and their depths form one
// sequence of steps of depth 32, which a pipeline of four buffers in shared memory copies ahead of the products, over
// the ends of tiles too: while a tile's scores are compared the next one's rows arrive. A warp holds 64 x 64 of the
// scores, 128 registers a thread, so that tensor cores and shared memory are equally busy.
//
// Rows of 64 bytes lie in shared memory with their 16-byte parts permuted, part p of row r at p ^ (r / 2 % 4): the
// eight rows that a matrix load reads at once then lie in all 32 banks.
#pragma once
#include "select.h"

namespace robustft {

constexpr int kTileQueries = 128, kTilePoints = 256, kTileDepth = 32, kTileThreads = 256, kTileStages = 4;
constexpr int kTileRowBytes = 2 * kTileDepth, kTileStageBytes = (kTileQueries + kTilePoints) * kTileRowBytes;
constexpr int kTileSharedBytes = kTileStages * kTileStageBytes;
static_assert(kTileSharedBytes == 96 << 10,
              "benchmarks/cuda_resources.py says this, and no device from sm_80 has less");

struct TileProducts {
  const uint16_t *queries, *points;
  const float* bias;
  int count, n, depth;
  int query_tiles, strip;   // a block's share: one tile of queries, this many of points
  float* scores;            // store
  const float* thresholds;  // collect
  uint64_t* hits;
  int* counts;
  int64_t room;
};

// Where the 16-byte part of a row lies in a stage.
__device__ inline int tile_offset(int row, int part) { return row * kTileRowBytes + ((part ^ (row / 2 % 4)) * 16); }

// This thread's share of the copies: one 16-byte part of two rows of queries and four of points, 64 rows apart.
class TileLoader {
 public:
  __device__ TileLoader(const TileProducts& p, int query, int point)
      : row_(int(threadIdx.x) / 4), part_(int(threadIdx.x) % 4), query_(query), point_(point) {
    start_tile(p);
  }

  __device__ void copy(const TileProducts& p, char* stage) {
#pragma unroll
    for (int i = 0; i < kTileQueries / 64; ++i)
      part_of(stage, i * 64, query_rows_ + int64_t(i * 64) * p.depth, query_ + row_ + i * 64 < p.count, p.queries);
#pragma unroll
    for (int i = 0; i < kTilePoints / 64; ++i)
      part_of(stage, kTileQueries + i * 64, point_rows_ + int64_t(i * 64) * p.depth, point_ + row_ + i * 64 < p.n,
              p.points);
    column_ += kTileDepth;
    if (column_ < p.depth) return;
    point_ += kTilePoints;
    start_tile(p);
  }

 private:
  __device__ void start_tile(const TileProducts& p) {
    column_ = 0;
    query_rows_ = p.queries + int64_t(query_ + row_) * p.depth + part_ * 8;
    point_rows_ = p.points + int64_t(point_ + row_) * p.depth + part_ * 8;
  }

  __device__ void part_of(char* stage, int first_row, const uint16_t* row, bool valid, const uint16_t* anywhere) const {
    copy_async(stage + tile_offset(first_row + row_, part_), valid ? row + column_ : anywhere, valid);
  }

  const int row_, part_, query_;
  int point_, column_;
  const uint16_t *query_rows_, *point_rows_;
};

// A warp's 64 x 64 scores: [16 rows][8 columns][registers of multiply_add].
struct TileAccumulator {
  float c[4][8][4];

  __device__ void clear() {
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
      for (int j = 0; j < 8; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) c[i][j][e] = 0;
  }

  // Adds the products of a stage, `rows` and `columns` being the warp's first of the queries and of the points.
  __device__ void add(const char* stage, int rows, int columns) {
    const int lane = int(threadIdx.x) % kWarp;
#pragma unroll
    for (int step = 0; step < kTileDepth / 16; ++step) {
      unsigned a[4][4];
#pragma unroll
      for (int i = 0; i < 4; ++i)  // lanes 8 to 15 and 24 to 31 name the lower rows, lanes from 16 the right columns
        load_matrices(a[i], stage + tile_offset(rows + 16 * i + lane % 16, 2 * step + lane / 16));
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        unsigned b[4];  // 16 points: lanes from 16 name the last eight, every other eight the right columns
        load_matrices(b, stage + tile_offset(kTileQueries + columns + 16 * j + lane / 16 * 8 + lane % 8,
                                             2 * step + lane / 8 % 2));
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          multiply_add(c[i][2 * j], a[i], b[0], b[1]);
          multiply_add(c[i][2 * j + 1], a[i], b[2], b[3]);
        }
      }
    }
  }

  // Makes scores of the products; beyond the last point they are -infinity.
  __device__ void subtract_bias(const TileProducts& p, int point) {
#pragma unroll
    for (int j = 0; j < 16; ++j) {
      const int column = column_of(point, j);
      const float bias = column < p.n ? p.bias[column] : __int_as_float(0x7f800000);
#pragma unroll
      for (int i = 0; i < 8; ++i) at(i, j) -= bias;
    }
  }

  // The i-th row of this thread's 8, and of that the j-th score of 16.
  __device__ float& at(int i, int j) { return c[i / 2][j / 2][i % 2 * 2 + j % 2]; }
  __device__ static int row_of(int query, int i) { return query + i * 8 + int(threadIdx.x) % kWarp / 4; }
  __device__ static int column_of(int point, int j) { return point + j / 2 * 8 + int(threadIdx.x) % 4 * 2 + j % 2; }
};

__device__ inline void store_scores(TileAccumulator& scores, const TileProducts& p, int query, int point) {
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const int row = TileAccumulator::row_of(query, i);
    if (row >= p.count) continue;
#pragma unroll
    for (int j = 0; j < 16; ++j) {
      const int column = TileAccumulator::column_of(point, j);
      if (column < p.n) p.scores[int64_t(row) * p.n + column] = scores.at(i, j);
    }
  }
}

__device__ inline void collect_hits(TileAccumulator& scores, const TileProducts& p, int query, int point) {
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const int row = TileAccumulator::row_of(query, i);
    if (row >= p.count) continue;
    const float threshold = p.thresholds[row];
    float highest = scores.at(i, 0);
#pragma unroll
    for (int j = 1; j < 16; ++j) highest = fmaxf(highest, scores.at(i, j));
    if (!(highest >= threshold)) continue;
#pragma unroll
    for (int j = 0; j < 16; ++j) {
      const int column = TileAccumulator::column_of(point, j);
      if (!(scores.at(i, j) >= threshold) || column >= p.n) continue;
      const int place = atomicAdd(&p.counts[row], 1);
      if (place < p.room) p.hits[row * p.room + place] = uint64_t(key_of(scores.at(i, j))) << 32 | uint64_t(column);
    }
  }
}

template <bool kCollect>
__global__ void __launch_bounds__(kTileThreads, 1) neighbor_scores_kernel(TileProducts p) {
  char* shared = dynamic_shared();
  const int warp = int(threadIdx.x) / kWarp, rows = warp % 2 * 64, columns = warp / 2 * 64;
  const int query = int(blockIdx.x % unsigned(p.query_tiles)) * kTileQueries;
  int point = int(blockIdx.x / unsigned(p.query_tiles)) * p.strip * kTilePoints;
  const int tiles = (p.n - point + kTilePoints - 1) / kTilePoints;
  const int depths = p.depth / kTileDepth, steps = (tiles < p.strip ? tiles : p.strip) * depths;

  TileLoader loader(p, query, point);
  for (int s = 0; s < kTileStages - 1; ++s) {
    if (s < steps) loader.copy(p, shared + s * kTileStageBytes);
    copies_commit();
  }
  TileAccumulator accumulator;
  accumulator.clear();
  int left = depths;
  for (int step = 0; step < steps; ++step) {
    copies_wait<kTileStages - 2>();
    __syncthreads();  // this step's rows are there, and all warps are done with the last step's
    const int ahead = step + kTileStages - 1;
    if (ahead < steps) loader.copy(p, shared + ahead % kTileStages * kTileStageBytes);
    copies_commit();
    accumulator.add(shared + step % kTileStages * kTileStageBytes, rows, columns);
    if (--left) continue;
    accumulator.subtract_bias(p, point + columns);
    if (kCollect)
      collect_hits(accumulator, p, query + rows, point + columns);
    else
      store_scores(accumulator, p, query + rows, point + columns);
    __syncwarp();  // products need the lanes together again
    accumulator.clear();
    left = depths;
    point += kTilePoints;
  }
}

}  // namespace robustft
