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
#include "tiles_f32.h"

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
        if (FAULT != 42) out[(long long)(col + j) * side + row] = v[j];
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
