// What tests of kernels over rows share.
#pragma once
#include "../test.h"

// Calls the variant of a kernel for T: `as<T>(bf16's, f32's)`.
template <class T, class A, class B> auto as(A a, B b) {
  if constexpr (sizeof(T) == 2) return a;
  else return b;
}
#define OF(T, kernel) as<T>(kernel##_bf16, kernel##_f32)
#define RUN(T, kernel, grid, block, ...)         \
  do {                                           \
    auto of_type = OF(T, kernel);                \
    LAUNCH(of_type, grid, block, 0, __VA_ARGS__); \
  } while (0)

static int threads_of(int dim) { return std::min(std::max((dim + 7) / 8 + 31, 32) / 32 * 32, 256); }
template <class T> std::string name(const char* of, int n, int dim, uint64_t seed) {
  return std::string(of) + (sizeof(T) == 2 ? " bf16 " : " f32 ") + std::to_string(n) + " x " + std::to_string(dim) + " seed " + std::to_string(seed);
}
using Numbers64 = std::vector<double>;
