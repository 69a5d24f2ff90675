// Products of rows with the matrices of their experts. Which rows are whose the card knows alone (groups.h): tiles are
// dealt to as many blocks as the host likes, and a block looks up whose tile it has.
//
//   grouped_nt_*: y [rows, cols] = x [rows, inner] w_e [cols, inner]^T (+ b_e)
//   grouped_nn_*: y [rows, cols] = x [rows, inner] w_e [inner, cols]
//     grid any, as many as there are tiles at most: ceil(rows / 128) + units - 1 by ceil(cols / 128)
//   grouped_tn_*: of each expert its leaves' products dy^T x [rows, cols], summed in the order of `tree`; the sum meets
//     levels [levels, experts, rows, cols] as in gemm_f32.cu. Rows of several ranks come rank after rank: each has levels
//     of its own, `apart` of them, or, with `apart` 0, joins the sum of those before
//     grid any, experts * ceil(rows / 128) * ceil(cols / 128) at most; held float[grid][tree's depth][128 * 128]
//   grouped_bias_*: the same of column sums; grid (ceil(cols / 256), experts)
// 256 threads. A result's sum goes through the inner dimension in order, in f32, in bf16 by steps of 16, so its bits depend
// on its row and column alone. Any shape and alignment.
#include "device.h"
#include "lanes.h"
#include "leaves.h"
#include "groups.h"
#include "tiles.h"
#include "tiles_f32.h"

constexpr int SIDE = F32_SIDE, DEPTH = 32, THREADS = F32_THREADS, FOURS = F32_FOURS;

// A factor of bf16 of which a tile has SIDE of the outer dimension by DEPTH of the inner. ALONG: rows are of the outer
// dimension, and the inner one runs along them.
template <bool ALONG> struct Factor16 {
  using In = Tile<ALONG ? DEPTH : SIDE>;
  static constexpr int LEN = (ALONG ? SIDE : DEPTH) * In::LD;
  const bf16* base;
  long long ld;
  int outer, first;  // how many there are, and the tile's first
  bool wide;         // rows begin at whole 16 bytes, and end so

  // Starts to copy the tile's part from the inner dimension's `k`th on, 0 beyond its end.
  __device__ __forceinline__ void fetch(bf16* tile, int k, int inner) const {
#pragma unroll
    for (int i = 0; i < SIDE * DEPTH / 8 / THREADS; ++i) {
      int at = (int)threadIdx.x + i * THREADS, row = at / In::CHUNKS, chunk = at % In::CHUNKS;
      int along = (ALONG ? k : first) + chunk * 8, down = (ALONG ? first : k) + row;
      bool real = along < (ALONG ? inner : outer) && down < (ALONG ? outer : inner);
      bf16* to = tile + In::at(row, chunk);
      if (wide) {
        cp_async16_or_zero(to, base + (real ? down * ld + along : 0), real);
        continue;
      }
      for (int j = 0; j < 8; ++j) {
        to[j] = real && along + j < (ALONG ? inner : outer) ? base[down * ld + along + j] : (bf16)0;
      }
    }
  }
};

// The 16 rows of the product from `row` on of a left factor, as ldmatrix gives them, at the c-th step of 16.
template <bool ALONG> __device__ __forceinline__ void left16(uint32_t (&a)[4], const bf16* tile, int row, int c) {
  using In = typename Factor16<ALONG>::In;
  int lane = (int)threadIdx.x % WARP;
  if (ALONG) ldmatrix_x4(a, tile + In::move(In::left(lane), row, c * 2));
  else ldmatrix_x4_trans(a, tile + In::move(In::right(lane), c * 16, row / 8));
}
// The same of 16 columns of a right factor.
template <bool ALONG> __device__ __forceinline__ void right16(uint32_t (&b)[4], const bf16* tile, int col, int c) {
  using In = typename Factor16<ALONG>::In;
  int lane = (int)threadIdx.x % WARP;
  if (ALONG) ldmatrix_x4(b, tile + In::move(In::right(lane), col, c * 2));
  else ldmatrix_x4_trans(b, tile + In::move(In::left(lane), c * 16, col / 8));
}

// c = the product of one tile. A warp has 32 rows, in two halves of 16, by 64 columns: c[8 t + n] is as mma_bf16 has it of
// half t and eight columns n.
template <bool LEFT_ALONG, bool RIGHT_ALONG>
__device__ __forceinline__ void multiply16(float (&c)[FOURS][4], const Factor16<LEFT_ALONG>& left,
                                           const Factor16<RIGHT_ALONG>& right, int inner, bf16* tiles) {
  constexpr int LEN = Factor16<LEFT_ALONG>::LEN + Factor16<RIGHT_ALONG>::LEN;
  int warp = (int)threadIdx.x / WARP, row = warp % 4 * 32, col = warp / 4 * 64;
#pragma unroll
  for (int i = 0; i < FOURS * 4; ++i) c[i / 4][i % 4] = 0.0f;
  auto fetch = [&](int k, bf16* to) {
    if (k < inner) {
      left.fetch(to, k, inner);
      right.fetch(to + Factor16<LEFT_ALONG>::LEN, k, inner);
    }
    cp_async_commit();
  };
  fetch(0, tiles);
#pragma unroll 1
  for (int k = 0, half = 0; k < inner; k += DEPTH, half ^= 1) {
    fetch(k + DEPTH, tiles + (half ^ 1) * LEN);
    FAULT == 53 ? cp_async_wait<2>() : cp_async_wait<1>();
    __syncthreads();
    const bf16 *l = tiles + half * LEN, *r = l + Factor16<LEFT_ALONG>::LEN;
#pragma unroll
    for (int s = 0; s < DEPTH / 16; ++s) {
      uint32_t a[2][4];
#pragma unroll
      for (int t = 0; t < 2; ++t) left16<LEFT_ALONG>(a[t], l, row + t * 16, s);
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        uint32_t b[4];
        right16<RIGHT_ALONG>(b, r, col + n * 16, s);
#pragma unroll
        for (int t = 0; t < 2; ++t) mma_pair(c[8 * t + 2 * n], c[8 * t + 2 * n + 1], a[t], b);
      }
    }
    if (FAULT != 54) __syncthreads();
  }
  cp_async_wait<0>();
}

// Calls `put(neighbours, row, column)` for all of a thread.
template <class Put> __device__ __forceinline__ void each_pair16(const float (&c)[FOURS][4], int row, int col, Put put) {
  int warp = (int)threadIdx.x / WARP, lane = (int)threadIdx.x % WARP;
#pragma unroll
  for (int i = 0; i < FOURS * 2; ++i) {
    int n = i / 2, half = i % 2;
    float v[2] = {c[n][2 * half], c[n][2 * half + 1]};
    put(v, row + warp % 4 * 32 + n / 8 * 16 + half * 8 + lane / 4, col + warp / 4 * 64 + n % 8 * 8 + lane % 4 * 2);
  }
}

// What differs between the types: the factor, its product, and which neighbours a thread has of it, WIDTH at a time.
template <class T> struct Kind;
template <> struct Kind<bf16> {
  template <bool ALONG> using Factor = Factor16<ALONG>;
  static constexpr int WIDTH = 2, BYTES = 4 * SIDE * (DEPTH + 8) * 2;
  template <bool ALONG>
  static __device__ __forceinline__ Factor<ALONG> factor(const bf16* base, long long ld, int outer, int first) {
    return {base, ld, outer, first, aligned16(base) && ld % 8 == 0};
  }
  template <bool L, bool R>
  static __device__ __forceinline__ void multiply(float (&c)[FOURS][4], Factor<L>& left, Factor<R>& right, int inner,
                                                  void* shared) {
    multiply16(c, left, right, inner, (bf16*)shared);
  }
  template <class Put> static __device__ __forceinline__ void each(float (&c)[FOURS][4], int row, int col, Put put) {
    each_pair16(c, row, col, put);
  }
};
template <> struct Kind<float> {
  template <bool ALONG> using Factor = Factor32<ALONG>;
  static constexpr int WIDTH = 4, BYTES = SIDE * F32_DEPTH * 16;
  template <bool ALONG>
  static __device__ __forceinline__ Factor<ALONG> factor(const float* base, long long ld, int outer, int first) {
    return {base, ld, outer, first, aligned16(base) && ld % 4 == 0, {}};
  }
  template <bool L, bool R>
  static __device__ __forceinline__ void multiply(float (&c)[FOURS][4], Factor<L>& left, Factor<R>& right, int inner,
                                                  void* shared) {
    multiply32(c, left, right, inner, (float4*)shared);
  }
  template <class Put> static __device__ __forceinline__ void each(float (&c)[FOURS][4], int row, int col, Put put) {
    each_row32(c, row, col, put);
  }
};

template <class T, bool RIGHT_ALONG>
__device__ __forceinline__ void grouped(const T* x, const T* w, const T* bias, T* y, const Groups& groups, int cols,
                                        int inner, void* shared) {
  int across = (cols + SIDE - 1) / SIDE, count = groups.tiles() * across;
  for (int i = blockIdx.x; i < count; i += gridDim.x) {
    int tile = i / across, unit = groups.unit_of(tile), end = groups.end(unit), e = unit % groups.experts;
    int row0 = groups.first(unit) + (tile - groups.first_tile(unit)) * SIDE, col0 = i % across * SIDE;
    auto left = Kind<T>::template factor<true>(x, inner, end, row0);
    const T* of_expert = w + (long long)e * cols * inner;
    auto right = Kind<T>::template factor<RIGHT_ALONG>(of_expert, RIGHT_ALONG ? inner : cols, cols, col0);
    float c[FOURS][4];
    Kind<T>::multiply(c, left, right, inner, shared);
    Kind<T>::each(c, row0, col0, [&](float(&v)[Kind<T>::WIDTH], int row, int col) {
      if (FAULT != 55 && row >= end) return;
#pragma unroll
      for (int j = 0; j < Kind<T>::WIDTH; ++j) {
        if (col + j >= cols) return;
        if (bias) v[j] += as_f32(bias[(long long)e * cols + col + j]);
        put_f32(y + (long long)row * cols + col + j, v[j]);
      }
    });
  }
}

// Where the sum over a rank's rows goes: what it meets, and where it is left.
struct Meeting {
  long long first;  // level
  int merge, store;
  __device__ __forceinline__ Meeting(int peer, int apart, int merge, int store)
      : first(apart > 0 ? peer * apart : peer > 0 ? store : 0),
        merge(apart > 0 || peer == 0 ? merge : 1),
        store(apart > 0 || peer == 0 ? store : 0) {}
};

template <class T>
__device__ __forceinline__ void grouped_tn(const T* dy, const T* x, const uint32_t* counts, const Groups& groups,
                                           float* levels, long long level_len, float* held, int leaves, int rows,
                                           int cols, const Tree& tree, int merge, int store, int apart, void* shared) {
  int across = (cols + SIDE - 1) / SIDE, tiles = (rows + SIDE - 1) / SIDE * across;
  HeldSums<FOURS, 0, THREADS> sums;
  sums.memory = (float4*)held + blockIdx.x * tree.depth * sums.STEP + threadIdx.x;
#pragma unroll 1
  for (int i = blockIdx.x; i < groups.experts * tiles; i += gridDim.x) {
    int e = i / tiles, row0 = i % tiles / across * SIDE, col0 = i % tiles % across * SIDE;
    long long from = groups.first(e);
#pragma unroll 1
    for (int at = 0; at < groups.units / groups.experts * leaves; ++at) {
      int peer = at / leaves, leaf = at % leaves, unit = peer * groups.experts + e;
      if (leaf == 0) from = groups.first(unit);
      int count = (int)counts[unit * leaves + leaf];
      auto left = Kind<T>::template factor<false>(dy + from * rows, rows, rows, row0);
      auto right = Kind<T>::template factor<false>(x + from * cols, cols, cols, col0);
      from += count;
      float c[FOURS][4];
      Kind<T>::multiply(c, left, right, count, shared);
      if (!sums.climb(c, tree, leaf)) continue;
      Meeting meets(FAULT == 56 ? 0 : peer, apart, merge, store);
      float* of_expert = levels + meets.first * level_len + (long long)e * rows * cols;
      Kind<T>::each(c, row0, col0, [&](float(&v)[Kind<T>::WIDTH], int row, int col) {
        if (row >= rows || col >= cols) return;
        float* to = of_expert + (long long)row * cols + col;
#pragma unroll 1
        for (int l = 0; l < meets.merge; ++l) {
          const float* held = to + l * level_len;
#pragma unroll
          for (int j = 0; j < Kind<T>::WIDTH; ++j) v[j] = (col + j < cols ? held[j] : 0.0f) + v[j];
        }
        to += meets.store * level_len;
#pragma unroll
        for (int j = 0; j < Kind<T>::WIDTH; ++j) {
          if (col + j < cols) to[j] = v[j];
        }
      });
    }
  }
}

template <class T>
__device__ __forceinline__ void grouped_bias(const T* dy, const uint32_t* counts, const Groups& groups, float* levels,
                                             long long level_len, int leaves, int cols, const Tree& tree, int merge,
                                             int store, int apart) {
  int e = (int)blockIdx.y, col = (int)(blockIdx.x * blockDim.x + threadIdx.x);
  if (col >= cols) return;
  for (int unit = e, peer = 0; unit < groups.units; unit += groups.experts, ++peer) {
    long long row = groups.first(unit);
    float v = sum_tree<float>(tree, [&](int leaf) {
      long long end = row + counts[unit * leaves + leaf];
      float sum = 0.0f;
      for (; row < end; ++row) sum += as_f32(dy[row * cols + col]);
      return sum;
    });
    Meeting meets(peer, apart, merge, store);
    float* to = levels + meets.first * level_len + (long long)e * cols + col;
    for (int l = 0; l < meets.merge; ++l) v = to[l * level_len] + v;
    to[meets.store * level_len] = v;
  }
}

#define GROUPED(T, S)                                                                                               \
  extern "C" __global__ void __launch_bounds__(THREADS)                                                             \
      grouped_nt_##S(const T* x, const T* w, const T* bias, T* y, const int* starts, int units, int experts,        \
                     int cols, int inner) {                                                                         \
    SHARED_ARRAY(uint4, shared, Kind<T>::BYTES / 16);                                                               \
    grouped<T, true>(x, w, bias, y, {starts, units, experts}, cols, inner, shared);                                 \
  }                                                                                                                 \
  extern "C" __global__ void __launch_bounds__(THREADS)                                                             \
      grouped_nn_##S(const T* x, const T* w, T* y, const int* starts, int units, int experts, int cols,             \
                     int inner) {                                                                                   \
    SHARED_ARRAY(uint4, shared, Kind<T>::BYTES / 16);                                                               \
    grouped<T, false>(x, w, nullptr, y, {starts, units, experts}, cols, inner, shared);                             \
  }                                                                                                                 \
  extern "C" __global__ void __launch_bounds__(THREADS)                                                             \
      grouped_tn_##S(const T* dy, const T* x, const uint32_t* counts, const int* starts, float* levels,             \
                     long long level_len, float* held, int units, int experts, int leaves, int rows, int cols,      \
                     const __grid_constant__ Tree tree, int merge, int store, int apart) {                          \
    SHARED_ARRAY(uint4, shared, Kind<T>::BYTES / 16);                                                               \
    grouped_tn(dy, x, counts, {starts, units, experts}, levels, level_len, held, leaves, rows, cols, tree, merge,   \
               store, apart, shared);                                                                               \
  }                                                                                                                 \
  extern "C" __global__ void __launch_bounds__(256)                                                                 \
      grouped_bias_##S(const T* dy, const uint32_t* counts, const int* starts, float* levels, long long level_len,  \
                       int units, int experts, int leaves, int cols, const __grid_constant__ Tree tree, int merge,  \
                       int store, int apart) {                                                                      \
    grouped_bias(dy, counts, {starts, units, experts}, levels, level_len, leaves, cols, tree, merge, store, apart); \
  }
GROUPED(bf16, bf16)
GROUPED(float, f32)
