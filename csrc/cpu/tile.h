// The streamed similarity tile: how every reduction of this library gets its numbers.
//
//   S[i.., j..] = x[i..] t[j..]^T        multiply: a tile of similarities, to be reduced while it is in cache
//   dx[i..] += G t[j..]                  add_product: what a tile of gradients gives back to the rows
//   dt[j..] += G^T x[i..]                add_transposed_product: and to the columns
//
// A reduction is a loop over tiles: it asks for S, calls its kernels on it (one file *_kernels.cpp, compiled for every
// instruction set) and forgets it. Each call here runs on the calling thread alone; reductions share out whole tiles,
// so threads meet only where a step ends. Two bodies: aten's matrix product (any dtype, IEEE), and that of processors
// with instructions for it (bf16.h: bfloat16 factors, float32 sums), which reads factors packed once.
#pragma once
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "bf16.h"
#include "torch_api.h"

namespace robustft {

// How products of a dtype are computed. bf16x3 splits x = high + low and leaves out low * low: about 2^-17 relative.
enum class Arithmetic { ieee, bf16, bf16x3 };

// The arithmetic for features of this dtype under torch's float32 matmul precision ("highest", "high", "medium").
Arithmetic arithmetic_of(ScalarType dtype, const std::string& precision);

inline int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// Memory that is not set to zero first, aligned to a cache line.
template <class T>
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(int64_t size) : data_(static_cast<T*>(::operator new(size * sizeof(T), std::align_val_t(64)))) {}
  // Someone else's memory, which must outlive this.
  static Buffer borrow(T* data) {
    Buffer buffer;
    buffer.data_ = {data, Free{false}};
    return buffer;
  }
  T* get() const { return data_.get(); }

 private:
  struct Free {
    bool owned = true;
    void operator()(T* p) const {
      if (owned) ::operator delete(p, std::align_val_t(64));
    }
  };
  std::unique_ptr<T, Free> data_;
};

// A factor in the form of bf16.h: blocks of 16, `stride` tiles apart.
struct Packed {
  Buffer<uint16_t> high, low;  // low is null for bf16, both for ieee
  int64_t stride = 0;

  Packed() = default;
  Packed(int64_t count, int64_t depth, Arithmetic arithmetic);

  // From block 16-`first` and depth tile `depth_tile` on.
  bf16::Operand from(int64_t first, int64_t depth_tile) const {
    const int64_t offset = (first / 16 * stride + depth_tile) * bf16::kTile;
    return {high.get() + offset, low.get() ? low.get() + offset : nullptr, stride};
  }
};

// Rows of a matrix in the form in which they stand on the left of a product: `count` rows from `begin` of a (n, d)
// matrix in T, contiguous, which must outlive this. Packs on the calling thread.
template <class T>
class LeftRows {
 public:
  LeftRows(const Tensor& matrix, int64_t begin, int64_t count, Arithmetic arithmetic)
      : LeftRows(matrix.const_data_ptr<T>() + begin * matrix.size(1), count, matrix.size(1), arithmetic) {}
  LeftRows(const T* rows, int64_t count, int64_t depth, Arithmetic arithmetic);

  const T* rows;  // the first of them
  int64_t count, depth;
  Packed packed;
};

// A whole matrix (m, d) on the right: as columns of t^T in `multiply`, as rows of t in `add_product`. Packs in
// parallel (on one thread where it is made by one of many); 2 bytes an element and use for bf16, 4 for bf16x3.
template <class T>
class RightMatrix {
 public:
  enum Use { kColumns, kRows };
  RightMatrix(const Tensor& matrix, Use use, Arithmetic arithmetic)
      : RightMatrix(matrix, 0, matrix.size(0), use, arithmetic) {}
  // Rows [begin, begin + count) only.
  RightMatrix(const Tensor& matrix, int64_t begin, int64_t count, Use use, Arithmetic arithmetic);
  // A kColumns of `count` rows, packed for bf16 earlier (bf16::pack_rows_as_columns) or, where null, not at all. Both
  // must outlive this.
  RightMatrix(const T* rows, int64_t count, int64_t depth, const uint16_t* packed_columns);

  const T* rows;
  int64_t count, depth;
  Packed packed;
};

// out (rows, cols), leading dimension ld: left[i, i + rows) right[j, j + cols)^T, right a kColumns. For packed
// factors i must be a multiple of 16 and j of 16.
template <class T>
void multiply(const LeftRows<T>& left, int64_t i, int64_t rows, const RightMatrix<T>& right, int64_t j, int64_t cols,
              T* out, int64_t ld);

// Room for a packed tile of gradients.
struct Scratch {
  Packed tile;
  int64_t size = 0;
};

// out (rows, depth), contiguous: += g (rows, cols; leading dimension ld) right[j, j + cols), right a kRows. The `first`
// of a sum writes out without reading it. For packed factors j must be a multiple of 32.
template <class T>
void add_product(const T* g, int64_t ld, int64_t rows, int64_t cols, const RightMatrix<T>& right, int64_t j, T* out,
                 bool first, Scratch& scratch);

// out (cols, depth), contiguous: += g^T right[i, i + rows), right a kRows.
template <class T>
void add_transposed_product(const T* g, int64_t ld, int64_t rows, int64_t cols, const RightMatrix<T>& right, int64_t i,
                            T* out, bool first, Scratch& scratch);

// Workspaces of one operator call, handed to whichever thread asks; as many exist as threads ever asked at once.
template <class W>
class Pool {
 public:
  class Lease {
   public:
    Lease(Pool& pool, std::unique_ptr<W> workspace) : pool_(pool), workspace_(std::move(workspace)) {}
    ~Lease() { pool_.give_back(std::move(workspace_)); }
    Lease(const Lease&) = delete;
    Lease& operator=(const Lease&) = delete;
    W* operator->() { return workspace_.get(); }
    W& operator*() { return *workspace_; }

   private:
    Pool& pool_;
    std::unique_ptr<W> workspace_;
  };

  template <class Make>
  Lease take(const Make& make) {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      if (!free_.empty()) {
        std::unique_ptr<W> workspace = std::move(free_.back());
        free_.pop_back();
        return Lease(*this, std::move(workspace));
      }
    }
    return Lease(*this, std::make_unique<W>(make()));
  }

 private:
  void give_back(std::unique_ptr<W> workspace) {
    std::lock_guard<std::mutex> lock(mutex_);
    free_.push_back(std::move(workspace));
  }

  std::mutex mutex_;
  std::vector<std::unique_ptr<W>> free_;
};

}  // namespace robustft
