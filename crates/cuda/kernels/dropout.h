// Elements that are left out at random, by a counter: what is drawn for one follows from a key, its row and its column
// alone. Draws have 16 bits; four columns have one number.
#pragma once

// Increment of SplitMix64's state, 2^64 over the golden ratio (Steele, Lea and Flood 2014, figure 17).
constexpr uint64_t GOLDEN = 0x9e3779b97f4a7c15ull;

// SplitMix64 at state `x`.
__device__ __forceinline__ uint64_t mix(uint64_t x) {
  x += GOLDEN;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
  return x ^ (x >> 31);
}

// The draws of columns 4 `four` to 4 `four` + 3, of a row that begins at `row`.
__device__ __forceinline__ uint64_t draw4(uint64_t row, int four) { return mix(row + (uint64_t)four * GOLDEN); }

__device__ __forceinline__ bool keeps(uint64_t drawn, int i, uint32_t cut) {
  return ((uint32_t)(drawn >> 16 * i) & 0xffff) >= cut;
}

// Which probabilities of attention are left out, after the softmax, whose sum counts them. A head is a plane of rows,
// one for each query of each sequence; columns are positions of keys.
struct Drops {
  const Numbers* numbers;  // has what the step draws from; null where none is left out
  uint64_t site;
  int sequence0, head0;  // places of the launch's first sequence and first query head
  uint32_t cut;          // what draws less is left out
  float factor;          // what is kept is multiplied by this

  __device__ __forceinline__ bool any() const { return numbers != nullptr; }
  // Where the draws of a query begin.
  __device__ __forceinline__ uint64_t row(long long sequence, int head, int position) const {
    if (!any()) return 0;
    uint64_t plane = mix((site ^ numbers->draws) + mix((uint64_t)((FAULT == 36 ? 0 : head0) + head)));
    return mix(plane ^ mix((uint64_t)((FAULT == 35 ? 0 : sequence0) + sequence) << 32 | (uint32_t)position));
  }
  // What the probability of a key is multiplied by, in a row that begins at `row`.
  __device__ __forceinline__ float factor_of(uint64_t row, int key) const {
    if (!any()) return 1.0f;
    return keeps(draw4(row, key / 4), key % 4, cut) ? factor : 0.0f;
  }
};
constexpr Drops NO_DROPS = {nullptr, 0, 0, 0, 0, 1.0f};

// Lanes whose numbers differ in one bit exchange the bits that are not of `low`, for those `by` places lower.
__device__ __forceinline__ uint32_t trade_bits(uint32_t bits, int lane, int other, uint32_t low, int by) {
  uint32_t theirs = __shfl_xor_sync(~0u, bits, other);
  return lane & other ? (bits & ~low) | (theirs & ~low) >> by : (bits & low) | (theirs & low) << by;
}

// The same number, anew: what follows from it takes no registers where it is not needed.
__device__ __forceinline__ int anew(int x) {
#ifndef PHALANX_EMULATOR
  asm volatile("" : "+r"(x));
#endif
  return x;
}

__device__ __forceinline__ uint32_t kept4(uint64_t drawn, uint32_t cut) {
  uint32_t bits = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) bits |= (uint32_t)keeps(drawn, i, cut) << i;
  return bits;
}

// Which of a warp's 16 queries by COLS keys from `key` on are kept, as products have them: bit 4 n + i is that of
// accumulator [n][i]. Two neighbouring lanes have the same four columns of two rows, and draw for one row each.
template <int COLS>
__device__ __forceinline__ uint32_t kept_of_queries(const uint64_t* rows, int key, uint32_t cut, int lane) {
  lane = anew(lane), key = anew(key);
  uint64_t row = rows[(lane >> 2) + (lane & 1) * 8];
  uint32_t bits = 0;
#pragma unroll
  for (int n = 0; n < COLS / 8; ++n) {
    bits |= kept4(draw4(row, (key + n * 8 + 2 * (lane & 2)) / 4), cut) << 4 * n;
  }
  return FAULT == 37 ? bits : trade_bits(bits, lane, 1, 0x33333333u, 2);
}

// The same of 16 keys from `key` on by COLS queries, whose draws begin at `rows`. Four lanes have the same two columns
// of eight keys in two runs of four, and draw for one column and one run each.
template <int COLS>
__device__ __forceinline__ uint32_t kept_of_keys(const uint64_t* rows, int key, uint32_t cut, int lane) {
  lane = anew(lane), key = anew(key);
  uint32_t bits = 0;
  int four = key / 4 + (lane >> 4) + (lane >> 3 & 1) * 2;
#pragma unroll
  for (int n = 0; n < COLS / 8; ++n) {
    bits |= kept4(draw4(rows[n * 8 + 2 * (lane & 3) + (lane >> 2 & 1)], four), cut) << 4 * n;
  }
  bits = trade_bits(bits, lane, 8, 0x33333333u, 2);
  return FAULT == 38 ? bits : trade_bits(bits, lane, 4, 0x55555555u, 1);
}
