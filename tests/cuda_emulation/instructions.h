// The four instructions of csrc/cuda/device.h, as the PTX manual describes them.
#pragma once
#include <cuda_runtime.h>

namespace robustft {

inline char* dynamic_shared() {
  char* start = emulation::block.shared.data();
  return start + (256 - uintptr_t(start) % 256) % 256;
}

inline void copy_async(void* shared, const void* global, bool valid) {
  if (uintptr_t(shared) % 16 || uintptr_t(global) % 16) emulation::fail("a copy of 16 bytes is not aligned");
  emulation::block.current->uncommitted.push_back({shared, valid ? global : nullptr});
}
inline void copies_commit() {
  auto& thread = *emulation::block.current;
  thread.groups.push_back(std::move(thread.uncommitted));
  thread.uncommitted.clear();
}
template <int Pending>
void copies_wait() {
  auto& groups = emulation::block.current->groups;
  for (; groups.size() > Pending; groups.pop_front())
    for (const emulation::Copy& copy : groups.front())
      copy.from ? std::memcpy(copy.to, copy.from, 16) : std::memset(copy.to, 0, 16);
}

inline void load_matrices(unsigned (&out)[4], const void* shared_row) {
  if (uintptr_t(shared_row) % 16) emulation::fail("a row of a matrix is not aligned");
  struct Words {
    unsigned word[4];
  };
  const Words words = emulation::exchange("ldmatrix", shared_row, [](const auto& at, int lane) {
    Words result;
    for (int m = 0; m < 4; ++m)
      std::memcpy(&result.word[m], static_cast<const char*>(at(8 * m + lane / 4)) + 4 * (lane % 4), 4);
    return result;
  });
  std::copy(words.word, words.word + 4, out);
}

inline void multiply_add(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  struct Operands {
    unsigned a[4], b[2];
  };
  struct Products {
    float c[4];
  };
  const Operands own{{a[0], a[1], a[2], a[3]}, {b0, b1}};
  const Products products = emulation::exchange("mma", own, [](const auto& at, int lane) {
    const auto half = [](unsigned word, int k) { return __uint_as_float(k % 2 ? word & 0xffff0000u : word << 16); };
    Products result{};
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + (i >= 2 ? 8 : 0), column = 2 * (lane % 4) + i % 2;
      for (int k = 0; k < 16; ++k) {
        const unsigned word_a = at(row % 8 * 4 + k % 8 / 2).a[(row >= 8) + 2 * (k >= 8)];
        const unsigned word_b = at(column * 4 + k % 8 / 2).b[k >= 8];
        result.c[i] += half(word_a, k) * half(word_b, k);
      }
    }
    return result;
  });
  for (int i = 0; i < 4; ++i) c[i] += products.c[i];
}

}  // namespace robustft
