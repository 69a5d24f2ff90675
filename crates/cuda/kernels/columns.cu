// Column sums, which gradients of norms' weights and of biases are: partial sums over runs of rows, and their fold.
//
//   *_dw: grid (ceil(dim / 64), parts), 256 threads; parts = leaves * ceil(leaf_rows / chunk): each is the sum of a run of
//     `chunk` rows, and none crosses leaves
//   sink_dw_*: the same of sinks, grid (all heads, parts): a head a block; of heads that others have the sum is 0
//   fold_columns: grid (ceil(dim / 32), 1 or 2), 256 threads, at most 64 leaves
#include "device.h"
#include "lanes.h"

constexpr int THREADS = 256, WARPS = THREADS / 32;
constexpr int COLUMNS = 64, ROW_LANES = THREADS / (COLUMNS / 8);

// What a part of a column sum covers: `count` rows from `first` on, none of another leaf.
struct Chunk {
  long long first;
  int count;
  __device__ __forceinline__ Chunk(int chunk, int leaf_rows) {
    int per_leaf = (leaf_rows + chunk - 1) / chunk;
    int leaf = (int)blockIdx.y / per_leaf, start = (int)blockIdx.y % per_leaf * chunk;
    first = (long long)leaf * leaf_rows + start;
    count = min(chunk, leaf_rows - start);
  }
};

// Adds up what the row lanes of a block have of its 64 columns. Every 8 threads hold a row's; each exchange halves the
// columns that a lane is left with.
__device__ __forceinline__ void sum_columns(const float (&sums)[8], float* slots, float* part, int dim) {
  int warp = (int)threadIdx.x / 32, lane = (int)threadIdx.x % 32;
  bool high = (lane & 8) != 0, odd = (lane & 16) != 0;
  float four[4], two[2];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    four[i] = (high ? sums[i + 4] : sums[i]) + __shfl_xor_sync(~0u, high ? sums[i] : sums[i + 4], 8);
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    two[i] = (odd ? four[i + 2] : four[i]) + __shfl_xor_sync(~0u, odd ? four[i] : four[i + 2], 16);
  }
  float* slot = slots + warp * COLUMNS + lane % 8 * 8 + (high ? 4 : 0) + (odd ? 2 : 0);
  slot[0] = two[0];
  slot[1] = two[1];
  if (FAULT != 3) __syncthreads();
  int column = (int)blockIdx.x * COLUMNS + (int)threadIdx.x;
  if (threadIdx.x < COLUMNS && column < dim) {
    float sum = slots[threadIdx.x];
#pragma unroll
    for (int i = 1; i < WARPS; ++i) sum += slots[i * COLUMNS + (int)threadIdx.x];
    part[(long long)blockIdx.y * dim + column] = sum;
  }
}

enum { BIAS = 1, RMS = 2, LAYER_NORM = 3 };

// Rows of x are `ld` elements apart, and their rstd `ld_rstd`.
template <class T, int KIND>
__device__ __forceinline__ void norm_dw(const T* dy, const T* x, int ld, const float* mean, const float* rstd,
                                        int ld_rstd, float* parts_w, float* parts_b, int dim, int chunk, int leaf_rows,
                                        float* slots) {
  Chunk rows(chunk, leaf_rows);
  int at = (int)blockIdx.x * COLUMNS + (int)threadIdx.x % 8 * 8;
  bool wide = dim % 8 == 0 && aligned16(dy) && (KIND == BIAS || (ld % 8 == 0 && aligned16(x)));
  float w[8] = {0, 0, 0, 0, 0, 0, 0, 0}, b[8] = {0, 0, 0, 0, 0, 0, 0, 0}, g[8], v[8];
  // Rows of a thread that are on their way together; one that is not there is all 0, and adds nothing.
  constexpr int BATCH = sizeof(T) == 2 || KIND == BIAS ? 4 : 2;
  for (int first = (int)threadIdx.x / 8; first < rows.count; first += BATCH * ROW_LANES) {
    Eight<T> gradients[BATCH], inputs[BATCH];
    float m[BATCH], r[BATCH];
#pragma unroll
    for (int k = 0; k < BATCH; ++k) {
      bool has = first + k * ROW_LANES < rows.count;
      long long row = rows.first + first + (has ? k * ROW_LANES : 0);
      gradients[k] = get8(dy + row * dim, at, has ? dim : 0, wide);
      if (KIND != BIAS) {
        inputs[k] = get8(x + row * ld, at, has ? dim : 0, wide);
        m[k] = KIND == LAYER_NORM ? mean[row] : 0.0f;
        r[k] = rstd[row * ld_rstd];
      }
    }
#pragma unroll
    for (int k = 0; k < BATCH; ++k) {
      gradients[k].unpack(g);
      if (KIND != BIAS) {
        inputs[k].unpack(v);
#pragma unroll
        for (int j = 0; j < 8; ++j) w[j] = fmaf(g[j], (v[j] - m[k]) * r[k], w[j]);
      }
      if (KIND != RMS) {
#pragma unroll
        for (int j = 0; j < 8; ++j) b[j] += g[j];
      }
    }
  }
  if (KIND != BIAS) sum_columns(w, slots, parts_w, dim);
  if (KIND != RMS) sum_columns(b, slots + WARPS * COLUMNS, parts_b, dim);
}

// The heads of a row count as rows that follow each other.
template <class T>
__device__ __forceinline__ void qk_norm_dw(const T* dy, const T* qkv, const float* rstd, float* parts_q, float* parts_k,
                                           int heads, int kv_heads, int dim, int chunk, int leaf_rows, float* slots) {
  Chunk rows(chunk, leaf_rows);
  int normed = heads + kv_heads, ld = normed + kv_heads;
  int column = (int)blockIdx.x * COLUMNS + (int)threadIdx.x % 8 * 8;
  bool wide = dim % 8 == 0 && aligned16(dy) && aligned16(qkv);
#pragma unroll 1
  for (int keys = 0; keys < 2; ++keys) {
    int first = keys ? heads : 0, count = keys ? kv_heads : heads;
    float sums[8] = {0, 0, 0, 0, 0, 0, 0, 0}, g[8], v[8];
#pragma unroll 4
    for (int i = (int)threadIdx.x / 8; i < rows.count * count; i += ROW_LANES) {
      long long row = rows.first + i / count;
      int head = first + i % count;
      long long at = (row * ld + head) * dim;
      get8(dy + at, column, dim, wide).unpack(g);
      get8(qkv + at, column, dim, wide).unpack(v);
      float r = rstd[row * normed + head];
#pragma unroll
      for (int j = 0; j < 8; ++j) sums[j] = fmaf(g[j], v[j] * r, sums[j]);
    }
    sum_columns(sums, slots + keys * (WARPS * COLUMNS), keys ? parts_k : parts_q, dim);
  }
}

// The gradient of a head's sink, over a run of rows: less its probability times the dot product of output and output
// gradient. A warp a row. `heads` of all are here, from `head0` on.
template <class T>
__device__ __forceinline__ void sink_dw(const T* d_o, const T* o, const float* lse, const T* sinks, float* parts,
                                        int sequence, int heads, int head0, int dim, int chunk, int leaf_rows,
                                        float* slots) {
  Chunk rows(chunk, leaf_rows);
  int head = (int)blockIdx.x - head0;
  float* to = parts + (long long)blockIdx.y * gridDim.x + blockIdx.x;
  if (head < 0 || head >= heads) {
    if (threadIdx.x == 0) *to = 0.0f;
    return;
  }
  int warp = (int)threadIdx.x / 32, lane = (int)threadIdx.x % 32;
  bool wide = dim % 8 == 0 && aligned16(o) && aligned16(d_o);
  float sink = as_f32(sinks[blockIdx.x]), sum = 0, g[8], v[8];
  for (int i = warp; i < rows.count; i += WARPS) {
    long long row = rows.first + i, at = (row * heads + head) * dim;
    float dot = 0;
    for (int column = lane * 8; column < dim; column += 32 * 8) {
      get8(d_o + at, column, dim, wide).unpack(g);
      get8(o + at, column, dim, wide).unpack(v);
#pragma unroll
      for (int j = 0; j < 8; ++j) dot = fmaf(g[j], v[j], dot);
    }
    float log = lse[(row / sequence * heads + head) * sequence + row % sequence];
    sum -= expf(sink - log) * warp_sum(dot);
  }
  if (lane == 0) slots[warp] = sum;
  if (FAULT != 34) __syncthreads();
  if (threadIdx.x == 0) {
    for (int i = 1; i < WARPS; ++i) sum += slots[i];
    *to = sum;
  }
}

// Loads of a thread that are on their way together.
constexpr int LOADS = 16;
constexpr int FOLDED = 32, MOST_LEAVES = 64;

// Sums the parts of each leaf, leaves by the tree, and brings the root to the gradient's levels. The second row of blocks
// does it for another gradient, whose parts follow those of the first.
extern "C" __global__ void __launch_bounds__(THREADS)
    fold_columns(const float* parts, int parts_per_leaf, int dim, float* levels_a, float* levels_b,
                 const __grid_constant__ Tree tree, int merge_a, int store_a, int merge_b, int store_b) {
  SHARED_ARRAY(float, sums, MOST_LEAVES * FOLDED);
  int warp = (int)threadIdx.x / 32, lane = (int)threadIdx.x % 32;
  int column = (int)blockIdx.x * FOLDED + lane, leaves = 1;
  for (int d = 0; d < tree.depth; ++d) leaves *= tree.radices[d];
  parts += (long long)blockIdx.y * leaves * parts_per_leaf * dim;
  bool second = blockIdx.y == 1;
  float* levels = (second ? levels_b : levels_a) + column;
  int merge = second ? merge_b : merge_a, store = second ? store_b : store_a;
  float held[4];
  // Every warp but the first only sums leaves.
  bool mine = warp == 0 && column < dim;
#pragma unroll
  for (int l = 0; l < 4; ++l) held[l] = mine && l < merge ? levels[(long long)l * dim] : 0.0f;
  for (int leaf = warp; leaf < leaves; leaf += WARPS) {
    const float* from = parts + (long long)leaf * parts_per_leaf * dim + column;
    // -0 is what adds nothing to any number.
    float sum = -0.0f;
    for (int first = 0; first < parts_per_leaf; first += LOADS) {
      float v[LOADS];
#pragma unroll
      for (int k = 0; k < LOADS; ++k) {
        v[k] = column < dim && first + k < parts_per_leaf ? from[(long long)(first + k) * dim] : -0.0f;
      }
#pragma unroll
      for (int k = 0; k < LOADS; ++k) sum += v[k];
    }
    sums[leaf * FOLDED + lane] = sum;
  }
  if (FAULT != 5) __syncthreads();
  if (!mine) return;
  float r = sum_tree<float>(tree, [&](int leaf) { return sums[leaf * FOLDED + lane]; });
#pragma unroll
  for (int l = 0; l < 4; ++l) r = l < merge ? held[l] + r : r;
  for (int l = 4; l < merge; ++l) r = levels[(long long)l * dim] + r;
  levels[(long long)store * dim] = r;
}

#define COLUMN_KERNELS(T, S)                                                                                         \
  extern "C" __global__ void __launch_bounds__(THREADS)                                                              \
      bias_dw_##S(const T* dy, float* parts, int dim, int chunk, int leaf_rows) {                                    \
    SHARED_ARRAY(float, slots, 1024);                                                                                \
    norm_dw<T, BIAS>(dy, nullptr, dim, nullptr, nullptr, 1, nullptr, parts, dim, chunk, leaf_rows, slots);           \
  }                                                                                                                  \
  extern "C" __global__ void __launch_bounds__(THREADS)                                                              \
      rms_norm_dw_##S(const T* dy, const T* x, const float* rstd, float* parts, int dim, int chunk, int leaf_rows) { \
    SHARED_ARRAY(float, slots, 512);                                                                                 \
    norm_dw<T, RMS>(dy, x, dim, nullptr, rstd, 1, parts, nullptr, dim, chunk, leaf_rows, slots);                     \
  }                                                                                                                  \
  extern "C" __global__ void __launch_bounds__(THREADS)                                                              \
      latent_norm_dw_##S(const T* dy, const T* x, int ld, const float* rstd, int ld_rstd, float* parts, int dim,     \
                         int chunk, int leaf_rows) {                                                                 \
    SHARED_ARRAY(float, slots, 512);                                                                                 \
    norm_dw<T, RMS>(dy, x, ld, nullptr, rstd, ld_rstd, parts, nullptr, dim, chunk, leaf_rows, slots);                \
  }                                                                                                                  \
  extern "C" __global__ void __launch_bounds__(THREADS)                                                              \
      layer_norm_dw_##S(const T* dy, const T* x, const float* stats, float* parts_w, float* parts_b, int n, int dim, \
                        int chunk, int leaf_rows) {                                                                  \
    SHARED_ARRAY(float, slots, 1024);                                                                                \
    norm_dw<T, LAYER_NORM>(dy, x, dim, stats, stats + n, 1, parts_w, parts_b, dim, chunk, leaf_rows, slots);         \
  }                                                                                                                  \
  extern "C" __global__ void __launch_bounds__(THREADS)                                                              \
      qk_norm_dw_##S(const T* dy, const T* qkv, const float* rstd, float* parts_q, float* parts_k, int heads,        \
                     int kv_heads, int dim, int chunk, int leaf_rows) {                                              \
    SHARED_ARRAY(float, slots, 1024);                                                                                \
    qk_norm_dw(dy, qkv, rstd, parts_q, parts_k, heads, kv_heads, dim, chunk, leaf_rows, slots);                      \
  }                                                                                                                  \
  extern "C" __global__ void __launch_bounds__(THREADS)                                                              \
      sink_dw_##S(const T* d_o, const T* o, const float* lse, const T* sinks, float* parts, int sequence, int heads, \
                  int head0, int dim, int chunk, int leaf_rows) {                                                    \
    SHARED_ARRAY(float, slots, WARPS);                                                                               \
    sink_dw(d_o, o, lse, sinks, parts, sequence, heads, head0, dim, chunk, leaf_rows, slots);                        \
  }

COLUMN_KERNELS(bf16, bf16)
COLUMN_KERNELS(float, f32)
