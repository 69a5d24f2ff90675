// Sums over leaves of a tile's accumulators, in the order of a tree.
#pragma once

// What each of THREADS threads holds between leaves, in memory of its own: the sums of levels FIRST on, float4 by float4
// side by side with those of other threads.
template <int FOURS, int FIRST, int THREADS> struct HeldSums {
  static constexpr long long STEP = FOURS * THREADS;  // from level to level
  float4* memory;

  // Takes r, the sum of a node at level FIRST, up: it is added to what is held where it is not the first child, and
  // waits where it is not the last. True if r is then the sum of all. `index` counts such nodes.
  __device__ __forceinline__ bool climb(float (&r)[FOURS][4], const Tree& tree, int index) const {
    float4* held = memory;
#pragma unroll 1
    for (int level = FIRST; level < tree.depth; ++level, held += STEP) {
      int radix = tree.radices[level], digit = index % radix;
      index /= radix;
      if (digit > 0) {
#pragma unroll
        for (int n = 0; n < FOURS; ++n) {
          float4 v = held[n * THREADS];
          r[n][0] = v.x + r[n][0], r[n][1] = v.y + r[n][1], r[n][2] = v.z + r[n][2], r[n][3] = v.w + r[n][3];
        }
      }
      if (digit + 1 < radix) {
#pragma unroll
        for (int n = 0; n < FOURS; ++n) held[n * THREADS] = make_float4(r[n][0], r[n][1], r[n][2], r[n][3]);
        return false;
      }
    }
    return true;
  }
};
