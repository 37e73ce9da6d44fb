// The two bodies of a tile's products: aten's matrix product and bf16.h's. See tile.h.
#include "tile.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <tuple>
#include <type_traits>

namespace robustft {
namespace {

// A (rows, cols) view of memory that someone else owns. Cheaper than narrowing a tensor: no dispatcher, any thread.
template <class T>
Tensor matrix_view(const T* data, int64_t rows, int64_t cols, int64_t row_stride, int64_t col_stride) {
  const int64_t sizes[] = {rows, cols}, strides[] = {row_stride, col_stride};
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_create_tensor_from_blob(
      const_cast<T*>(data), 2, sizes, strides, 0,
      std::is_same_v<T, double> ? aoti_torch_dtype_float64() : aoti_torch_dtype_float32(), aoti_torch_device_type_cpu(),
      0, &handle));
  return Tensor(handle);
}

// Only float tiles are ever packed: the arithmetic of double is ieee.
const float* as_float(const float* p) { return p; }
const float* as_float(const double*) { return nullptr; }
float* as_float(float* p) { return p; }
float* as_float(double*) { return nullptr; }

// Room for `count` rows of `depth` packed, kept for the next tile.
Packed& room(Scratch& scratch, int64_t count, int64_t depth, bool low) {
  const int64_t stride = bf16::depth_tiles(depth), size = (count + 15) / 16 * stride;
  if (scratch.size < size) {
    scratch.tile = Packed(count, depth, low ? Arithmetic::bf16x3 : Arithmetic::bf16);
    scratch.size = size;
  }
  scratch.tile.stride = stride;
  return scratch.tile;
}

}  // namespace

Arithmetic arithmetic_of(ScalarType dtype, const std::string& precision) {
  // float16 has 11 bits: high * low products would be exact, but what bf16x3 leaves out is not within its accuracy.
  if (dtype == ScalarType::Double || dtype == ScalarType::Half || !bf16::available()) return Arithmetic::ieee;
  if (dtype == ScalarType::BFloat16) return Arithmetic::bf16;
  if (precision == "medium") return Arithmetic::bf16;
  return precision == "high" && bf16::unit() == bf16::Unit::tiles ? Arithmetic::bf16x3 : Arithmetic::ieee;
}

Packed::Packed(int64_t count, int64_t depth, Arithmetic arithmetic) : stride(bf16::depth_tiles(depth)) {
  const int64_t size = (count + 15) / 16 * stride * bf16::kTile;
  if (arithmetic != Arithmetic::ieee) high = Buffer<uint16_t>(size);
  if (arithmetic == Arithmetic::bf16x3) low = Buffer<uint16_t>(size);
}

template <class T>
LeftRows<T>::LeftRows(const T* rows, int64_t count, int64_t depth, Arithmetic arithmetic)
    : rows(rows), count(count), depth(depth), packed(count, depth, arithmetic) {
  if (arithmetic != Arithmetic::ieee)
    bf16::pack_rows(as_float(rows), depth, count, depth, 0, (count + 15) / 16, packed.high.get(), packed.low.get());
}

template <class T>
RightMatrix<T>::RightMatrix(const Tensor& matrix, int64_t begin, int64_t count, Use use, Arithmetic arithmetic)
    : rows(matrix.const_data_ptr<T>() + begin * matrix.size(1)), count(count), depth(matrix.size(1)) {
  if (arithmetic == Arithmetic::ieee) return;
  const int64_t blocks = ((use == kColumns ? count : depth) + 15) / 16;
  packed = use == kColumns ? Packed(count, depth, arithmetic) : Packed(depth, count, arithmetic);
  const auto pack = use == kColumns ? bf16::pack_rows_as_columns : bf16::pack_columns;
  torch::stable::parallel_for(0, blocks, 8, [&](int64_t first, int64_t last) {
    pack(as_float(rows), depth, count, depth, first, last, packed.high.get(), packed.low.get());
  });
}

template <class T>
RightMatrix<T>::RightMatrix(const T* rows, int64_t count, int64_t depth, const uint16_t* packed_columns)
    : rows(rows), count(count), depth(depth) {
  if (!packed_columns) return;
  packed.high = Buffer<uint16_t>::borrow(const_cast<uint16_t*>(packed_columns));
  packed.stride = bf16::depth_tiles(depth);
}

template <class T>
void multiply(const LeftRows<T>& left, int64_t i, int64_t rows, const RightMatrix<T>& right, int64_t j, int64_t cols,
              T* out, int64_t ld) {
  if (left.packed.high.get()) {
    bf16::multiply(left.packed.from(i, 0), rows, right.packed.from(j, 0), cols, left.packed.stride, as_float(out), ld,
                   false);
    return;
  }
  const int64_t d = left.depth;
  Tensor product = matrix_view(out, rows, cols, ld, 1);
  mm_out(product, matrix_view(left.rows + i * d, rows, d, d, 1), matrix_view(right.rows + j * d, d, cols, 1, d));
}

template <class T>
void add_product(const T* g, int64_t ld, int64_t rows, int64_t cols, const RightMatrix<T>& right, int64_t j, T* out,
                 bool first, Scratch& scratch) {
  const int64_t d = right.depth;
  if (right.packed.high.get()) {
    Packed& left = room(scratch, rows, cols, right.packed.low.get());
    bf16::pack_rows(as_float(g), ld, rows, cols, 0, (rows + 15) / 16, left.high.get(), left.low.get());
    bf16::multiply(left.from(0, 0), rows, right.packed.from(0, j / 32), d, left.stride, as_float(out), d, !first);
    return;
  }
  Tensor sum = matrix_view(out, rows, d, d, 1);
  sum_mm(sum, matrix_view(g, rows, cols, ld, 1), matrix_view(right.rows + j * d, cols, d, d, 1), first);
}

template <class T>
void add_transposed_product(const T* g, int64_t ld, int64_t rows, int64_t cols, const RightMatrix<T>& right, int64_t i,
                            T* out, bool first, Scratch& scratch) {
  const int64_t d = right.depth;
  if (right.packed.high.get()) {
    Packed& left = room(scratch, cols, rows, right.packed.low.get());
    bf16::pack_columns_as_rows(as_float(g), ld, rows, cols, 0, (cols + 15) / 16, left.high.get(), left.low.get());
    bf16::multiply(left.from(0, 0), cols, right.packed.from(0, i / 32), d, left.stride, as_float(out), d, !first);
    return;
  }
  Tensor sum = matrix_view(out, cols, d, d, 1);
  sum_mm(sum, matrix_view(g, cols, rows, 1, ld), matrix_view(right.rows + i * d, rows, d, d, 1), first);
}

#define ROBUSTFT_INSTANTIATE(T)                                                                                    \
  template class LeftRows<T>;                                                                                      \
  template class RightMatrix<T>;                                                                                   \
  template void multiply<T>(const LeftRows<T>&, int64_t, int64_t, const RightMatrix<T>&, int64_t, int64_t, T*,     \
                            int64_t);                                                                              \
  template void add_product<T>(const T*, int64_t, int64_t, int64_t, const RightMatrix<T>&, int64_t, T*, bool,      \
                               Scratch&);                                                                          \
  template void add_transposed_product<T>(const T*, int64_t, int64_t, int64_t, const RightMatrix<T>&, int64_t, T*, \
                                          bool, Scratch&);
ROBUSTFT_INSTANTIATE(float)
ROBUSTFT_INSTANTIATE(double)

namespace {

// All three products of one tile, from an odd place within the factors on: for the tests.
template <class T>
std::tuple<Tensor, Tensor, Tensor> products(const Tensor& x, const Tensor& t, const Tensor& g, Arithmetic arithmetic) {
  const ScalarType dtype = scalar_type<T>();
  const Tensor xs = contiguous_as(x, dtype), ts = contiguous_as(t, dtype), gs = contiguous_as(g, dtype);
  const int64_t n = xs.size(0), m = ts.size(0), d = xs.size(1);
  Tensor s = uninitialized({n, m}, xs.scalar_type()), dx = uninitialized({n, d}, xs.scalar_type());
  Tensor dt = uninitialized({m, d}, xs.scalar_type());
  const LeftRows<T> left(xs, 0, n, arithmetic);
  const RightMatrix<T> columns(ts, RightMatrix<T>::kColumns, arithmetic), rows(ts, RightMatrix<T>::kRows, arithmetic);
  const RightMatrix<T> x_rows(xs, RightMatrix<T>::kRows, arithmetic);
  Scratch scratch;
  constexpr int64_t kStep = 64;
  for (int64_t i = 0; i < n; i += kStep)
    for (int64_t j = 0; j < m; j += kStep) {
      const int64_t height = std::min(kStep, n - i), width = std::min(kStep, m - j);
      multiply(left, i, height, columns, j, width, s.mutable_data_ptr<T>() + i * m + j, m);
      const T* tile = gs.const_data_ptr<T>() + i * m + j;
      add_product(tile, m, height, width, rows, j, dx.mutable_data_ptr<T>() + i * d, j == 0, scratch);
      add_transposed_product(tile, m, height, width, x_rows, i, dt.mutable_data_ptr<T>() + j * d, i == 0, scratch);
    }
  return {s, dx, dt};
}

std::tuple<Tensor, Tensor, Tensor> tile_products(const Tensor& x, const Tensor& t, const Tensor& g,
                                                 std::string precision) {
  STD_TORCH_CHECK(x.dim() == 2 && t.dim() == 2 && g.dim() == 2 && x.size(1) == t.size(1) && g.size(0) == x.size(0) &&
                      g.size(1) == t.size(0),
                  "tile_products: expected x (n, d), t (m, d), g (n, m)");
  const Arithmetic arithmetic = arithmetic_of(x.scalar_type(), precision);
  return x.scalar_type() == ScalarType::Double ? products<double>(x, t, g, arithmetic)
                                               : products<float>(x, t, g, arithmetic);
}

// (1,) int64: the Arithmetic of products of tensors like x.
Tensor product_arithmetic(const Tensor& x, std::string precision) {
  Tensor out = uninitialized({1}, ScalarType::Long);
  *out.mutable_data_ptr<int64_t>() = int64_t(arithmetic_of(x.scalar_type(), precision));
  return out;
}

}  // namespace
}  // namespace robustft

STABLE_TORCH_LIBRARY_IMPL(robustft, CPU, m) {
  m.impl("tile_products", TORCH_BOX(&robustft::tile_products));
  m.impl("product_arithmetic", TORCH_BOX(&robustft::product_arithmetic));
}
