// What ../kernels/hopper.h has as PTX, by the documented layouts of descriptors: a wrong one reads wrong elements here,
// too.
#pragma once
#include "warpgroup.h"

// Shared memory has addresses of its own, from 0.
inline uint32_t shared_address(const void* p) {
  return uint32_t(static_cast<const unsigned char*>(p) - static_cast<const unsigned char*>(cpu::dynamic_shared()));
}

namespace cpu {
// A factor of a product as a descriptor has it.
struct Factor {
  uint32_t start, leading, stride;
  bool columns;

  Factor(uint64_t descriptor, bool columns) : columns(columns) {
    auto field = [=](int from) { return uint32_t(descriptor >> from & 0x3fff) << 4; };
    start = field(0), leading = field(16), stride = field(32);
    if (descriptor >> 62 != 1) die("a descriptor without the 128-byte swizzle");
    if ((descriptor >> 49 & 7) != 0 || (start >> 7 & 7) != 0) die("an operand that starts inside of a pattern");
  }
  // Element k of the inner dimension, i of the other.
  float at(int i, int k) const {
    uint32_t address = start;
    if (columns) {
      address += uint32_t(i / 64) * leading + uint32_t(k / 8) * stride + uint32_t(k % 8 * 128 + i % 64 * 2);
    } else {
      address += uint32_t(i / 8) * stride + uint32_t(i % 8 * 128 + k * 2);
    }
    address ^= (address >> 7 & 7) << 4;
    if (address + 2 > machine.shared.size()) die("an operand outside of shared memory");
    return bf2f(*reinterpret_cast<const bf16*>(static_cast<const unsigned char*>(dynamic_shared()) + address));
  }
};

// Accumulators that products under way will change: not a number to who looks before they are waited for.
struct Accumulators {
  std::vector<float> values;
  int products = 0;
};
inline std::map<std::pair<unsigned, float*>, Accumulators> accumulators;

inline void begin_product(float* c, int count) {
  Accumulators& under_way = accumulators[{machine.current, c}];
  if (under_way.products++ > 0) return;
  under_way.values.assign(c, c + count);
  std::fill(c, c + count, std::nanf(""));
}
template <int N> void finish_product(float* c, const Factor& a, const Factor& b, int row, bool add) {
  auto found = accumulators.find({machine.current, c});
  auto& values = found->second.values;
  float left[2][16], right[16];
  for (int i = 0; i < 32; ++i) left[i / 16][i % 16] = a.at(row + i / 16 * 8, i % 16);
  for (int col = 0; col < N / 4; ++col) {
    for (int k = 0; k < 16; ++k) right[k] = b.at(col / 2 * 8 + int(lane() % 4) * 2 + col % 2, k);
    for (int half = 0; half < 2; ++half) {
      float& value = values[size_t(col / 2 * 4 + half * 2 + col % 2)];
      float sum = add ? value : 0.0f;
      for (int k = 0; k < 16; ++k) sum += left[half][k] * right[k];
      value = sum;
    }
  }
  if (--found->second.products > 0) return;
  std::copy(values.begin(), values.end(), c);
  accumulators.erase(found);
}
}  // namespace cpu

inline void tensor_map_prefetch(const TensorMap*) {}
inline void recompute(int&) {}

template <int N, bool A_COLUMNS, bool B_COLUMNS>
inline void wgmma(float (&c)[N / 8][4], uint64_t a, uint64_t b, bool add) {
  static_assert(N % 8 == 0 && N <= 256);
  float* to = c[0];
  int row = int(cpu::machine.current / 32 % 4 * 16 + cpu::lane() / 4);
  cpu::Factor left(a, A_COLUMNS), right(b, B_COLUMNS);
  cpu::begin_product(to, N / 2);
  cpu::warpgroups.products[cpu::machine.current].open.push_back(
      [=] { cpu::finish_product<N>(to, left, right, row, add); });
}
