// Products of tiles of 128 by 128 in true f32, by 256 threads: sums over the inner dimension go in its order.
#pragma once

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
    if (FAULT != 24) __syncthreads();
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
