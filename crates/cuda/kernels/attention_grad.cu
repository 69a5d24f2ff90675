// The derivative of causal attention on tensor cores, without atomics: one kernel owns blocks of keys and sums over
// queries, the other owns blocks of queries and sums over keys. Scores are computed in both, which costs two of seven
// products, and for it every sum has one order.
//
//   attention_bwd_prep_bf16: grid ceil(tokens * heads / 32), 256 threads; before the other two
//   attention_bwd_dkv_bf16_d<D>: grid (ceil(sequence / KEYS) * SLICES, kv_heads, sequences)
//     D, V        16     32     64     80     96    128    256   96, 64   192, 128
//     KEYS       128    128    128    128    128    128     64      128         64
//     SLICES       1      1      1      1      1      1      2        1          1
//     THREADS    128    128    128    256    256    256    128      256        128
//     BYTES    25600  41984  66560  68096  80384  98816  98560    65024      84480
//   attention_bwd_dq_bf16_d<D>: grid (ceil(sequence / ROWS), heads, sequences)
//     ROWS       128    128    128    128    128    128     64      128         64
//     THREADS    128    128    128    128    128    128    128      128        128
//     BYTES    24576  40960  65536  67584  79872  98304  98304    64512      83968
//   the same with d<D>v<V> for values of another width
//   attention_bwd_dkv_seen_bf16_d<D>, attention_bwd_dq_seen_bf16_d<D>: the same within bounds (sight.h); the former has
//     SEEN_BYTES = BYTES + 4 * queries of all stages: 512 up to a width of 64, 256 up to 128, 128 beyond. Where
//     probabilities are left out the former has 8 * queries of all stages more, the latter 8 * ROWS.
#include "device.h"
#include "tiles.h"
#include "sight.h"

// delta[sequence, head, position] = o . d_o, over the rows of a launch, [tokens, heads * dim]: eight lanes a head.
extern "C" __global__ void __launch_bounds__(256)
    attention_bwd_prep_bf16(const bf16* __restrict__ o, const bf16* __restrict__ d_o, float* __restrict__ delta,
                            int tokens, int sequence, int heads, int dim) {
  long long pair = (long long)blockIdx.x * 32 + threadIdx.x / 8;
  int lane = threadIdx.x % 8;
  bool real = pair < (long long)tokens * heads;
  float sum = 0.0f;
  if (real) {
    for (int col = lane * 8; col < dim; col += 64) {
      uint4 a = *(const uint4*)(o + pair * dim + col), b = *(const uint4*)(d_o + pair * dim + col);
      const uint32_t x[4] = {a.x, a.y, a.z, a.w}, y[4] = {b.x, b.y, b.z, b.w};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        sum = fmaf(bf2f((bf16)x[i]), bf2f((bf16)y[i]), sum);
        sum = fmaf(bf2f((bf16)(x[i] >> 16)), bf2f((bf16)(y[i] >> 16)), sum);
      }
    }
  }
#pragma unroll
  for (int x = 1; x < 8; x *= 2) sum += __shfl_xor_sync(~0u, sum, x);
  if (real && lane == 0) {
    long long token = pair / heads;
    delta[(token / sequence * heads + pair % heads) * sequence + token % sequence] = sum;
  }
}

template <int D, int V = D> struct GradKeys {
  static constexpr int TILES = D <= 64 ? 2 : 1;  // of 16 keys, for a warp
  static constexpr int WARPS = D > 64 && D <= 128 ? 8 : 4, THREADS = WARPS * WARP;
  static constexpr int KEYS = WARPS * TILES * 16;
  static constexpr int QUERIES = D <= 64 ? 64 : 32;  // of a step
  static constexpr int STAGES = D <= 192 ? 2 : 1;
  static constexpr int SLICES = D <= 192 ? 1 : 2;
  static_assert(D == V || SLICES == 1, "slices of keys and of values are the same");
  // Columns of keys and of values that a block sums; the others are another block's.
  static constexpr int WIDTH = D / SLICES, VALUE_WIDTH = V / SLICES;
  static constexpr int BYTES = (KEYS + STAGES * QUERIES) * (Tile<D>::LD + Tile<V>::LD) * (int)sizeof(bf16) +
                               STAGES * 2 * QUERIES * (int)sizeof(float);
  static constexpr int SEEN_BYTES = BYTES + STAGES * QUERIES * (int)sizeof(int);
};

// A warp has its keys along the rows of all products, so that probabilities and their gradients go from one product to
// the next in registers. What probabilities that are kept are multiplied by waits for the end: it is a factor of all
// gradients, once it has divided what is taken off them.
template <int D, int V, bool BOUNDED>
__device__ __forceinline__ void attention_grad_keys(const bf16* qkv, const bf16* d_o, const float* lse,
                                                    const float* delta, bf16* dqkv, int sequence, int heads,
                                                    int kv_heads, float scale, Sight sight) {
  using G = GradKeys<D, V>;
  using T = Tile<D>;
  using U = Tile<V>;
  constexpr int OWN = G::TILES * 16, STEP = 32, LEN = G::QUERIES * T::LD, VALUE_LEN = G::QUERIES * U::LD;
  SHARED(bf16, shared);
  bf16* keys = shared;
  bf16* values = keys + G::KEYS * T::LD;
  bf16* queries = values + G::KEYS * U::LD;       // of each stage
  bf16* grads = queries + G::STAGES * LEN;        // of each stage
  float* logs = (float*)(grads + G::STAGES * VALUE_LEN);  // of each stage
  float* dots = logs + G::STAGES * G::QUERIES;    // of each stage
  int* seen = (int*)(dots + G::STAGES * G::QUERIES);  // the first key that each query sees, of each stage
  uint64_t* drawn = (uint64_t*)(seen + G::STAGES * G::QUERIES);  // where the draws of each query begin, of each stage
  bool drops = BOUNDED && sight.drops.any();

  Turn turn = take_turn(false);
  int first = turn.block / G::SLICES * G::KEYS;
  int slice = turn.block % G::SLICES * G::WIDTH, value_slice = V == D ? slice : 0;
  int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, own = first + warp * OWN;
  int group = heads / kv_heads;
  int ld = (heads + 2 * kv_heads) * D - kv_heads * (D - V), o_ld = heads * V;
  long long row = (long long)turn.sequence * sequence;
  const bf16* k = qkv + row * ld + (heads + turn.head) * D;

  // A step is a query head of the group and a block of queries; those before the block of keys see none of it.
  int from = first / G::QUERIES;
  int end = BOUNDED ? sight.end(turn.sequence, sequence, min(first + G::KEYS, sequence) - 1) : sequence;
  int blocks = (end + G::QUERIES - 1) / G::QUERIES - from;
  int steps = group * blocks;
  float next_log = 0.0f, next_dot = 0.0f;
  int next_seen = 0;
  auto fetch = [&](int step) {
    int head = turn.head * group + step / blocks, query = (from + step % blocks) * G::QUERIES;
    int at = G::STAGES == 2 ? (step & 1) * LEN : 0, value_at = G::STAGES == 2 ? (step & 1) * VALUE_LEN : 0;
    T::template fetch<G::QUERIES, G::THREADS>(queries + at, qkv + row * ld + head * D, ld, query, sequence);
    U::template fetch<G::QUERIES, G::THREADS>(grads + value_at, d_o + row * o_ld + head * V, o_ld, query, sequence);
    cp_async_commit();
    if (threadIdx.x < G::QUERIES) {
      int position = query + threadIdx.x;
      long long i = ((long long)turn.sequence * heads + head) * sequence + min(position, sequence - 1);
      // The exponential of minus infinity: queries past the end weigh nothing.
      next_log = position < sequence ? lse[i] * LOG2_E : INFINITY;
      next_dot = BOUNDED ? delta[i] / sight.drops.factor : delta[i];
      if (BOUNDED) next_seen = sight.first(turn.sequence, sequence, min(position, sequence - 1));
    }
  };
  auto keep = [&](int step) {
    if (threadIdx.x < G::QUERIES) {
      int at = (G::STAGES == 2 ? (step & 1) * G::QUERIES : 0) + threadIdx.x;
      logs[at] = next_log;
      dots[at] = next_dot;
      if (BOUNDED) seen[at] = next_seen;
      if (drops) {
        int head = turn.head * group + step / blocks, query = (from + step % blocks) * G::QUERIES;
        drawn[at] = sight.drops.row(turn.sequence, head, query + threadIdx.x);
      }
    }
  };
  T::template fetch<G::KEYS, G::THREADS>(keys, k, ld, first, sequence);
  U::template fetch<G::KEYS, G::THREADS>(values, k + kv_heads * D - turn.head * (D - V), ld, first, sequence);
  fetch(0);
  keep(0);

  int left = T::left(lane), right = T::right(lane);
  int value_left = V == D ? left : U::left(lane), value_right = V == D ? right : U::right(lane);
  const bf16* my_keys = keys + warp * OWN * T::LD;
  const bf16* my_values = values + warp * OWN * U::LD;
  float dk[G::TILES][G::WIDTH / 8][4] = {}, dv[G::TILES][G::VALUE_WIDTH / 8][4] = {};

#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    int stage = G::STAGES == 2 ? step & 1 : 0, query0 = (from + step % blocks) * G::QUERIES;
    cp_async_wait<0>();
    if (FAULT != 4) __syncthreads();  // this step's queries have landed, and nobody needs those of the step before
    if (G::STAGES == 2 && step + 1 < steps) fetch(step + 1);
#pragma unroll 1
    for (int sub = 0; sub < G::QUERIES; sub += STEP) {
      int query = query0 + sub;
      if (query + STEP <= own || query >= sequence || own >= sequence) continue;
      const bf16* q = queries + stage * LEN + sub * T::LD;
      const bf16* g = grads + stage * VALUE_LEN + sub * U::LD;
      const float* log = logs + stage * G::QUERIES + sub + 2 * (lane & 3);
      const float* dot = dots + stage * G::QUERIES + sub + 2 * (lane & 3);
      const int* lows = seen + stage * G::QUERIES + sub;
      if (BOUNDED && lows[0] >= own + OWN) continue;
      uint32_t kept = ~0u;  // 16 bits for each of the warp's tiles
      if (drops) {
        const uint64_t* rows = drawn + stage * G::QUERIES + sub;
        kept = 0;
#pragma unroll
        for (int t = 0; t < G::TILES; ++t) {
          kept |= kept_of_keys<STEP>(rows, own + t * 16, sight.drops.cut, lane) << 16 * t;
        }
      }
      float p[G::TILES][STEP / 8][4] = {}, ds[G::TILES][STEP / 8][4];
      add_dots<D, STEP>(p, my_keys, q, left, right);
      bool masked = query < own + OWN - 1;
#pragma unroll
      for (int n = 0; n < STEP / 8; ++n) {
        float2 l = *(const float2*)(log + n * 8), d = *(const float2*)(dot + n * 8);
#pragma unroll
        for (int t = 0; t < G::TILES; ++t) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            p[t][n][i] = exp2_fast(fmaf(p[t][n][i], scale * LOG2_E, i & 1 ? -l.y : -l.x));
            int key = own + t * 16 + (lane >> 2) + (i >> 1) * 8, position = query + n * 8 + 2 * (lane & 3) + (i & 1);
            if (masked && key > position - (FAULT == 6)) p[t][n][i] = 0.0f;
            if (FAULT != 33 && BOUNDED && key < lows[n * 8 + 2 * (lane & 3) + (i & 1)]) p[t][n][i] = 0.0f;
            // The sum below starts from what would be taken off it.
            ds[t][n][i] = i & 1 ? -d.y : -d.x;
          }
        }
      }
#pragma unroll
      for (int c = 0; c < STEP / 16; ++c) {
        uint32_t a[G::TILES][4];
#pragma unroll
        for (int t = 0; t < G::TILES; ++t) {
          as_left(a[t], p[t][2 * c], p[t][2 * c + 1]);
          if (BOUNDED) leave_out(a[t], kept >> (16 * t + 8 * c));
        }
        add_weighted<V, G::VALUE_WIDTH>(dv, a, g, value_left, c, value_slice);
      }
      add_dots<V, STEP>(ds, my_values, g, value_left, value_right);
      if (drops) {
#pragma unroll
        for (int n = 0; n < STEP / 8; ++n) {
          float2 d = *(const float2*)(dot + n * 8);
#pragma unroll
          for (int t = 0; t < G::TILES; ++t) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              if (FAULT != 39 && !(kept >> (16 * t + 4 * n + i) & 1)) ds[t][n][i] = i & 1 ? -d.y : -d.x;
            }
          }
        }
      }
#pragma unroll
      for (int c = 0; c < STEP / 16; ++c) {
        uint32_t a[G::TILES][4];
        as_grads(a, ds, p, c);
        add_weighted<D, G::WIDTH>(dk, a, q, left, c, slice);
      }
    }
    if (step + 1 < steps) {
      if (G::STAGES == 1) {
        __syncthreads();  // nobody needs this step's queries any more
        fetch(step + 1);
      }
      keep(step + 1);
    }
  }

  // A warp's rows of keys and values are its own; they turn its sums into whole rows.
  bf16* to = dqkv + (row + own) * ld + (heads + turn.head) * D + slice;
#pragma unroll
  for (int t = 0; t < G::TILES; ++t) {
    float factor = BOUNDED ? sight.drops.factor : 1.0f;
    T::template put<G::WIDTH>(keys + (warp * OWN + t * 16) * T::LD, dk[t], scale * factor, scale * factor, lane);
    U::template put<G::VALUE_WIDTH>(values + (warp * OWN + t * 16) * U::LD, dv[t], factor, factor, lane);
  }
  __syncwarp();
  T::template store<OWN, G::WIDTH>(my_keys, to, ld, sequence - own, lane);
  U::template store<OWN, G::VALUE_WIDTH>(my_values, to + kv_heads * D - turn.head * (D - V), ld, sequence - own, lane);
}

template <int D, int V = D> struct GradQueries {
  static constexpr int TILES = D <= 128 ? 2 : 1;  // of 16 queries, for a warp
  static constexpr int WARPS = 4, THREADS = WARPS * WARP;
  static constexpr int ROWS = WARPS * TILES * 16;
  static constexpr int KEYS = D <= 64 ? 64 : 32;  // of a step
  static constexpr int STAGES = D <= 192 ? 2 : 1;
  static constexpr int BYTES = (ROWS + STAGES * KEYS) * (Tile<D>::LD + Tile<V>::LD) * (int)sizeof(bf16);
};

template <int D, int V, bool BOUNDED>
__device__ __forceinline__ void attention_grad_queries(const bf16* qkv, const bf16* d_o, const float* lse,
                                                       const float* delta, bf16* dqkv, int sequence, int heads,
                                                       int kv_heads, float scale, Sight sight) {
  using G = GradQueries<D, V>;
  using T = Tile<D>;
  using U = Tile<V>;
  constexpr int OWN = G::TILES * 16, STEP = 32, LEN = G::KEYS * T::LD, VALUE_LEN = G::KEYS * U::LD;
  SHARED(bf16, shared);
  bf16* queries = shared;
  bf16* grads = queries + G::ROWS * T::LD;
  bf16* keys = grads + G::ROWS * U::LD;       // of each stage
  bf16* values = keys + G::STAGES * LEN;      // of each stage
  uint64_t* drawn = (uint64_t*)(values + G::STAGES * VALUE_LEN);  // where the draws of each query begin
  bool drops = BOUNDED && sight.drops.any();

  Turn turn = take_turn(true);
  int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
  int first = turn.block * G::ROWS, own = first + warp * OWN;
  int ld = (heads + 2 * kv_heads) * D - kv_heads * (D - V), o_ld = heads * V;
  int kv_head = turn.head / (heads / kv_heads);
  long long row = (long long)turn.sequence * sequence;
  const bf16* k = qkv + row * ld + (heads + kv_head) * D;
  const bf16* v = k + kv_heads * D - kv_head * (D - V);
  int steps = (min(first + G::ROWS, sequence) + G::KEYS - 1) / G::KEYS;
  int begin = BOUNDED ? sight.first(turn.sequence, sequence, first) / G::KEYS : 0;
  int nearest = BOUNDED ? sight.first(turn.sequence, sequence, min(own, sequence - 1)) : 0;

  auto fetch = [&](int step) {
    int at = G::STAGES == 2 ? (step & 1) * LEN : 0, value_at = G::STAGES == 2 ? (step & 1) * VALUE_LEN : 0;
    T::template fetch<G::KEYS, G::THREADS>(keys + at, k, ld, step * G::KEYS, sequence);
    U::template fetch<G::KEYS, G::THREADS>(values + value_at, v, ld, step * G::KEYS, sequence);
    cp_async_commit();
  };
  T::template fetch<G::ROWS, G::THREADS>(queries, qkv + row * ld + turn.head * D, ld, first, sequence);
  U::template fetch<G::ROWS, G::THREADS>(grads, d_o + row * o_ld + turn.head * V, o_ld, first, sequence);
  fetch(begin);

  int left = T::left(lane), right = T::right(lane);
  int value_left = V == D ? left : U::left(lane), value_right = V == D ? right : U::right(lane);
  bf16* my_queries = queries + warp * OWN * T::LD;
  const bf16* my_grads = grads + warp * OWN * U::LD;
  float acc[G::TILES][D / 8][4] = {};
  float log[G::TILES][2], dot[G::TILES][2];
  int seen[G::TILES][2] = {};
#pragma unroll
  for (int t = 0; t < G::TILES; ++t) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      int position = min(own + t * 16 + h * 8 + (lane >> 2), sequence - 1);
      long long i = ((long long)turn.sequence * heads + turn.head) * sequence + position;
      log[t][h] = -lse[i] * LOG2_E;
      dot[t][h] = BOUNDED ? -delta[i] / sight.drops.factor : -delta[i];
      if (BOUNDED) seen[t][h] = sight.first(turn.sequence, sequence, position);
    }
  }
  if (drops && threadIdx.x < G::ROWS) {
    drawn[threadIdx.x] = sight.drops.row(turn.sequence, turn.head, first + threadIdx.x);
  }

#pragma unroll 1
  for (int step = begin; step < steps; ++step) {
    int stage = G::STAGES == 2 ? step & 1 : 0;
    if (FAULT != 5 || step == begin) cp_async_wait<0>();
    __syncthreads();  // this step's keys have landed, and nobody needs those of the step before
    if (G::STAGES == 2 && step + 1 < steps) fetch(step + 1);
#pragma unroll 1
    for (int sub = 0; sub < G::KEYS; sub += STEP) {
      int key = step * G::KEYS + sub;
      if (key >= own + OWN || own >= sequence || (BOUNDED && key + STEP <= nearest)) continue;
      uint32_t kept = ~0u;  // 16 bits for each of the warp's tiles
      if (drops) {
        kept = 0;
#pragma unroll
        for (int t = 0; t < G::TILES; ++t) {
          kept |= kept_of_queries<STEP>(drawn + warp * OWN + t * 16, key, sight.drops.cut, lane) << 16 * t;
        }
      }
      const bf16* kt = keys + stage * LEN + sub * T::LD;
      const bf16* vt = values + stage * VALUE_LEN + sub * U::LD;
      float p[G::TILES][STEP / 8][4] = {}, ds[G::TILES][STEP / 8][4];
      add_dots<D, STEP>(p, my_queries, kt, left, right);
      bool masked = key + STEP > own + 1;
#pragma unroll
      for (int t = 0; t < G::TILES; ++t) {
#pragma unroll
        for (int n = 0; n < STEP / 8; ++n) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            p[t][n][i] = exp2_fast(fmaf(p[t][n][i], scale * LOG2_E, log[t][i >> 1]));
            int at = key + n * 8 + 2 * (lane & 3) + (i & 1), position = own + t * 16 + (i >> 1) * 8 + (lane >> 2);
            if (masked && at > position) p[t][n][i] = 0.0f;
            if (BOUNDED && at < seen[t][i >> 1]) p[t][n][i] = 0.0f;
            ds[t][n][i] = dot[t][i >> 1];
          }
        }
      }
      add_dots<V, STEP>(ds, my_grads, vt, value_left, value_right);
      if (drops) {
#pragma unroll
        for (int t = 0; t < G::TILES; ++t) {
#pragma unroll
          for (int n = 0; n < STEP / 8; ++n) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              if (!(kept >> (16 * t + 4 * n + i) & 1)) ds[t][n][i] = dot[t][i >> 1];
            }
          }
        }
      }
#pragma unroll
      for (int c = 0; c < STEP / 16; ++c) {
        uint32_t a[G::TILES][4];
        as_grads(a, ds, p, c);
        add_weighted<D, D>(acc, a, kt, left, c, 0);
      }
    }
    if (G::STAGES == 1 && step + 1 < steps) {
      __syncthreads();  // nobody needs this step's keys any more
      fetch(step + 1);
    }
  }

  // A warp's rows of the queries are its own; they turn its sums into whole rows.
#pragma unroll
  for (int t = 0; t < G::TILES; ++t) {
    float factor = BOUNDED ? scale * sight.drops.factor : scale;
    T::template put<D>(my_queries + t * 16 * T::LD, acc[t], factor, factor, lane);
  }
  __syncwarp();
  T::template store<OWN, D>(my_queries, dqkv + (row + own) * ld + turn.head * D, ld, sequence - own, lane);
}

#define GRAD(NAME, D, V)                                                                                           \
  extern "C" __global__ void __launch_bounds__(GradKeys<D, V>::THREADS, 256 / GradKeys<D, V>::THREADS)             \
      attention_bwd_dkv_bf16_##NAME(const bf16* __restrict__ qkv, const bf16* __restrict__ d_o,                    \
                                  const float* __restrict__ lse, const float* __restrict__ delta,                  \
                                  bf16* __restrict__ dqkv, int sequence, int heads, int kv_heads, float scale) {   \
    attention_grad_keys<D, V, false>(qkv, d_o, lse, delta, dqkv, sequence, heads, kv_heads, scale, ALL_BEFORE);    \
  }                                                                                                                \
  extern "C" __global__ void __launch_bounds__(GradQueries<D, V>::THREADS, 2)                                      \
      attention_bwd_dq_bf16_##NAME(const bf16* __restrict__ qkv, const bf16* __restrict__ d_o,                     \
                                 const float* __restrict__ lse, const float* __restrict__ delta,                   \
                                 bf16* __restrict__ dqkv, int sequence, int heads, int kv_heads, float scale) {    \
    attention_grad_queries<D, V, false>(qkv, d_o, lse, delta, dqkv, sequence, heads, kv_heads, scale, ALL_BEFORE); \
  }                                                                                                                \
  extern "C" __global__ void __launch_bounds__(GradKeys<D, V>::THREADS, 256 / GradKeys<D, V>::THREADS)             \
      attention_bwd_dkv_seen_bf16_##NAME(const bf16* __restrict__ qkv, const bf16* __restrict__ d_o,               \
                                       const float* __restrict__ lse, const float* __restrict__ delta,             \
                                       bf16* __restrict__ dqkv, int sequence, int heads, int kv_heads,             \
                                       float scale, Sight sight) {                                                 \
    attention_grad_keys<D, V, true>(qkv, d_o, lse, delta, dqkv, sequence, heads, kv_heads, scale, sight);          \
  }                                                                                                                \
  extern "C" __global__ void __launch_bounds__(GradQueries<D, V>::THREADS, 2)                                      \
      attention_bwd_dq_seen_bf16_##NAME(const bf16* __restrict__ qkv, const bf16* __restrict__ d_o,                \
                                      const float* __restrict__ lse, const float* __restrict__ delta,              \
                                      bf16* __restrict__ dqkv, int sequence, int heads, int kv_heads, float scale, \
                                      Sight sight) {                                                               \
    attention_grad_queries<D, V, true>(qkv, d_o, lse, delta, dqkv, sequence, heads, kv_heads, scale, sight);       \
  }
HEAD_WIDTHS(GRAD)
#undef GRAD
