// Products of row-major f32 matrices, in f32 throughout: sums over the inner dimension go in its order, so the bits of a
// result depend on its row and column alone.
//
//   gemm_nt_f32: y [rows, cols] = x [rows, inner] w [cols, inner]^T (+ acc) (+ bias); acc may be y
//   gemm_nn_f32: y [rows, cols] = x [rows, inner] w [inner, cols] (+ acc) (+ bias)
//   gemm_tn_f32: for each of `subtrees` parts: the leaves' products dy^T x [rows, cols], each of leaf_rows rows, summed in
//     the order of `tree`; the sum meets levels + part * subtree_stride: for l < merge r = levels[l] + r, then
//     levels[store] = r, with levels level_len apart
//   symmetric_nt_f32: out [side, side] = x x^T, x [side, inner]; symmetric_nn_f32: out = left right of symmetric matrices
//     that commute. What is below the diagonal is computed, and put above it as well
// Any shape and alignment; x has rows ld_x apart, y and acc ld_y, the others are dense.
//   grid   min(tiles, any number), tiles = ceil(rows / 128) * ceil(cols / 128) * subtrees; block 256
//          of symmetric ones tiles = t (t + 1) / 2 with t = ceil(side / 128)
//   held   of gemm_tn: float[grid][tree's depth][128 * 128]
#include "device.h"
#include "lanes.h"
#include "leaves.h"

constexpr int F32_SIDE = 128, F32_DEPTH = 16, F32_THREADS = 256;
// Four accumulators a float4: rows 64 a + 4 (thread / 16) + 0..3, columns 64 b + 4 (thread % 16) on.
constexpr int F32_FOURS = 16;

// Up to four of `count` elements from p on.
__device__ __forceinline__ float4 some4(const float* p, int count, bool wide) {
  if (wide && count >= 4) return *(const float4*)p;
  return make_float4(count > 0 ? p[0] : 0.0f, count > 1 ? p[1] : 0.0f, count > 2 ? p[2] : 0.0f, count > 3 ? p[3] : 0.0f);
}

// A factor of which a tile has F32_SIDE of the outer dimension by F32_DEPTH of the inner; in shared memory inner by
// outer. ALONG: rows are of the outer dimension, and the inner one runs along them.
template <bool ALONG> struct Factor32 {
  const float* base;
  long long ld;
  int outer, first;  // how many there are, and the tile's first
  bool wide;
  float4 held[2];

  __device__ __forceinline__ void load(int k, int inner) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (ALONG) {
        int row = first + (int)threadIdx.x % 128, at = k + (int)threadIdx.x / 128 * 8 + i * 4;
        held[i] = some4(base + row * ld + at, row < outer ? inner - at : 0, wide);
      } else {
        int row = k + (int)threadIdx.x / 32 + i * 8, at = first + (int)threadIdx.x % 32 * 4;
        held[i] = some4(base + row * ld + at, row < inner ? outer - at : 0, wide);
      }
    }
  }
  __device__ __forceinline__ void store(float4* tile) const {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (ALONG) {
        float* to = (float*)tile + ((int)threadIdx.x / 128 * 8 + i * 4) * F32_SIDE + (int)threadIdx.x % 128;
        to[0] = held[i].x, to[F32_SIDE] = held[i].y, to[2 * F32_SIDE] = held[i].z, to[3 * F32_SIDE] = held[i].w;
      } else {
        tile[((int)threadIdx.x / 32 + i * 8) * (F32_SIDE / 4) + (int)threadIdx.x % 32] = held[i];
      }
    }
  }
};

// c += four rows by four columns of one step of the inner dimension.
__device__ __forceinline__ void outer4(float (*c)[4], float4 a, float4 b) {
  const float rows[4] = {a.x, a.y, a.z, a.w};
#pragma unroll
  for (int r = 0; r < 4; ++r) {
    c[r][0] = fmaf(rows[r], b.x, c[r][0]), c[r][1] = fmaf(rows[r], b.y, c[r][1]);
    c[r][2] = fmaf(rows[r], b.z, c[r][2]), c[r][3] = fmaf(rows[r], b.w, c[r][3]);
  }
}

// c = the product of one tile; c[8 a + 4 b + r] is row r of its block (a, b) of this thread.
template <bool LEFT_ALONG, bool RIGHT_ALONG>
__device__ __forceinline__ void multiply32(float (&c)[F32_FOURS][4], Factor32<LEFT_ALONG>& left,
                                           Factor32<RIGHT_ALONG>& right, int inner, float4* tiles) {
  constexpr int LEN = F32_SIDE * F32_DEPTH / 4;
  int y = (int)threadIdx.x / 16, x = (int)threadIdx.x % 16;
#pragma unroll
  for (int i = 0; i < F32_FOURS * 4; ++i) c[i / 4][i % 4] = 0.0f;
  left.load(0, inner);
  right.load(0, inner);
  float4* now = tiles;
#pragma unroll 1
  for (int k = 0; k < inner; k += F32_DEPTH) {
    // The other half of `tiles` may still be read; this one was left two barriers ago.
    left.store(now);
    right.store(now + LEN);
#if FAULT != 24
    __syncthreads();
#endif
    if (k + F32_DEPTH < inner) {
      left.load(k + F32_DEPTH, inner);
      right.load(k + F32_DEPTH, inner);
    }
#pragma unroll
    for (int d = 0; d < F32_DEPTH; ++d) {
      const float4 *rows = now + d * (F32_SIDE / 4) + y, *cols = now + LEN + d * (F32_SIDE / 4) + x;
      float4 a[2] = {rows[0], rows[16]}, b[2] = {cols[0], cols[16]};
#pragma unroll
      for (int i = 0; i < 4; ++i) outer4(c + i * 4, a[i / 2], b[i % 2]);
    }
    now = now == tiles ? tiles + 2 * LEN : tiles;
  }
  // The next product begins with the first half, which may be what this one ends with.
  __syncthreads();
}

// Calls `put(four elements, row, column)` for all of a thread.
template <class Put> __device__ __forceinline__ void each_row32(float (&c)[F32_FOURS][4], int row, int col, Put put) {
#pragma unroll
  for (int i = 0; i < F32_FOURS; ++i) {
    put(c[i], row + i / 8 * 64 + (int)threadIdx.x / 16 * 4 + i % 4, col + i / 4 % 2 * 64 + (int)threadIdx.x % 16 * 4);
  }
}

__device__ __forceinline__ void put_some4(float* p, int count, bool wide, const float (&v)[4]) {
  if (wide && count >= 4) {
    *(float4*)p = make_float4(v[0], v[1], v[2], v[3]);
    return;
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (i < count) p[i] = v[i];
  }
}

template <bool RIGHT_ALONG>
__device__ __forceinline__ void gemm32(const float* x, const float* w, float* y, const float* acc, const float* bias,
                                       int rows, int cols, int inner, long long ld_x, long long ld_y, float4* tiles) {
  int across = (cols + F32_SIDE - 1) / F32_SIDE, count = (rows + F32_SIDE - 1) / F32_SIDE * across;
  Factor32<true> left = {x, ld_x, rows, 0, aligned16(x) && ld_x % 4 == 0, {}};
  Factor32<RIGHT_ALONG> right = {w, RIGHT_ALONG ? inner : cols, cols, 0, false, {}};
  right.wide = aligned16(w) && right.ld % 4 == 0;
  bool wide = aligned16(y) && aligned16(acc) && aligned16(bias) && ld_y % 4 == 0;
  for (int i = blockIdx.x; i < count; i += gridDim.x) {
    left.first = i / across * F32_SIDE;
    right.first = i % across * F32_SIDE;
    float c[F32_FOURS][4];
    multiply32(c, left, right, inner, tiles);
    each_row32(c, left.first, right.first, [&](float(&v)[4], int row, int col) {
      if (row >= rows || col >= cols) return;
      if (acc) {
        float4 a = some4(acc + row * ld_y + col, cols - col, wide);
        v[0] += a.x, v[1] += a.y, v[2] += a.z, v[3] += a.w;
      }
      if (bias) {
        float4 b = some4(bias + col, cols - col, wide);
        v[0] += b.x, v[1] += b.y, v[2] += b.z, v[3] += b.w;
      }
      put_some4(y + row * ld_y + col, cols - col, wide, v);
    });
  }
}

extern "C" __global__ void __launch_bounds__(256)
    gemm_nt_f32(const float* x, const float* w, float* y, const float* acc, const float* bias, int rows, int cols,
                int inner, long long ld_x, long long ld_y) {
  SHARED_ARRAY(float4, tiles, F32_SIDE * F32_DEPTH);
  gemm32<true>(x, w, y, acc, bias, rows, cols, inner, ld_x, ld_y, tiles);
}
extern "C" __global__ void __launch_bounds__(256)
    gemm_nn_f32(const float* x, const float* w, float* y, const float* acc, const float* bias, int rows, int cols,
                int inner, long long ld_x, long long ld_y) {
  SHARED_ARRAY(float4, tiles, F32_SIDE * F32_DEPTH);
  gemm32<false>(x, w, y, acc, bias, rows, cols, inner, ld_x, ld_y, tiles);
}

template <bool RIGHT_ALONG>
__device__ __forceinline__ void symmetric32(const float* x, const float* w, float* out, int side, int inner,
                                            float4* tiles) {
  int across = (side + F32_SIDE - 1) / F32_SIDE, count = across * (across + 1) / 2;
  Factor32<true> left = {x, inner, side, 0, aligned16(x) && inner % 4 == 0, {}};
  Factor32<RIGHT_ALONG> right = {w, RIGHT_ALONG ? inner : side, side, 0, false, {}};
  right.wide = aligned16(w) && right.ld % 4 == 0;
  for (int i = blockIdx.x; i < count; i += gridDim.x) {
    int row0 = 0, col0 = i;
    while (col0 > row0) col0 -= ++row0;
    left.first = row0 * F32_SIDE;
    right.first = col0 * F32_SIDE;
    float c[F32_FOURS][4];
    multiply32(c, left, right, inner, tiles);
    each_row32(c, left.first, right.first, [&](float(&v)[4], int row, int col) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        if (row >= side || col + j > row) continue;
        out[(long long)row * side + col + j] = v[j];
#if FAULT != 42
        out[(long long)(col + j) * side + row] = v[j];
#endif
      }
    });
  }
}

extern "C" __global__ void __launch_bounds__(256)
    symmetric_nt_f32(const float* x, const float* w, float* out, int side, int inner) {
  SHARED_ARRAY(float4, tiles, F32_SIDE * F32_DEPTH);
  symmetric32<true>(x, w, out, side, inner, tiles);
}
extern "C" __global__ void __launch_bounds__(256)
    symmetric_nn_f32(const float* x, const float* w, float* out, int side, int inner) {
  SHARED_ARRAY(float4, tiles, F32_SIDE * F32_DEPTH);
  symmetric32<false>(x, w, out, side, inner, tiles);
}

extern "C" __global__ void __launch_bounds__(256)
    gemm_tn_f32(const float* dy, const float* x, float* levels, long long level_len, float* held, int rows, int cols,
                int leaf_rows, const __grid_constant__ Tree tree, int subtrees, long long subtree_stride, int merge,
                int store) {
  SHARED_ARRAY(float4, tiles, F32_SIDE * F32_DEPTH);
  int across = (cols + F32_SIDE - 1) / F32_SIDE, of_part = (rows + F32_SIDE - 1) / F32_SIDE * across;
  int leaves = 1;
  for (int d = 0; d < tree.depth; ++d) leaves *= tree.radices[d];
  Factor32<false> left = {dy, rows, rows, 0, aligned16(dy) && rows % 4 == 0, {}};
  Factor32<false> right = {x, cols, cols, 0, aligned16(x) && cols % 4 == 0, {}};
  bool wide = aligned16(levels) && ((level_len | subtree_stride | cols) & 3) == 0;
  HeldSums<F32_FOURS, 0, F32_THREADS> sums;
  sums.memory = (float4*)held + blockIdx.x * tree.depth * sums.STEP + threadIdx.x;
  for (int i = blockIdx.x; i < of_part * subtrees; i += gridDim.x) {
    int part = i / of_part, tile = i % of_part;
    left.first = tile / across * F32_SIDE;
    right.first = tile % across * F32_SIDE;
#pragma unroll 1
    for (int leaf = 0; leaf < leaves; ++leaf) {
      long long from = ((long long)part * leaves + leaf) * leaf_rows;
      left.base = dy + from * rows;
      right.base = x + from * cols;
      float c[F32_FOURS][4];
      multiply32(c, left, right, leaf_rows, tiles);
      if (!sums.climb(c, tree, leaf)) continue;
      each_row32(c, left.first, right.first, [&](float(&v)[4], int row, int col) {
        if (row >= rows || col >= cols) return;
        float* to = levels + part * subtree_stride + (long long)row * cols + col;
        for (int l = 0; l < merge; ++l) {
          float4 o = some4(to + l * level_len, cols - col, wide);
          v[0] = o.x + v[0], v[1] = o.y + v[1], v[2] = o.z + v[2], v[3] = o.w + v[3];
        }
        put_some4(to + store * level_len, cols - col, wide, v);
      });
    }
  }
}
