// Causal attention with grouped queries on tensor cores, forward (Dao 2023, arXiv:2307.08691), and attention of one
// token over a cache. Layouts are those of the host's CPU kernels: a row of qkv holds `heads` query heads, `kv_heads`
// key heads, all of D elements, and `kv_heads` value heads of V; o is [tokens, heads * V]; lse is [sequences, heads,
// sequence], natural logarithms of the softmax's denominators.
//
//   attention_fwd_bf16_d<D>: grid (ceil(sequence / ROWS), heads, sequences), THREADS threads, BYTES of shared memory
//     D, and V where it is another   16     32     64     80     96    128    256   96, 64   192, 128
//     ROWS                          128    128    128    128    128    128     64      128        128
//     THREADS                       128    128    128    128    128    128    128      128        128
//     BYTES                       12288  20480  32768  45056  53248  65536  65536    48128      93184
//   attention_fwd_bf16_d<D>v<V>: the same for values of another width
//   attention_fwd_seen_bf16_d<D>: the same within bounds (sight.h): keys that no query of a block sees are not read.
//     Where probabilities are left out it has 8 * ROWS bytes more.
//   attention_decode_<T>: grid heads, 256 threads, no dynamic shared memory; head widths: multiples of 8 up to 256
//
// Keys are taken in ascending order in blocks that depend on positions alone, so that the bits of a sequence depend on
// nothing beside it.
#include "device.h"
#include "tiles.h"
#include "sight.h"

template <int D, int V = D> struct Forward {
  static_assert(V <= D, "outputs take the place of queries");
  static constexpr int TILES = D <= 192 ? 2 : 1;  // of 16 rows, for a warp: each row of keys it reads serves them all
  static constexpr int WARPS = 4, THREADS = WARPS * WARP;
  static constexpr int ROWS = WARPS * TILES * 16;  // queries of a block
  static constexpr int KEYS = D <= 192 ? 64 : 32;  // of a step
  static constexpr bool HELD = D <= 64;            // are a warp's queries held in registers?
  static constexpr int BYTES = ((ROWS + KEYS) * Tile<D>::LD + KEYS * Tile<V>::LD) * (int)sizeof(bf16);
};

template <int D, int V, bool BOUNDED>
__device__ __forceinline__ void attention_forward(const bf16* qkv, bf16* o, float* lse, int sequence, int heads,
                                                  int kv_heads, float scale, Sight sight) {
  using F = Forward<D, V>;
  using T = Tile<D>;
  using U = Tile<V>;
  constexpr int OWN = F::TILES * 16;
  SHARED(bf16, shared);
  bf16* queries = shared;
  bf16* keys = queries + F::ROWS * T::LD;
  bf16* values = keys + F::KEYS * T::LD;
  uint64_t* drawn = (uint64_t*)(values + F::KEYS * U::LD);  // where the draws of each query begin
  bool drops = BOUNDED && sight.drops.any();

  Turn turn = take_turn(true);
  int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
  int first = turn.block * F::ROWS, own = first + warp * OWN;
  int ld = (heads + 2 * kv_heads) * D - kv_heads * (D - V), kv_head = turn.head / (heads / kv_heads);
  const bf16* rows = qkv + (long long)turn.sequence * sequence * ld;
  const bf16* k = rows + (heads + kv_head) * D;
  const bf16* v = k + kv_heads * D - kv_head * (D - V);
  int steps = (min(first + F::ROWS, sequence) + F::KEYS - 1) / F::KEYS;
  // The first key that rows see: of the block, the warp, and the lane's own rows.
  int begin = BOUNDED ? sight.first(turn.sequence, sequence, first) / F::KEYS : 0;
  int nearest = BOUNDED ? sight.first(turn.sequence, sequence, min(own, sequence - 1)) : 0;
  int seen[F::TILES][2] = {};
  if (BOUNDED) {
#pragma unroll
    for (int i = 0; i < F::TILES * 2; ++i) {
      int position = min(own + i * 8 + (lane >> 2), sequence - 1);
      seen[i / 2][i % 2] = sight.first(turn.sequence, sequence, position);
    }
    if (drops && threadIdx.x < F::ROWS) {
      drawn[threadIdx.x] = sight.drops.row(turn.sequence, turn.head, first + threadIdx.x);
    }
  }

  T::template fetch<F::ROWS, F::THREADS>(queries, rows + turn.head * D, ld, first, sequence);
  T::template fetch<F::KEYS, F::THREADS>(keys, k, ld, begin * F::KEYS, sequence);
  cp_async_commit();

  bf16* mine = queries + warp * OWN * T::LD;
  int left = T::left(lane), right = T::right(lane), value_left = V == D ? left : U::left(lane);
  uint32_t held[F::HELD ? D / 16 : 1][F::TILES][4];
  if (F::HELD) {
    cp_async_wait<0>();
    __syncthreads();
#pragma unroll
    for (int c = 0; c < (F::HELD ? D / 16 : 1); ++c) {
#pragma unroll
      for (int t = 0; t < F::TILES; ++t) ldmatrix_x4(held[c][t], mine + T::move(left, t * 16, c * 2));
    }
  }
  float acc[F::TILES][V / 8][4] = {};
  float max[F::TILES][2], sum[F::TILES][2] = {};
#pragma unroll
  for (int t = 0; t < F::TILES; ++t) max[t][0] = max[t][1] = -INFINITY;

#pragma unroll 1
  for (int step = begin; step < steps; ++step) {
    // Without bounds the first block has a key that every query sees, so maxima are finite from there on.
    int key = step * F::KEYS;
    bool sees = own < sequence && key < own + OWN && (!BOUNDED || key + F::KEYS > nearest);
    cp_async_wait<0>();
    __syncthreads();  // the keys have landed, and nobody needs the values before
    U::template fetch<F::KEYS, F::THREADS>(values, v, ld, key, sequence);
    cp_async_commit();

    uint32_t kept[F::TILES];
#pragma unroll
    for (int t = 0; t < F::TILES; ++t) {
      kept[t] = ~0u;
      if (drops && sees) {
        kept[t] = kept_of_queries<F::KEYS>(drawn + warp * OWN + t * 16, key, sight.drops.cut, lane);
      }
    }
    float s[F::TILES][F::KEYS / 8][4] = {};
    if (sees) {
#pragma unroll
      for (int c = 0; c < D / 16; ++c) {
        uint32_t a[F::TILES][4];
#pragma unroll
        for (int t = 0; t < F::TILES; ++t) {
          if (!F::HELD) ldmatrix_x4(a[t], mine + T::move(left, t * 16, c * 2));
        }
#pragma unroll
        for (int n = 0; n < F::KEYS / 16; ++n) {
          uint32_t b[4];
          ldmatrix_x4(b, keys + T::move(right, n * 16, c * 2));
#pragma unroll
          for (int t = 0; t < F::TILES; ++t) mma_pair(s[t][2 * n], s[t][2 * n + 1], F::HELD ? held[F::HELD ? c : 0][t] : a[t], b);
        }
      }
    }
    FAULT == 1 ? cp_async_wait<1>() : cp_async_wait<0>();
    if (FAULT != 2) __syncthreads();  // the values have landed, and nobody needs the keys any more
    if (step + 1 < steps) {
      T::template fetch<F::KEYS, F::THREADS>(keys, k, ld, key + F::KEYS, sequence);
      cp_async_commit();
    }
    if (sees) {
      uint32_t p[F::TILES][F::KEYS / 16][4];
#pragma unroll
      for (int t = 0; t < F::TILES; ++t) {
        softmax<F::KEYS, V, BOUNDED>(s[t], acc[t], max[t], sum[t], scale * LOG2_E, key + F::KEYS > own + 1,
                                     own + t * 16 + (lane >> 2), key + 2 * (lane & 3), seen[t]);
#pragma unroll
        for (int c = 0; c < F::KEYS / 16; ++c) {
          as_left(p[t][c], s[t][2 * c], s[t][2 * c + 1]);
          if (BOUNDED) leave_out(p[t][c], kept[t] >> 8 * c);
        }
      }
#pragma unroll
      for (int c = 0; c < F::KEYS / 16; ++c) {
#pragma unroll
        for (int n = 0; n < V / 16; ++n) {
          uint32_t b[4];
          ldmatrix_x4_trans(b, values + U::move(value_left, c * 16, n * 2));
#pragma unroll
          for (int t = 0; t < F::TILES; ++t) mma_pair(acc[t][2 * n], acc[t][2 * n + 1], p[t][c], b);
        }
      }
    }
  }

  // A warp's rows of the queries are its own by now; they turn its sums into whole rows.
  turn = take_turn(true, true);
#pragma unroll
  for (int t = 0; t < F::TILES; ++t) {
    float inverse[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float total = sum[t][h];
      total += __shfl_xor_sync(~0u, total, 1);
      total += __shfl_xor_sync(~0u, total, 2);
      int position = own + t * 16 + h * 8 + (lane >> 2);
      bool writes = (lane & 3) == 0 && position < sequence;
      float top = max[t][h] * scale, factor = 1.0f;
      long long at = ((long long)turn.sequence * heads + turn.head) * sequence + position;
      if (BOUNDED) {
        if (writes && sight.maxima) sight.maxima[at] = top;
        factor = with_sink(top, total, sight.sinks ? bf2f(((const bf16*)sight.sinks)[turn.head]) : -INFINITY);
      }
      inverse[h] = BOUNDED ? factor / total * sight.drops.factor : factor / total;
      if (writes) lse[at] = top + logf(total);
    }
    T::template put<V>(mine + t * 16 * T::LD, acc[t], inverse[0], inverse[1], lane);
  }
  __syncwarp();
  int o_ld = heads * V;
  bf16* to = o + ((long long)turn.sequence * sequence + own) * o_ld + turn.head * V;
  T::template store<OWN, V>(mine, to, o_ld, sequence - own, lane);
}

#define FORWARD(NAME, D, V)                                                                                        \
  extern "C" __global__ void __launch_bounds__(Forward<D, V>::THREADS, 2)                                          \
      attention_fwd_bf16_##NAME(const bf16* __restrict__ qkv, bf16* __restrict__ o, float* __restrict__ lse,       \
                                int sequence, int heads, int kv_heads, float scale) {                              \
    attention_forward<D, V, false>(qkv, o, lse, sequence, heads, kv_heads, scale, ALL_BEFORE);                     \
  }                                                                                                                \
  extern "C" __global__ void __launch_bounds__(Forward<D, V>::THREADS, 2)                                          \
      attention_fwd_seen_bf16_##NAME(const bf16* __restrict__ qkv, bf16* __restrict__ o, float* __restrict__ lse,  \
                                     int sequence, int heads, int kv_heads, float scale, Sight sight) {            \
    attention_forward<D, V, true>(qkv, o, lse, sequence, heads, kv_heads, scale, sight);                           \
  }
HEAD_WIDTHS(FORWARD)
#undef FORWARD

// One token: its keys and values join the cache at `position` (at `*at` if given, which a captured launch can change),
// then each query head attends over all up to it. Eight lanes share a key; each such team goes over every TEAMS-th key
// with a running maximum, and the teams' sums are added in order.
constexpr int DECODE_THREADS = 256, TEAM = 8, TEAMS = DECODE_THREADS / TEAM, MOST_CHUNKS = 256 / (8 * TEAM);

template <class T>
__device__ __forceinline__ void attention_decode(const T* qkv, T* keys, T* values, T* o, const int* at, int position,
                                                 int heads, int kv_heads, int dim, float scale, Sight sight) {
  SHARED_ARRAY(float, sums, TEAMS * 256);
  SHARED_ARRAY(float, maxima, TEAMS);
  SHARED_ARRAY(float, totals, TEAMS);
  int head = blockIdx.x, group = heads / kv_heads, kv = head / group;
  int team = threadIdx.x / TEAM, lane = threadIdx.x % TEAM;
  if (at) position = *at;
  const T* q = qkv + head * dim;
  const T* new_key = qkv + (heads + kv) * dim;
  const T* new_value = new_key + kv_heads * dim;
  long long ld = kv_heads * dim;
  if (head % group == 0) {
    for (int i = threadIdx.x; i < dim; i += DECODE_THREADS) {
      keys[position * ld + kv * dim + i] = new_key[i];
      values[position * ld + kv * dim + i] = new_value[i];
    }
  }
  float query[MOST_CHUNKS][8], acc[MOST_CHUNKS][8] = {};
#pragma unroll
  for (int c = 0; c < MOST_CHUNKS; ++c) {
    int col = (c * TEAM + lane) * 8;
#pragma unroll
    for (int i = 0; i < 8; ++i) query[c][i] = col < dim ? as_f32(q[col + i]) : 0.0f;
  }
  float max = -INFINITY, total = 0.0f;
  // All lanes of a warp go the same number of rounds, since they exchange parts of dot products.
  int begin = sight.window > 0 && position >= sight.window ? position + 1 - sight.window : 0;
  for (int base = begin; base <= position; base += TEAMS) {
    int i = base + team;
    bool real = i <= position;
    // The token's own rows are read where they came from: other blocks may not have seen the cache's yet.
    const T* key = i < position ? keys + i * ld + kv * dim : new_key;
    const T* value = i < position ? values + i * ld + kv * dim : new_value;
    float dot = 0.0f;
#pragma unroll
    for (int c = 0; c < MOST_CHUNKS; ++c) {
      int col = (c * TEAM + lane) * 8;
      if (col < dim) {
#pragma unroll
        for (int e = 0; e < 8; ++e) dot = fmaf(query[c][e], as_f32(key[col + e]), dot);
      }
    }
#pragma unroll
    for (int x = 1; x < TEAM; x *= 2) dot += __shfl_xor_sync(~0u, dot, x);
    if (real) {
      float score = dot * scale, top = fmaxf(max, score);
      float shrink = expf(max - top), p = expf(score - top);
      max = top;
      total = fmaf(total, shrink, p);
#pragma unroll
      for (int c = 0; c < MOST_CHUNKS; ++c) {
        int col = (c * TEAM + lane) * 8;
        if (col < dim) {
#pragma unroll
          for (int e = 0; e < 8; ++e) acc[c][e] = fmaf(p, as_f32(value[col + e]), acc[c][e] * shrink);
        }
      }
    }
  }
#pragma unroll
  for (int c = 0; c < MOST_CHUNKS; ++c) {
    int col = (c * TEAM + lane) * 8;
    if (col < dim) {
#pragma unroll
      for (int e = 0; e < 8; ++e) sums[team * 256 + col + e] = acc[c][e];
    }
  }
  if (lane == 0) maxima[team] = max, totals[team] = total;
  __syncthreads();
  float top = maxima[0];
  for (int t = 1; t < TEAMS; ++t) top = fmaxf(top, maxima[t]);
  for (int col = threadIdx.x; col < dim; col += DECODE_THREADS) {
    float sum = 0.0f, weight = 0.0f;
    for (int t = 0; t < TEAMS && begin + t <= position; ++t) {
      float factor = expf(maxima[t] - top);
      weight = fmaf(totals[t], factor, weight);
      sum = fmaf(sums[t * 256 + col], factor, sum);
    }
    if (sight.sinks) weight += expf(as_f32(((const T*)sight.sinks)[head]) - top);
    put_f32(o + head * dim + col, sum / weight);
  }
}

extern "C" __global__ void __launch_bounds__(DECODE_THREADS)
    attention_decode_bf16(const bf16* qkv, bf16* keys, bf16* values, bf16* o, const int* at, int position, int heads,
                          int kv_heads, int dim, float scale, Sight sight) {
  attention_decode<bf16>(qkv, keys, values, o, at, position, heads, kv_heads, dim, scale, sight);
}

extern "C" __global__ void __launch_bounds__(DECODE_THREADS)
    attention_decode_f32(const float* qkv, float* keys, float* values, float* o, const int* at, int position, int heads,
                         int kv_heads, int dim, float scale, Sight sight) {
  attention_decode<float>(qkv, keys, values, o, at, position, heads, kv_heads, dim, scale, sight);
}
