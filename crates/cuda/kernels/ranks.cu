// Sums over ranks, of what they have sent each other, and how far their messages are.
//
//   sum_ranks_*: any grid, 256 threads; mark: a thread
#include "device.h"
#include "lanes.h"

template <class V> struct Wide {
  template <class T> static __device__ __forceinline__ V of(T x) { return as_f32(x); }
  template <class T> static __device__ __forceinline__ void put(T* to, V x) { put_f32(to, x); }
};
template <> struct Wide<double> {
  static __device__ __forceinline__ double of(double x) { return x; }
  static __device__ __forceinline__ void put(double* to, double x) { *to = x; }
};

// Leaf `me` of the tree is `own`, the others lie in `parts` in the order of ranks, each `stride` after the one before.
// `to` may be `own`. What is not wide is added wide and rounded once.
template <class V, class T>
__device__ __forceinline__ void sum_ranks(const T* own, int me, const T* parts, long long stride, T* to, long long len,
                                          const Tree& tree) {
  each(len, [&](long long at) {
    auto leaf = [&](int rank) {
      if (rank == me && FAULT != 60) return Wide<V>::of(own[at]);
      return Wide<V>::of(parts[(rank - (rank > me)) * stride + at]);
    };
    V sum = {};
    if (FAULT == 61) {
      int ranks = 1;
      for (int d = 0; d < tree.depth; ++d) ranks *= tree.radices[d];
      for (int rank = 0; rank < ranks; ++rank) sum = plus(sum, leaf(rank));
    } else {
      sum = sum_tree<V>(tree, leaf);
    }
    Wide<V>::put(to + at, sum);
  });
}

#define SUM_RANKS(T, V, S)                                                                                            \
  extern "C" __global__ void __launch_bounds__(256)                                                                   \
      sum_ranks_##S(const T* own, int me, const T* parts, long long stride, T* to, long long len,                     \
                    const __grid_constant__ Tree tree) {                                                              \
    sum_ranks<V>(own, me, parts, stride, to, len, tree);                                                              \
  }
SUM_RANKS(bf16, float, bf16)
SUM_RANKS(float, float, f32)
SUM_RANKS(double, double, f64)

// Memory of the host that tells which message is under way, how many were begun, and how many are over.
extern "C" __global__ void mark(uint32_t* words, uint32_t which, int over) {
  volatile uint32_t* at = words;
  if (!over) at[0] = which;
  uint32_t begun = at[1] + !over;
  at[1 + over] = begun;
}
