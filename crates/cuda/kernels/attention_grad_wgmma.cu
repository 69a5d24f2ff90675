// The derivative of causal attention for sm_90a, in two kernels as in attention_grad.cu, whose attention_bwd_prep_bf16
// comes before them: one warpgroup has tiles brought by TMA, the others multiply with wgmma.
//
//   attention_bwd_dkv_wgmma_bf16_d<D>: persistent: min(tiles, multiprocessors) blocks, tiles = ceil(sequence / 128) *
//     kv_heads * sequences
//     D             64     128
//     THREADS      384     384
//     BYTES      83584  165504
//   attention_bwd_dq_wgmma_bf16_d<D>: persistent, tiles = ceil(sequence / 128) * heads * sequences
//     D             64     128
//     THREADS      384     384
//     BYTES      82048  163968
//   Tensor maps are of qkv as [sequences, sequence, (heads + 2 kv_heads) * D] bf16 and of d_o as [sequences, sequence,
//   heads * D] bf16, both with boxes of 1 x 64 x 64 and 128-byte swizzle.
#include "device.h"
#include "tiles_wgmma.h"

template <int D> struct GradWide {
  static constexpr int GROUPS = 2;  // warpgroups that multiply, 64 rows each
  static constexpr int ROWS = 64 * GROUPS, STEP = 64, STAGES = 3;
  static constexpr int THREADS = 128 * (GROUPS + 1);
  static constexpr int BYTES = (ROWS + STAGES * STEP) * 2 * D * (int)sizeof(bf16) + 128;
  static constexpr int KEYS_BYTES = BYTES + STAGES * 2 * STEP * (int)sizeof(float);
};

// Barriers of a block: whether its own rows have landed, and may be overwritten; the same of what it goes over.
template <int STAGES> struct GradGates {
  uint64_t own, own_free, full[STAGES], free[STAGES];
  __device__ __forceinline__ void start(int groups) {
    if (threadIdx.x == 0) {
      mbarrier_init(&own, 1);
      mbarrier_init(&own_free, groups * 4);
      for (int i = 0; i < STAGES; ++i) {
        mbarrier_init(&full[i], 1);
        mbarrier_init(&free[i], groups * 4);
      }
      mbarrier_init_fence();
    }
    __syncthreads();
  }
};

template <int D>
__device__ __forceinline__ void attention_grad_keys_wide(const TensorMap* qkv, const TensorMap* d_o, const float* lse,
                                                         const float* delta, bf16* dqkv, int sequences, int sequence,
                                                         int heads, int kv_heads, float scale) {
  using G = GradWide<D>;
  constexpr int LEN = G::STEP * D;
  SHARED(bf16, shared);
  bf16* keys = shared;
  bf16* values = keys + G::ROWS * D;
  bf16* queries = values + G::ROWS * D;       // of each stage
  bf16* grads = queries + G::STAGES * LEN;    // of each stage
  float* logs = (float*)(grads + G::STAGES * LEN);  // of each stage
  float* dots = logs + G::STAGES * G::STEP;   // of each stage
  auto* gates = (GradGates<G::STAGES>*)(dots + G::STAGES * G::STEP);
  Tiles tiles(sequences, sequence, kv_heads, G::ROWS);
  int lane = threadIdx.x % WARP, group = threadIdx.x / 128 - 1, shared_by = heads / kv_heads;
  int all = (sequence + G::STEP - 1) / G::STEP;
  gates->start(G::GROUPS);

  uint32_t turns = 0, count = 0;  // of tiles, and of their steps, so far
  if (group < 0) {
    registers_down<24>();
    if (threadIdx.x >= WARP) return;
    for (int i = blockIdx.x; i < tiles.count; i += gridDim.x, ++turns) {
      Turn turn = tiles.at(i, false);
      int first = turn.block * G::ROWS, blocks = all - first / G::STEP;
      mbarrier_wait(&gates->own_free, (turns & 1) ^ 1);
      if (lane == 0) {
        mbarrier_expect(&gates->own, 2 * G::ROWS * D * (int)sizeof(bf16));
        fetch_tile<G::ROWS, D>(keys, qkv, &gates->own, (heads + turn.head) * D, first, turn.sequence);
        fetch_tile<G::ROWS, D>(values, qkv, &gates->own, (heads + kv_heads + turn.head) * D, first, turn.sequence);
      }
      for (int step = 0; step < shared_by * blocks; ++step, ++count) {
        int head = turn.head * shared_by + step / blocks, query = first + step % blocks * G::STEP;
        uint32_t stage = count % G::STAGES;
        if (FAULT != 9) mbarrier_wait(&gates->free[stage], (count / G::STAGES & 1) ^ 1);
        long long at = ((long long)turn.sequence * heads + head) * sequence;
        for (int q = lane; q < G::STEP; q += WARP) {
          bool real = query + q < sequence;
          // The exponential of minus infinity: queries past the end weigh nothing.
          logs[stage * G::STEP + q] = real ? lse[at + query + q] * LOG2_E : INFINITY;
          dots[stage * G::STEP + q] = real ? delta[at + query + q] : 0.0f;
        }
        __syncwarp();
        if (lane == 0) {
          mbarrier_expect(&gates->full[stage], 2 * LEN * (int)sizeof(bf16));
          fetch_tile<G::STEP, D>(queries + stage * LEN, qkv, &gates->full[stage], head * D, query, turn.sequence);
          fetch_tile<G::STEP, D>(grads + stage * LEN, d_o, &gates->full[stage], head * D, query, turn.sequence);
        }
      }
    }
    return;
  }

  registers_up<240>();
  int warp = threadIdx.x / WARP % 4;
  const bf16* my_keys = keys + group * 64 * 64;
  const bf16* my_values = values + group * 64 * 64;
  constexpr int OWN = 1;  // barriers by number
  for (int i = blockIdx.x; i < tiles.count; i += gridDim.x, ++turns) {
    Turn turn = tiles.at(i, false);
    int first = turn.block * G::ROWS, own = first + group * 64 + warp * 16, blocks = all - first / G::STEP;
    int key = own + (lane >> 2), col = 2 * (lane & 3);
    float dk[D / 8][4] = {}, dv[D / 8][4] = {}, p[G::STEP / 8][4], ds[G::STEP / 8][4];
    uint32_t left[G::STEP / 16][4], left_ds[G::STEP / 16][4];
    mbarrier_wait(&gates->own, turns & 1);
    for (int step = 0; step < shared_by * blocks; ++step, ++count) {
      uint32_t stage = count % G::STAGES;
      int query = first + step % blocks * G::STEP;
      const bf16* q = queries + stage * LEN;
      const bf16* g = grads + stage * LEN;
      mbarrier_wait(&gates->full[stage], count / G::STAGES & 1);
      wgmma_fence();
      multiply_rows<D, G::STEP>(p, my_keys, G::ROWS, q, G::STEP, true);
      wgmma_commit();
      multiply_rows<D, G::STEP>(ds, my_values, G::ROWS, g, G::STEP, true);
      wgmma_commit();
      wgmma_wait<1>();  // for p
      bool masked = query < own + 15;
#pragma unroll
      for (int n = 0; n < G::STEP / 8; ++n) {
        float2 log = *(const float2*)(logs + stage * G::STEP + n * 8 + col);
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          p[n][e] = exp2_fast(fmaf(p[n][e], scale * LOG2_E, e & 1 ? -log.y : -log.x));
          if (masked && key + (e >> 1) * 8 > query + n * 8 + col + (e & 1)) p[n][e] = 0.0f;
        }
      }
      as_lefts<G::STEP>(left, p);
      wgmma_fence();
      multiply_columns<D, G::STEP>(dv, left, g, G::STEP);
      wgmma_commit();
      wgmma_wait<1>();  // for ds
#pragma unroll
      for (int n = 0; n < G::STEP / 8; ++n) {
        float2 dot = *(const float2*)(dots + stage * G::STEP + n * 8 + col);
#pragma unroll
        for (int e = 0; e < 4; ++e) ds[n][e] = p[n][e] * (ds[n][e] - (e & 1 ? dot.y : dot.x));
      }
      as_lefts<G::STEP>(left_ds, ds);
      wgmma_fence();
      multiply_columns<D, G::STEP>(dk, left_ds, q, G::STEP);
      wgmma_commit();
      // Nothing goes on over the end of a step: there are no registers for it. The other group multiplies meanwhile.
      wgmma_wait<0>();
      // All lanes have read the stage's logarithms and dots.
      __syncwarp();
      if (lane == 0) mbarrier_arrive(&gates->free[stage]);
    }

    // The group's products have read all of its keys and values, which make room for its rows of the result.
    barrier_sync(OWN + group, 128);
    long long ld = (heads + 2 * kv_heads) * D;
    bf16* to = dqkv + ((long long)turn.sequence * sequence + own) * ld + (heads + turn.head) * D;
    write_rows<D>(keys + (group * 64 + warp * 16) * 64, G::ROWS, dk, scale, scale, to, ld, sequence - own, lane);
    write_rows<D>(values + (group * 64 + warp * 16) * 64, G::ROWS, dv, 1.0f, 1.0f, to + kv_heads * D, ld,
                  sequence - own, lane);
    async_fence();
    __syncwarp();
    if (lane == 0) mbarrier_arrive(&gates->own_free);
  }
}

template <int D>
__device__ __forceinline__ void attention_grad_queries_wide(const TensorMap* qkv, const TensorMap* d_o,
                                                            const float* lse, const float* delta, bf16* dqkv,
                                                            int sequences, int sequence, int heads, int kv_heads,
                                                            float scale) {
  using G = GradWide<D>;
  constexpr int LEN = G::STEP * D;
  SHARED(bf16, shared);
  bf16* queries = shared;
  bf16* grads = queries + G::ROWS * D;
  bf16* keys = grads + G::ROWS * D;         // of each stage
  bf16* values = keys + G::STAGES * LEN;    // of each stage
  auto* gates = (GradGates<G::STAGES>*)(values + G::STAGES * LEN);
  Tiles tiles(sequences, sequence, heads, G::ROWS);
  int lane = threadIdx.x % WARP, group = threadIdx.x / 128 - 1;
  gates->start(G::GROUPS);

  uint32_t turns = 0, count = 0;  // of tiles, and of their steps, so far
  if (group < 0) {
    registers_down<24>();
    if (threadIdx.x != 0) return;
    for (int i = blockIdx.x; i < tiles.count; i += gridDim.x, ++turns) {
      Turn turn = tiles.at(i, true);
      int first = turn.block * G::ROWS, kv = heads + turn.head / (heads / kv_heads);
      int steps = (min(first + G::ROWS, sequence) + G::STEP - 1) / G::STEP;
      if (FAULT != 10) mbarrier_wait(&gates->own_free, (turns & 1) ^ 1);
      mbarrier_expect(&gates->own, 2 * G::ROWS * D * (int)sizeof(bf16));
      fetch_tile<G::ROWS, D>(queries, qkv, &gates->own, turn.head * D, first, turn.sequence);
      fetch_tile<G::ROWS, D>(grads, d_o, &gates->own, turn.head * D, first, turn.sequence);
      for (int step = 0; step < steps; ++step, ++count) {
        uint32_t stage = count % G::STAGES;
        uint64_t* full = &gates->full[stage];
        mbarrier_wait(&gates->free[stage], (count / G::STAGES & 1) ^ 1);
        mbarrier_expect(full, 2 * LEN * (int)sizeof(bf16));
        fetch_tile<G::STEP, D>(keys + stage * LEN, qkv, full, kv * D, step * G::STEP, turn.sequence);
        fetch_tile<G::STEP, D>(values + stage * LEN, qkv, full, (kv + kv_heads) * D, step * G::STEP, turn.sequence);
      }
    }
    return;
  }

  registers_up<240>();
  int warp = threadIdx.x / WARP % 4;
  const bf16* my_queries = queries + group * 64 * 64;
  const bf16* my_grads = grads + group * 64 * 64;
  constexpr int OWN = 1;  // barriers by number
  for (int i = blockIdx.x; i < tiles.count; i += gridDim.x, ++turns) {
    Turn turn = tiles.at(i, true);
    int first = turn.block * G::ROWS, own = first + group * 64 + warp * 16;
    int steps = (min(first + G::ROWS, sequence) + G::STEP - 1) / G::STEP;
    int row = own + (lane >> 2), col = 2 * (lane & 3);
    float dq[D / 8][4] = {}, p[G::STEP / 8][4], ds[G::STEP / 8][4];
    uint32_t left[G::STEP / 16][4];
    float log[2], dot[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      long long at = ((long long)turn.sequence * heads + turn.head) * sequence + min(row + h * 8, sequence - 1);
      log[h] = -lse[at] * LOG2_E;
      dot[h] = delta[at];
    }
    mbarrier_wait(&gates->own, turns & 1);
    for (int step = 0; step < steps; ++step, ++count) {
      uint32_t stage = count % G::STAGES;
      int key = step * G::STEP;
      mbarrier_wait(&gates->full[stage], count / G::STAGES & 1);
      wgmma_fence();
      multiply_rows<D, G::STEP>(p, my_queries, G::ROWS, keys + stage * LEN, G::STEP, true);
      wgmma_commit();
      multiply_rows<D, G::STEP>(ds, my_grads, G::ROWS, values + stage * LEN, G::STEP, true);
      wgmma_commit();
      wgmma_wait<1>();  // for p, and for all of the step before
      if (step > 0 && lane == 0) mbarrier_arrive(&gates->free[(count + G::STAGES - 1) % G::STAGES]);
      bool masked = key + G::STEP > own + 1;
      int bits = 0;
#pragma unroll
      for (int n = 0; n < G::STEP / 8; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          p[n][e] = exp2_fast(fmaf(p[n][e], scale * LOG2_E, log[e >> 1]));
          if (masked && key + n * 8 + col + (e & 1) > row + (e >> 1) * 8) p[n][e] = 0.0f;
          bits |= __float_as_int(p[n][e]);
        }
      }
      stay_before(bits, gates);
      wgmma_wait<0>();  // for ds
#pragma unroll
      for (int n = 0; n < G::STEP / 8; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) ds[n][e] = p[n][e] * (ds[n][e] - dot[e >> 1]);
      }
      as_lefts<G::STEP>(left, ds);
      wgmma_fence();
      multiply_columns<D, G::STEP>(dq, left, keys + stage * LEN, G::STEP);
      wgmma_commit();
    }
    wgmma_wait<0>();
    if (lane == 0) mbarrier_arrive(&gates->free[(count + G::STAGES - 1) % G::STAGES]);

    // The group's products have read all of its queries, which make room for its rows of the result.
    barrier_sync(OWN + group, 128);
    long long ld = (heads + 2 * kv_heads) * D;
    bf16* to = dqkv + ((long long)turn.sequence * sequence + own) * ld + turn.head * D;
    write_rows<D>(queries + (group * 64 + warp * 16) * 64, G::ROWS, dq, scale, scale, to, ld, sequence - own, lane);
    async_fence();
    __syncwarp();
    if (lane == 0) mbarrier_arrive(&gates->own_free);
  }
}

#define GRAD(D)                                                                                                   \
  extern "C" __global__ void __launch_bounds__(GradWide<D>::THREADS, 1) attention_bwd_dkv_wgmma_bf16_d##D(        \
      const __grid_constant__ TensorMap qkv, const __grid_constant__ TensorMap d_o, const float* __restrict__ lse, \
      const float* __restrict__ delta, bf16* __restrict__ dqkv, int sequences, int sequence, int heads,           \
      int kv_heads, float scale) {                                                                                \
    attention_grad_keys_wide<D>(&qkv, &d_o, lse, delta, dqkv, sequences, sequence, heads, kv_heads, scale);       \
  }                                                                                                               \
  extern "C" __global__ void __launch_bounds__(GradWide<D>::THREADS, 1) attention_bwd_dq_wgmma_bf16_d##D(         \
      const __grid_constant__ TensorMap qkv, const __grid_constant__ TensorMap d_o, const float* __restrict__ lse, \
      const float* __restrict__ delta, bf16* __restrict__ dqkv, int sequences, int sequence, int heads,           \
      int kv_heads, float scale) {                                                                                \
    attention_grad_queries_wide<D>(&qkv, &d_o, lse, delta, dqkv, sequences, sequence, heads, kv_heads, scale);    \
  }
GRAD(64)
GRAD(128)
#undef GRAD
