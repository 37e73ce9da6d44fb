// Types of numbers in memory, and the type that each is computed in.
#pragma once
#include <cstdint>

namespace robustft {

enum class Bf16 : uint16_t {};
enum class Fp16 : uint16_t {};

template <class P>
struct WideOf {
  using type = float;
};
template <>
struct WideOf<double> {
  using type = double;
};
template <class P>
using Wide = typename WideOf<P>::type;

}  // namespace robustft
