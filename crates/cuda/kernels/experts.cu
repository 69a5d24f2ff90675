// Mixtures of experts beside their products (grouped.cu): the router, copies of rows in the order of their experts and
// back. A token's copies are added in the order of its choices, best first, and nothing is added atomically.
//
//   route_*, route_dx_*: grid ceil(rows / 4), 128 threads, a warp for each row
//     shared memory: 4 * (2 * experts + groups) * 4 bytes; or `scratch`, which has as much for each block
//   route_counts, then route_places: grid experts * leaves, 256 threads; route_load: grid ceil(experts / 256), 256 threads
//   group_starts: one block of 256
//   permute_*, permute_dx_*, unpermute_*: grid rows; unpermute_dx_*: grid rows * k; a block that follows from the row's
//     length as in rows.cu
//   balance_experts: grid layers, 256 threads
#include "device.h"
#include "lanes.h"

constexpr int ROUTED = 4;  // rows of a block

// What gates are of logits, as the host lays it out.
struct Router {
  int top_k, sigmoid, renormalise, groups, top_groups;
  float scale, balance, z;
};

// Keeps sums of sigmoids away from 0.
constexpr float TINY = 1e-20f;

// Scores of a row, and the logarithm of its sum of exponentials where they are a softmax. Each lane has every 32nd.
template <class T>
__device__ __forceinline__ float score(const T* logits, bool sigmoid, float* scores, int experts, int lane) {
  float most = -INFINITY, sum = 0.0f;
  if (sigmoid) {
    for (int e = lane; e < experts; e += 32) scores[e] = 1.0f / (1.0f + expf(-as_f32(logits[e])));
    __syncwarp();
    return 0.0f;
  }
  for (int e = lane; e < experts; e += 32) most = fmaxf(most, as_f32(logits[e]));
  most = warp_max(most);
  for (int e = lane; e < experts; e += 32) sum += scores[e] = expf(as_f32(logits[e]) - most);
  sum = warp_sum(sum);
  for (int e = lane; e < experts; e += 32) scores[e] /= sum;
  __syncwarp();
  return most + logf(sum);
}

// Puts all experts of all but the best groups behind the rest. A group is as good as its two best together.
__device__ __forceinline__ void leave_groups(const Router& r, float* rank, float* good, int experts, int lane) {
  int size = experts / r.groups;
  for (int g = lane; g < r.groups; g += 32) {
    float first = -INFINITY, second = -INFINITY;
    for (int e = g * size; e < (g + 1) * size; ++e) {
      if (rank[e] > first) second = first, first = rank[e];
      else if (rank[e] > second) second = rank[e];
    }
    good[g] = size == 1 ? first : first + second;
  }
  __syncwarp();
  for (int e = lane; e < experts; e += 32) {
    int group = e / size, better = 0;
    for (int o = 0; o < r.groups; ++o) better += good[o] > good[group] || (good[o] == good[group] && o < group);
    if (better >= r.top_groups) rank[e] = -INFINITY;
  }
  __syncwarp();
}

// The first expert that is not among the `count` chosen.
__device__ __forceinline__ int first_free(const uint32_t* chosen, int count) {
  for (int e = 0;; ++e) {
    bool taken = false;
    for (int j = 0; j < count; ++j) taken |= chosen[j] == (uint32_t)e;
    if (!taken) return e;
  }
}

// The best experts, best first; of those that are equally good the first.
__device__ __forceinline__ void choose(const Router& r, float* rank, uint32_t* chosen, int experts, int lane) {
  for (int j = 0; j < r.top_k; ++j) {
    float best = -INFINITY;
    int at = experts;
    for (int e = lane; e < experts; e += 32) {
      if (rank[e] > best) best = rank[e], at = e;
    }
#pragma unroll
    for (int bits = 16; bits > 0; bits >>= 1) {
      float other = __shfl_xor_sync(~0u, best, bits);
      int from = __shfl_xor_sync(~0u, at, bits);
      bool first = FAULT == 50 ? from > at && from < experts : from < at;
      if (other > best || (other == best && first)) best = other, at = from;
    }
    if (at == experts) at = first_free(chosen, j);
    __syncwarp();
    if (lane == 0) chosen[j] = (uint32_t)at, rank[at] = -INFINITY;
    __syncwarp();
  }
}

template <class T>
__device__ __forceinline__ void route(const T* logits, const float* bias, float* gates, uint32_t* index, int rows,
                                      int experts, const Router& r, float* shared) {
  int warp = (int)threadIdx.x / 32, lane = (int)threadIdx.x % 32, row = (int)blockIdx.x * ROUTED + warp, k = r.top_k;
  if (row >= rows) return;
  float *scores = shared + warp * (2 * experts + r.groups), *rank = scores + experts;
  score(logits + (long long)row * experts, r.sigmoid, scores, experts, lane);
  for (int e = lane; e < experts; e += 32) {
    float x = bias ? scores[e] + bias[e] : scores[e];
    // What is no number is worst.
    rank[e] = x == x ? x : -INFINITY;
  }
  __syncwarp();
  if (r.groups > 1) leave_groups(r, rank, rank + experts, experts, lane);
  uint32_t* chosen = index + (2LL * row + 1) * k;
  choose(r, rank, chosen, experts, lane);
  float sum = 0.0f;
  for (int j = 0; j < k; ++j) sum += scores[chosen[j]];
  sum = r.renormalise ? sum + TINY : 1.0f;
  for (int j = lane; j < k; j += 32) gates[(long long)row * k + j] = scores[chosen[j]] / sum * r.scale;
}

// How many rows of each run go to each expert: counts [experts, leaves].
extern "C" __global__ void __launch_bounds__(256)
    route_counts(const uint32_t* index, uint32_t* counts, int k, int leaves, int leaf_rows) {
  SHARED_ARRAY(int, slots, 32);
  uint32_t expert = (uint32_t)blockIdx.x / (uint32_t)leaves;
  long long row0 = (long long)((int)blockIdx.x % leaves) * leaf_rows;
  int count = 0;
  for (int i = (int)threadIdx.x; i < leaf_rows * k; i += (int)blockDim.x) {
    count += index[(2 * (row0 + i / k) + 1) * k + i % k] == expert;
  }
  count = block_sum(count, slots);
  if (threadIdx.x == 0) counts[blockIdx.x] = (uint32_t)count;
}

// Gives every copy its place in the order of (expert, row).
extern "C" __global__ void __launch_bounds__(256)
    route_places(uint32_t* index, const uint32_t* counts, int k, int leaves, int leaf_rows) {
  SHARED_ARRAY(int, slots, 32);
  SHARED_ARRAY(int, before, 8);
  uint32_t expert = (uint32_t)blockIdx.x / (uint32_t)leaves;
  long long row0 = (long long)((int)blockIdx.x % leaves) * leaf_rows;
  int warp = (int)threadIdx.x / 32, lane = (int)threadIdx.x % 32, next = 0;
  for (int i = (int)threadIdx.x; i < (int)blockIdx.x; i += (int)blockDim.x) next += (int)counts[i];
  next = block_sum(next, slots);
  for (int base = 0; base < leaf_rows; base += 256) {
    int row = base + (int)threadIdx.x, slot = -1;
    uint32_t* of = index + 2 * (row0 + row) * k;
    for (int j = 0; j < k && row < leaf_rows; ++j) {
      if (of[k + j] == expert) slot = j;
    }
    uint32_t mine = __ballot_sync(~0u, slot >= 0);
    if (lane == 0) before[warp] = __popc(mine);
    if (FAULT != 51) __syncthreads();
    int place = next + __popc(mine & ((1u << lane) - 1));
    for (int w = 0; w < 8; ++w) {
      place += w < warp ? before[w] : 0;
      next += before[w];
    }
    if (slot >= 0) of[slot] = (uint32_t)place;
    __syncthreads();
  }
}

template <class T>
__device__ __forceinline__ void route_dx(const float* dgates, const T* logits, const uint32_t* index,
                                         const uint32_t* counts, T* dlogits, int rows, int experts, int leaves,
                                         const Router& r, float* shared) {
  int warp = (int)threadIdx.x / 32, lane = (int)threadIdx.x % 32, row = (int)blockIdx.x * ROUTED + warp, k = r.top_k;
  if (row >= rows) return;
  float *scores = shared + warp * (2 * experts + r.groups), *slope = scores + experts;
  const T* of = logits + (long long)row * experts;
  float lse = score(of, r.sigmoid, scores, experts, lane);
  // Of the gates: only what was chosen has a gradient.
  const uint32_t* chosen = index + (2LL * row + 1) * k;
  const float* dgate = dgates + (long long)row * k;
  for (int e = lane; e < experts; e += 32) slope[e] = 0.0f;
  float sum = 1.0f, mean = 0.0f;
  if (r.renormalise) {
    sum = 0.0f;
    for (int j = 0; j < k; ++j) sum += scores[chosen[j]], mean += dgate[j] * scores[chosen[j]];
    sum += TINY, mean /= sum;
  }
  __syncwarp();
  for (int j = lane; j < k; j += 32) slope[chosen[j]] = (dgate[j] - mean) / sum * r.scale;
  __syncwarp();
  // Through the scores. From here on a lane meets its own experts alone.
  float through = 0.0f, whole = 0.0f, even = 0.0f;
  for (int e = lane; e < experts; e += 32) through += slope[e] * scores[e], whole += scores[e];
  through = warp_sum(through);
  int leaf_rows = rows / leaves;
  float share = r.balance * experts / (float)(k * leaf_rows) / leaf_rows;
  auto load = [&](int e) { return share * (float)counts[e * leaves + row / leaf_rows]; };
  if (r.balance != 0.0f) {
    whole = r.sigmoid ? warp_sum(whole) + TINY : 1.0f;
    for (int e = lane; e < experts; e += 32) even += load(e) * scores[e];
    even = warp_sum(even) / whole;
  }
  for (int e = lane; e < experts; e += 32) {
    float p = scores[e], d = r.sigmoid ? slope[e] * (p * (1.0f - p)) : p * (slope[e] - through);
    if (r.balance != 0.0f) d += (r.sigmoid ? p * (1.0f - p) / whole : p) * (load(e) - even);
    slope[e] = d;
  }
  if (r.z != 0.0f) {
    // Sigmoids say nothing of the sum of exponentials; they are used up.
    if (r.sigmoid) lse = score(of, false, scores, experts, lane);
    for (int e = lane; e < experts; e += 32) slope[e] += 2.0f * r.z * lse * scores[e];
  }
  for (int e = lane; e < experts; e += 32) put_f32(dlogits + (long long)row * experts + e, slope[e]);
}

// Room for the scores of a block's rows.
__device__ __forceinline__ float* own_scratch(float* scratch, float* shared, int experts, int groups) {
  return scratch ? scratch + (long long)blockIdx.x * ROUTED * (2 * experts + groups) : shared;
}

#define ROUTE_KERNELS(T, S)                                                                                          \
  extern "C" __global__ void __launch_bounds__(128)                                                                  \
      route_##S(const T* logits, const float* bias, float* gates, uint32_t* index, int rows, int experts,            \
                float* scratch, const __grid_constant__ Router router) {                                             \
    SHARED(float, shared);                                                                                           \
    route(logits, bias, gates, index, rows, experts, router, own_scratch(scratch, shared, experts, router.groups));  \
  }                                                                                                                  \
  extern "C" __global__ void __launch_bounds__(128)                                                                  \
      route_dx_##S(const float* dgates, const T* logits, const uint32_t* index, const uint32_t* counts, T* dlogits,  \
                   int rows, int experts, int leaves, float* scratch, const __grid_constant__ Router router) {       \
    SHARED(float, shared);                                                                                           \
    route_dx(dgates, logits, index, counts, dlogits, rows, experts, leaves, router,                                  \
             own_scratch(scratch, shared, experts, router.groups));                                                  \
  }
ROUTE_KERNELS(bf16, bf16)
ROUTE_KERNELS(float, f32)

// Adds a micro-batch's counts to those of the step.
extern "C" __global__ void __launch_bounds__(256)
    route_load(double* sums, const uint32_t* counts, int experts, int leaves) {
  int e = (int)(blockIdx.x * blockDim.x + threadIdx.x);
  if (e >= experts) return;
  double sum = 0;
  for (int leaf = 0; leaf < leaves; ++leaf) sum += counts[e * leaves + leaf];
  sums[e] += sum;
}

// Where each unit's rows begin, and its tiles of so many rows: see groups.h.
extern "C" __global__ void __launch_bounds__(256)
    group_starts(const uint32_t* counts, int* starts, int units, int leaves, int tile_rows) {
  int* tiles = starts + units + 1;
  for (int e = (int)threadIdx.x; e < units; e += (int)blockDim.x) {
    int sum = 0;
    for (int leaf = 0; leaf < leaves; ++leaf) sum += (int)counts[e * leaves + leaf];
    starts[e] = sum;
  }
  __syncthreads();
  if (threadIdx.x != 0) return;
  int row = 0, tile = 0;
  for (int e = 0; e <= units; ++e) {
    int count = e < units ? starts[e] : 0;
    starts[e] = row, tiles[e] = tile;
    row += count, tile += (count + tile_rows - 1) / tile_rows;
  }
}

// Copies of a row at the places of its choices.
template <class T> __device__ __forceinline__ void permute(const T* x, const uint32_t* index, T* copies, int k, int dim) {
  const T* row = x + (long long)blockIdx.x * dim;
  const uint32_t* places = index + 2LL * blockIdx.x * k;
  bool wide = dim % 8 == 0 && aligned16(x) && aligned16(copies);
  for (int at = (int)threadIdx.x * 8; at < dim; at += (int)blockDim.x * 8) {
    float v[8];
    get8(row, at, dim, wide).unpack(v);
    for (int j = 0; j < k; ++j) put8(copies + (long long)places[j] * dim, at, dim, wide, v);
  }
}

// y = acc + the sum over a row's copies, each times its gate if there are gates, in the order of its choices.
template <class T>
__device__ __forceinline__ void sum_copies(const T* copies, const float* gates, const uint32_t* index, const T* acc,
                                           T* y, int k, int dim) {
  long long row = blockIdx.x;
  const uint32_t* places = index + 2 * row * k;
  bool wide = dim % 8 == 0 && aligned16(copies) && aligned16(y) && aligned16(acc);
  for (int at = (int)threadIdx.x * 8; at < dim; at += (int)blockDim.x * 8) {
    float sums[8] = {}, v[8];
    for (int j = 0; j < k; ++j) {
      int slot = FAULT == 52 ? k - 1 - j : j;
      get8(copies + (long long)places[slot] * dim, at, dim, wide).unpack(v);
      float gate = gates ? gates[row * k + slot] : 0.0f;
#pragma unroll
      for (int i = 0; i < 8; ++i) sums[i] = gates ? fmaf(gate, v[i], sums[i]) : sums[i] + v[i];
    }
    if (acc) {
      get8(acc + row * dim, at, dim, wide).unpack(v);
#pragma unroll
      for (int i = 0; i < 8; ++i) sums[i] = v[i] + sums[i];
    }
    put8(y + row * dim, at, dim, wide, sums);
  }
}

// Gradients of one copy and of its gate.
template <class T>
__device__ __forceinline__ void unpermute_dx(const T* dy, const T* copies, const float* gates, const uint32_t* index,
                                             T* dcopies, float* dgates, int k, int dim, float* slots) {
  long long row = blockIdx.x / k, slot = blockIdx.x % k, place = index[2 * row * k + slot];
  float gate = gates[row * k + slot], dot = 0.0f;
  bool wide = dim % 8 == 0 && aligned16(dy) && aligned16(copies) && aligned16(dcopies);
  for (int at = (int)threadIdx.x * 8; at < dim; at += (int)blockDim.x * 8) {
    float d[8], c[8];
    get8(dy + row * dim, at, dim, wide).unpack(d);
    get8(copies + place * dim, at, dim, wide).unpack(c);
#pragma unroll
    for (int i = 0; i < 8; ++i) dot = fmaf(d[i], c[i], dot), c[i] = gate * d[i];
    put8(dcopies + place * dim, at, dim, wide, c);
  }
  dot = block_sum(dot, slots);
  if (threadIdx.x == 0) dgates[row * k + slot] = dot;
}

#define PERMUTE_KERNELS(T, S)                                                                                        \
  extern "C" __global__ void __launch_bounds__(256)                                                                  \
      permute_##S(const T* x, const uint32_t* index, T* copies, int k, int dim) {                                    \
    permute(x, index, copies, k, dim);                                                                               \
  }                                                                                                                  \
  extern "C" __global__ void __launch_bounds__(256)                                                                  \
      sum_copies_##S(const T* copies, const float* gates, const uint32_t* index, const T* acc, T* y, int k, int dim) { \
    sum_copies(copies, gates, index, acc, y, k, dim);                                                                \
  }                                                                                                                  \
  extern "C" __global__ void __launch_bounds__(256)                                                                  \
      unpermute_dx_##S(const T* dy, const T* copies, const float* gates, const uint32_t* index, T* dcopies,          \
                       float* dgates, int k, int dim) {                                                              \
    SHARED_ARRAY(float, slots, 32);                                                                                  \
    unpermute_dx(dy, copies, gates, index, dcopies, dgates, k, dim, slots);                                          \
  }
PERMUTE_KERNELS(bf16, bf16)
PERMUTE_KERNELS(float, f32)

// Moves the biases of a layer's experts: up where counts, which are whole numbers, are below their mean.
extern "C" __global__ void __launch_bounds__(256)
    balance_experts(const double* counts, float* bias, int experts, float rate) {
  SHARED_ARRAY(double, slots, 32);
  const double* of = counts + (long long)blockIdx.x * experts;
  double all = 0;
  for (int e = (int)threadIdx.x; e < experts; e += (int)blockDim.x) all += of[e];
  all = block_sum(all, slots);
  for (int e = (int)threadIdx.x; e < experts; e += (int)blockDim.x) {
    double less = all - of[e] * experts;
    float* to = bias + (long long)blockIdx.x * experts + e;
    if (less > 0) *to += rate;
    if (less < 0) *to -= rate;
  }
}
