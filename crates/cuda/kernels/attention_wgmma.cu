// Causal attention with grouped queries for sm_90a, forward (Shah et al. 2024, arXiv:2407.08608): one warpgroup has
// tiles brought by TMA, the others multiply with wgmma, each while another is at its exponentials. Layouts as in
// attention.cu.
//
//   attention_fwd_wgmma_bf16_d<D>: persistent: min(tiles, multiprocessors) blocks, tiles = ceil(sequence / ROWS) *
//     heads * sequences
//     D             64     128
//     ROWS         192     128
//     THREADS      512     384
//     BYTES      90240  163968
//   Its tensor map is of qkv as [sequences, sequence, (heads + 2 kv_heads) * D] bf16, boxes of 1 x 64 x 64, 128-byte
//   swizzle: what lies past the end of a sequence reads as 0.
#include "device.h"
#include "tiles_wgmma.h"

template <int D> struct ForwardWide {
  static constexpr int GROUPS = D == 64 ? 3 : 2;  // warpgroups that multiply, 64 queries each
  static constexpr int ROWS = 64 * GROUPS, KEYS = 128, STAGES = 2;
  static constexpr int THREADS = 128 * (GROUPS + 1);
  static constexpr int BYTES = (ROWS + 2 * STAGES * KEYS) * D * (int)sizeof(bf16) + 128;
};

// Barriers of a block: of each tile whether it has landed, and whether it may be overwritten.
template <int STAGES> struct Gates {
  uint64_t queries, queries_free;
  uint64_t keys[STAGES], keys_free[STAGES], values[STAGES], values_free[STAGES];
};

// The first part of a step of softmax over N columns: exponentials over the running maximum, and by what sums so far
// shrink; false if by nothing.
template <int N>
__device__ __forceinline__ bool exponentials(float (&s)[N / 8][4], float (&max)[2], float (&sum)[2],
                                             float (&factor)[2], float scale, bool masked, int position, int key) {
  if (masked) {
#pragma unroll
    for (int n = 0; n < N / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (key + n * 8 + (i & 1) > position + (i >> 1) * 8) s[n][i] = -INFINITY;
      }
    }
  }
  bool grew = false;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    float top = max[h];
#pragma unroll
    for (int n = 0; n < N / 8; ++n) top = fmaxf(top, fmaxf(s[n][2 * h], s[n][2 * h + 1]));
    top = fmaxf(top, __shfl_xor_sync(~0u, top, 1));
    top = fmaxf(top, __shfl_xor_sync(~0u, top, 2));
    factor[h] = exp2_fast((max[h] - top) * scale);
    grew |= top > max[h];
    max[h] = top;
    sum[h] *= factor[h];
    float low = top * scale;
#pragma unroll
    for (int n = 0; n < N / 8; ++n) {
#pragma unroll
      for (int i = 2 * h; i < 2 * h + 2; ++i) {
        s[n][i] = exp2_fast(fmaf(s[n][i], scale, -low));
        sum[h] += s[n][i];
      }
    }
  }
  return __any_sync(~0u, grew);
}

template <int D>
__device__ __forceinline__ void shrink(float (&o)[D / 8][4], const float (&factor)[2]) {
#pragma unroll
  for (int n = 0; n < D / 8; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) o[n][i] *= factor[i >> 1];
  }
}

template <int D>
__device__ __forceinline__ void attention_forward_wide(const TensorMap* map, bf16* o, float* lse, int sequences,
                                                       int sequence, int heads, int kv_heads, float scale) {
  using F = ForwardWide<D>;
  constexpr int LEN = F::KEYS * D;
  SHARED(bf16, shared);
  bf16* queries = shared;
  bf16* keys = queries + F::ROWS * D;
  bf16* values = keys + F::STAGES * LEN;
  Gates<F::STAGES>* gates = (Gates<F::STAGES>*)(values + F::STAGES * LEN);
  Tiles tiles(sequences, sequence, heads, F::ROWS);
  int lane = threadIdx.x % WARP, group = threadIdx.x / 128 - 1;

  if (threadIdx.x == 0) {
    mbarrier_init(&gates->queries, 1);
    mbarrier_init(&gates->queries_free, F::GROUPS * 4);
    for (int i = 0; i < F::STAGES; ++i) {
      mbarrier_init(&gates->keys[i], 1);
      mbarrier_init(&gates->keys_free[i], F::GROUPS * 4);
      mbarrier_init(&gates->values[i], 1);
      mbarrier_init(&gates->values_free[i], F::GROUPS * 4);
    }
    mbarrier_init_fence();
  }
  __syncthreads();

  uint32_t turns = 0, count = 0;  // of tiles, and of their blocks of keys, so far
  if (group < 0) {
    registers_down<D == 64 ? 32 : 24>();
    if (threadIdx.x != 0) return;
    for (int i = blockIdx.x; i < tiles.count; i += gridDim.x, ++turns) {
      Turn turn = tiles.at(i, true);
      int first = turn.block * F::ROWS, kv = heads + turn.head / (heads / kv_heads);
      int steps = (min(first + F::ROWS, sequence) + F::KEYS - 1) / F::KEYS;
      mbarrier_wait(&gates->queries_free, (turns & 1) ^ 1);
      mbarrier_expect(&gates->queries, F::ROWS * D * (int)sizeof(bf16));
      fetch_tile<F::ROWS, D>(queries, map, &gates->queries, turn.head * D, first, turn.sequence);
      for (int step = 0; step < steps; ++step, ++count) {
        uint32_t stage = count % F::STAGES, parity = (count / F::STAGES & 1) ^ 1;
        mbarrier_wait(&gates->keys_free[stage], parity);
        mbarrier_expect(&gates->keys[stage], LEN * (int)sizeof(bf16));
        fetch_tile<F::KEYS, D>(keys + stage * LEN, map, &gates->keys[stage], kv * D, step * F::KEYS, turn.sequence);
        mbarrier_wait(&gates->values_free[stage], parity);
        mbarrier_expect(&gates->values[stage], LEN * (int)sizeof(bf16));
        fetch_tile<F::KEYS, D>(values + stage * LEN, map, &gates->values[stage], (kv + kv_heads) * D, step * F::KEYS,
                               turn.sequence);
      }
    }
    return;
  }

  registers_up<D == 64 ? 160 : 240>();
  int warp = threadIdx.x / WARP % 4;
  const bf16* mine = queries + group * 64 * 64;
  // Groups take turns with the tensor cores: each waits for its own barrier, which the one before it opens.
  constexpr int TURNS = 1, OWN = 4;  // barriers by number
  int next = (group + 1) % F::GROUPS;
  if (group == F::GROUPS - 1) barrier_arrive(TURNS, 256);
  bool last = false;

  for (int i = blockIdx.x; i < tiles.count; i += gridDim.x, ++turns) {
    Turn turn = tiles.at(i, true);
    int first = turn.block * F::ROWS, own = first + group * 64 + warp * 16;
    int steps = (min(first + F::ROWS, sequence) + F::KEYS - 1) / F::KEYS;
    float acc[D / 8][4] = {}, s[F::KEYS / 8][4];
    float max[2] = {-INFINITY, -INFINITY}, sum[2] = {}, factor[2];
    uint32_t p[F::KEYS / 16][4];
    int row = own + (lane >> 2), col = 2 * (lane & 3);

    mbarrier_wait(&gates->queries, turns & 1);
    mbarrier_wait(&gates->keys[count % F::STAGES], count / F::STAGES & 1);
    barrier_sync(TURNS + group, 256);
    wgmma_fence();
    multiply_rows<D, F::KEYS>(s, mine, F::ROWS, keys + count % F::STAGES * LEN, F::KEYS, true);
    wgmma_commit();
    last = steps == 1 && i + (int)gridDim.x >= tiles.count && group == F::GROUPS - 1;
    if (!last) barrier_arrive(TURNS + next, 256);
    wgmma_wait<0>();
    if (lane == 0) mbarrier_arrive(&gates->keys_free[count % F::STAGES]);
    exponentials<F::KEYS>(s, max, sum, factor, scale * LOG2_E, F::KEYS > own + 1, row, col);
    as_lefts<F::KEYS>(p, s);

    for (int step = 1; step < steps; ++step) {
      uint32_t before = count++, stage = count % F::STAGES;
      mbarrier_wait(&gates->keys[stage], count / F::STAGES & 1);
      barrier_sync(TURNS + group, 256);
      wgmma_fence();
      multiply_rows<D, F::KEYS>(s, mine, F::ROWS, keys + stage * LEN, F::KEYS, true);
      wgmma_commit();
      mbarrier_wait(&gates->values[before % F::STAGES], before / F::STAGES & 1);
      wgmma_fence();
      multiply_columns<D, F::KEYS>(acc, p, values + before % F::STAGES * LEN, F::KEYS);
      wgmma_commit();
      last = step == steps - 1 && i + (int)gridDim.x >= tiles.count && group == F::GROUPS - 1;
      if (!last) barrier_arrive(TURNS + next, 256);
      if (FAULT != 7) wgmma_wait<1>();
      if (lane == 0) mbarrier_arrive(&gates->keys_free[stage]);
      int key = step * F::KEYS;
      bool grew = exponentials<F::KEYS>(s, max, sum, factor, scale * LOG2_E, key + F::KEYS > own + 1, row, key + col);
      stay_before(__float_as_int(sum[0]) | __float_as_int(sum[1]), gates);
      wgmma_wait<0>();
      if (lane == 0) mbarrier_arrive(&gates->values_free[before % F::STAGES]);
      if (grew) shrink<D>(acc, factor);
      as_lefts<F::KEYS>(p, s);
    }
    if (FAULT != 8) mbarrier_wait(&gates->values[count % F::STAGES], count / F::STAGES & 1);
    wgmma_fence();
    multiply_columns<D, F::KEYS>(acc, p, values + count % F::STAGES * LEN, F::KEYS);
    wgmma_commit();
    wgmma_wait<0>();
    if (lane == 0) mbarrier_arrive(&gates->values_free[count % F::STAGES]);
    ++count;

    float inverse[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float total = sum[h];
      total += __shfl_xor_sync(~0u, total, 1);
      total += __shfl_xor_sync(~0u, total, 2);
      inverse[h] = 1.0f / total;
      int position = row + h * 8;
      if ((lane & 3) == 0 && position < sequence) {
        lse[((long long)turn.sequence * heads + turn.head) * sequence + position] = max[h] * scale + logf(total);
      }
    }
    // The group's products have read all of its queries, which make room for its rows of the result.
    barrier_sync(OWN + group, 128);
    long long ld = heads * D;
    bf16* to = o + ((long long)turn.sequence * sequence + own) * ld + turn.head * D;
    write_rows<D>((bf16*)mine + warp * 16 * 64, F::ROWS, acc, inverse[0], inverse[1], to, ld, sequence - own, lane);
    async_fence();
    __syncwarp();
    if (lane == 0) mbarrier_arrive(&gates->queries_free);
  }
}

#define FORWARD(D)                                                                                               \
  extern "C" __global__ void __launch_bounds__(ForwardWide<D>::THREADS, 1) attention_fwd_wgmma_bf16_d##D(        \
      const __grid_constant__ TensorMap qkv, bf16* __restrict__ o, float* __restrict__ lse, int sequences,       \
      int sequence, int heads, int kv_heads, float scale) {                                                      \
    attention_forward_wide<D>(&qkv, o, lse, sequences, sequence, heads, kv_heads, scale);                        \
  }
FORWARD(64)
FORWARD(128)
#undef FORWARD
