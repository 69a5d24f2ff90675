// Tiles of bf16 for wgmma, and how they come and go: columns of 64 elements, whose rows of 128 bytes are swizzled.
#pragma once
#include "warpgroup.h"
#include "tiles.h"

// Starts to bring a tile of ROWS rows from `row` on, 64 rows and columns at a time, whose bytes `gate` expects.
template <int ROWS, int D>
__device__ __forceinline__ void fetch_tile(bf16* to, const TensorMap* map, uint64_t* gate, int col, int row,
                                           int sequence) {
#pragma unroll
  for (int c = 0; c < D / 64; ++c) {
#pragma unroll
    for (int r = 0; r < ROWS / 64; ++r) {
      tma_load_3d(to + (c * ROWS + r * 64) * 64, map, gate, col + c * 64, row + r * 64, sequence);
    }
  }
}

// Which tile a persistent block takes next; tiles with the most work come first.
struct Tiles {
  int blocks, pairs, heads, count;
  __device__ __forceinline__ Tiles(int sequences, int sequence, int heads, int rows)
      : blocks((sequence + rows - 1) / rows), pairs(heads * sequences), heads(heads), count(blocks * pairs) {}
  __device__ __forceinline__ Turn at(int i, bool last_first) const {
    int block = i / pairs, pair = i % pairs;
    Turn turn;
    turn.block = last_first ? blocks - 1 - block : block;
    turn.head = pair % heads;
    turn.sequence = pair / heads;
    return turn;
  }
};

// c += a b^T, or = where `fresh`: 64 rows of a against COLS rows of b, both by rows, in shared memory.
template <int D, int COLS>
__device__ __forceinline__ void multiply_rows(float (&c)[COLS / 8][4], const bf16* a, int a_rows, const bf16* b,
                                              int b_rows, bool fresh) {
#pragma unroll
  for (int k = 0; k < D / 16; ++k) {
    uint64_t left = wgmma_rows(a + k / 4 * a_rows * 64 + k % 4 * 16);
    uint64_t right = wgmma_rows(b + k / 4 * b_rows * 64 + k % 4 * 16);
    wgmma_ss<COLS>(c, left, right, !fresh || k > 0);
  }
}

// c += a b: 64 rows of a, in registers, by DEPTH; b by rows, in shared memory.
template <int D, int DEPTH>
__device__ __forceinline__ void multiply_columns(float (&c)[D / 8][4], const uint32_t (&a)[DEPTH / 16][4],
                                                 const bf16* b, int b_rows) {
#pragma unroll
  for (int k = 0; k < DEPTH / 16; ++k) {
    wgmma_rs_transposed<D>(c, a[k], wgmma_columns(b + k * 16 * 64, b_rows * 128), true);
  }
}

// Writes 16 rows of accumulators, times the factors of a lane's two rows, as whole rows: by way of shared memory of
// this warp's own, in a tile of ROWS rows.
template <int D>
__device__ __forceinline__ void write_rows(bf16* tile, int tile_rows, const float (&c)[D / 8][4], float first,
                                           float second, bf16* to, long long ld, int rows, int lane) {
#pragma unroll
  for (int half = 0; half < D / 64; ++half) {
    float part[8][4];
#pragma unroll
    for (int n = 0; n < 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) part[n][i] = c[half * 8 + n][i];
    }
    Tile<64>::put<64>(tile + half * tile_rows * 64, part, first, second, lane);
  }
  __syncwarp();
#pragma unroll
  for (int half = 0; half < D / 64; ++half) {
    Tile<64>::store<16, 64>(tile + half * tile_rows * 64, to + half * 64, ld, rows, lane);
  }
}

// The compiler moves waits up, ahead of work that they should overlap, but not past accesses to memory: what the bits
// depend on, which never include a sign, stays before this one, which never happens.
__device__ __forceinline__ void stay_before(int bits, void* place) {
  if (bits < 0) *(volatile int*)place = bits;
}

template <int N>
__device__ __forceinline__ void as_lefts(uint32_t (&a)[N / 16][4], const float (&c)[N / 8][4]) {
#pragma unroll
  for (int k = 0; k < N / 16; ++k) as_left(a[k], c[2 * k], c[2 * k + 1]);
}
