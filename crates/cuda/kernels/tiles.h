// Tiles of bf16 in shared memory, and what warps read from them for m16n8k16 products.
#pragma once
constexpr int WARP = 32;
constexpr float LOG2_E = 1.4426950408889634f;

// Widths of heads that have kernels: how these are called, the width of queries and keys, that of values.
#define HEAD_WIDTHS(KERNELS)                                                                      \
  KERNELS(d16, 16, 16) KERNELS(d32, 32, 32) KERNELS(d64, 64, 64) KERNELS(d80, 80, 80)             \
  KERNELS(d96, 96, 96) KERNELS(d128, 128, 128) KERNELS(d256, 256, 256) KERNELS(d96v64, 96, 64)    \
  KERNELS(d192v128, 192, 128)

// Rows of D elements. Eight rows of one column of 16-byte chunks, which is what ldmatrix reads at a time, lie in eight
// different groups of banks: by a swizzle where D is a power of two of at least 64, otherwise by 16 bytes between rows.
template <int D> struct Tile {
  static_assert(D % 16 == 0, "a product takes 16 columns at a time");
  static constexpr bool SWIZZLED = D == 64 || D == 128 || D == 256;
  static constexpr int LD = SWIZZLED ? D : D + 8;
  static constexpr int CHUNKS = D / 8;

  // Where a chunk of 8 elements starts.
  static __device__ __forceinline__ int at(int row, int chunk) {
    return row * LD + (SWIZZLED ? chunk ^ (row & 7) : chunk) * 8;
  }
  // From a place in one of the first two chunks of a row: a multiple of 8 rows down, an even number of chunks right.
  static __device__ __forceinline__ int move(int from, int rows, int chunks) {
    return (SWIZZLED ? from ^ (chunks * 8) : from + chunks * 8) + rows * LD;
  }
  // The row that this lane hands to ldmatrix_x4 for 16 x 16 elements as a left operand; transposed, as a right operand
  // that has its rows along the inner dimension.
  static __device__ __forceinline__ int left(int lane) { return at(lane & 15, lane >> 4); }
  // The same for a right operand that has its rows along the columns of the product.
  static __device__ __forceinline__ int right(int lane) { return at((lane & 7) | (lane >> 4) << 3, (lane >> 3) & 1); }

  // Starts to copy rows `first..first + ROWS` (row stride `ld`), all threads together. Rows from `limit` on are copies
  // of the last one, for the caller to ignore.
  template <int ROWS, int THREADS>
  static __device__ __forceinline__ void fetch(bf16* tile, const bf16* from, int ld, int first, int limit) {
    // Whole blocks go on from one address, which takes fewest registers.
    constexpr int STRIDE = THREADS / CHUNKS;
    if (THREADS % CHUNKS == 0 && ROWS % STRIDE == 0 && first + ROWS <= limit) {
      int row = threadIdx.x / CHUNKS, chunk = threadIdx.x % CHUNKS;
      from += (long long)(first + row) * ld + chunk * 8;
#pragma unroll
      for (int k = 0; k < ROWS / STRIDE; ++k, from += (long long)STRIDE * ld) {
        cp_async16(tile + at(row + k * STRIDE, chunk), from);
      }
      return;
    }
#pragma unroll 1
    for (int i = threadIdx.x; i < ROWS * CHUNKS; i += THREADS) {
      int row = i / CHUNKS, chunk = i % CHUNKS;
      cp_async16(tile + at(row, chunk), from + (long long)min(first + row, limit - 1) * ld + chunk * 8);
    }
  }

  // Copies a warp's rows of the tile to rows of `COLS` elements (row stride `ld`), of which there are `rows`.
  template <int ROWS, int COLS>
  static __device__ __forceinline__ void store(const bf16* tile, bf16* to, int ld, int rows, int lane) {
#pragma unroll 4
    for (int i = lane; i < ROWS * (COLS / 8); i += WARP) {
      int row = i / (COLS / 8), chunk = i % (COLS / 8);
      if (row < rows) {
        *(uint4*)(to + (long long)row * ld + chunk * 8) = *(const uint4*)(tile + at(row, chunk));
      }
    }
  }

  // Puts a product's accumulators of 16 rows, times the factors of a lane's two rows, into the tile.
  template <int COLS>
  static __device__ __forceinline__ void put(bf16* tile, const float (&c)[COLS / 8][4], float first, float second,
                                             int lane) {
#pragma unroll
    for (int n = 0; n < COLS / 8; ++n) {
      int row = lane >> 2, col = 2 * (lane & 3);
      *(uint32_t*)(tile + at(row, n) + col) = pack_bf16(c[n][0] * first, c[n][1] * first);
      *(uint32_t*)(tile + at(row + 8, n) + col) = pack_bf16(c[n][2] * second, c[n][3] * second);
    }
  }
};

// Accumulators of 16 x 16 as a left operand: both are held by the same lanes.
__device__ __forceinline__ void as_left(uint32_t (&a)[4], const float (&c0)[4], const float (&c1)[4]) {
  a[0] = pack_bf16(c0[0], c0[1]);
  a[1] = pack_bf16(c0[2], c0[3]);
  a[2] = pack_bf16(c1[0], c1[1]);
  a[3] = pack_bf16(c1[2], c1[3]);
}

// Those of a left operand that are left out become 0: bit i + 4 n of `kept` is that of c<n>[i].
__device__ __forceinline__ void leave_out(uint32_t (&a)[4], uint32_t kept) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    a[i] &= (kept >> 2 * i & 1 ? 0xffffu : 0u) | (kept >> (2 * i + 1) & 1 ? 0xffff0000u : 0u);
  }
}

// Two neighbouring products with one left operand.
__device__ __forceinline__ void mma_pair(float (&c0)[4], float (&c1)[4], const uint32_t (&a)[4],
                                         const uint32_t (&b)[4]) {
  mma_bf16(c0, a, b[0], b[1]);
  mma_bf16(c1, a, b[2], b[3]);
}

// Scores of 16 rows against N columns, of which the lane holds two rows, become exponentials over the running maximum.
// `position` is the lane's first row's, `key` its first column's. BOUNDED: keys before those `seen` by each row are not.
template <int N, int D, bool BOUNDED = false>
__device__ __forceinline__ void softmax(float (&s)[N / 8][4], float (&o)[D / 8][4], float (&max)[2], float (&sum)[2],
                                        float scale, bool masked, int position, int key, const int (&seen)[2]) {
  if (masked) {
#pragma unroll
    for (int n = 0; n < N / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (key + n * 8 + (i & 1) > position + (i >> 1) * 8 + (FAULT == 3)) s[n][i] = -INFINITY;
      }
    }
  }
  if (BOUNDED) {
#pragma unroll
    for (int n = 0; n < N / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (key + n * 8 + (i & 1) + (FAULT == 32) < seen[i >> 1]) s[n][i] = -INFINITY;
      }
    }
  }
  float top[2];
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    float t = max[h];
#pragma unroll
    for (int n = 0; n < N / 8; ++n) t = fmaxf(t, fmaxf(s[n][2 * h], s[n][2 * h + 1]));
    t = fmaxf(t, __shfl_xor_sync(~0u, t, 1));
    top[h] = fmaxf(t, __shfl_xor_sync(~0u, t, 2));
  }
  // A factor of 1 would change nothing, so rows that wait for others of the warp keep their bits.
  if (__any_sync(~0u, top[0] > max[0] || top[1] > max[1])) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float factor = BOUNDED && max[h] == top[h] ? 1.0f : exp2_fast((max[h] - top[h]) * scale);
      sum[h] *= factor;
      max[h] = top[h];
#pragma unroll
      for (int n = 0; n < D / 8; ++n) {
        o[n][2 * h] *= factor;
        o[n][2 * h + 1] *= factor;
      }
    }
  }
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    // A row that has seen nothing so far has no maximum to subtract.
    float low = BOUNDED && top[h] == -INFINITY ? 0.0f : top[h] * scale;
#pragma unroll
    for (int n = 0; n < N / 8; ++n) {
#pragma unroll
      for (int i = 2 * h; i < 2 * h + 2; ++i) {
        s[n][i] = exp2_fast(fmaf(s[n][i], scale, -low));
        sum[h] += s[n][i];
      }
    }
  }
}

// sums += mine theirs^T: a warp's TILES of 16 rows of D elements against COLS other rows.
template <int D, int COLS, int TILES>
__device__ __forceinline__ void add_dots(float (&sums)[TILES][COLS / 8][4], const bf16* mine, const bf16* theirs,
                                         int left, int right) {
  using T = Tile<D>;
#pragma unroll
  for (int c = 0; c < D / 16; ++c) {
    uint32_t a[TILES][4];
#pragma unroll
    for (int t = 0; t < TILES; ++t) ldmatrix_x4(a[t], mine + T::move(left, t * 16, c * 2));
#pragma unroll
    for (int n = 0; n < COLS / 16; ++n) {
      uint32_t b[4];
      ldmatrix_x4(b, theirs + T::move(right, n * 16, c * 2));
#pragma unroll
      for (int t = 0; t < TILES; ++t) mma_pair(sums[t][2 * n], sums[t][2 * n + 1], a[t], b);
    }
  }
}

// sums += a rows: 16 weighted rows of D elements from the 16 c-th on, WIDTH columns of them from `slice` on.
template <int D, int WIDTH, int TILES>
__device__ __forceinline__ void add_weighted(float (&sums)[TILES][WIDTH / 8][4], const uint32_t (&a)[TILES][4],
                                             const bf16* rows, int left, int c, int slice) {
  using T = Tile<D>;
#pragma unroll
  for (int n = 0; n < WIDTH / 16; ++n) {
    uint32_t b[4];
    ldmatrix_x4_trans(b, rows + T::move(left, c * 16, n * 2 + slice / 8));
#pragma unroll
    for (int t = 0; t < TILES; ++t) mma_pair(sums[t][2 * n], sums[t][2 * n + 1], a[t], b);
  }
}

// Gradients of scores, at first less what a row's all share: times the probabilities, as left operands of the c-th step.
template <int TILES, int N>
__device__ __forceinline__ void as_grads(uint32_t (&a)[TILES][4], float (&ds)[TILES][N][4], const float (&p)[TILES][N][4],
                                         int c) {
#pragma unroll
  for (int t = 0; t < TILES; ++t) {
#pragma unroll
    for (int n = 2 * c; n < 2 * c + 2; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) ds[t][n][i] *= p[t][n][i];
    }
    as_left(a[t], ds[t][2 * c], ds[t][2 * c + 1]);
  }
}

// Which block of rows and which head of which sequence a block of threads takes: blocks with the most work first, over
// all heads and sequences of the launch, so that what runs last is short.
struct Turn {
  int block, head, sequence;
};

__device__ __forceinline__ Turn take_turn(bool last_first, bool again = false) {
  int pairs = gridDim.y * gridDim.z, x = blockIdx.x;
#ifndef PHALANX_EMULATOR
  if (again) asm volatile("" : "+r"(x));  // not what the first call gave, which would take registers in between
#endif
  int id = x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  int block = id / pairs, pair = id % pairs;
  Turn turn;
  turn.block = last_first ? (int)gridDim.x - 1 - block : block;
  turn.head = pair % gridDim.y;
  turn.sequence = pair / gridDim.y;
  return turn;
}
