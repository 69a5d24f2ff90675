// Cross-entropy over rows of logits, whole or split over shards of the vocabulary.
//
//   xent, xent_stats, xent_grad: grid rows, a block of 256 to 1024 threads (a multiple of 32) that is the same in every
//     launch, since the order of sums follows from it; xent_combine: a thread a row; loss_sum: one block of 1024; soft_cap: any
//     grid, 256 threads
// Whether 8 logits are read at once follows from the vocabulary alone and not from where a row starts: buffers start at
// multiples of 16 bytes.
#include "device.h"
#include "lanes.h"

constexpr uint32_t IGNORED = 0xffffffffu;

// Calls `body(v, at, count)` with up to 8 logits at `at`: neighbours where rows are a multiple of 8 long. Otherwise single
// ones, so that a warp's still are neighbours.
template <class T, class Body> __device__ __forceinline__ void each_logit(T* row, int vocab, Body body) {
  float v[8];
  if (vocab % 8 == 0) {
#pragma unroll 4
    for (int at = (int)threadIdx.x * 8; at < vocab; at += (int)blockDim.x * 8) {
      get8(row, at, vocab, true).unpack(v);
      body(v, at, 1);
    }
  } else {
    int step = (int)blockDim.x;
    for (int at = (int)threadIdx.x; at < vocab; at += 8 * step) {
#pragma unroll
      for (int i = 0; i < 8; ++i) v[i] = at + i * step < vocab ? as_f32(row[at + i * step]) : -INFINITY;
      body(v, at, step);
    }
  }
}

struct Stats {
  float max, sum, target;
};

// `slots` has 64 floats. The target's logit is read before anybody can pass the barriers in here.
template <class T>
__device__ __forceinline__ Stats stats_of(T* row, uint32_t target, int vocab0, int vocab, float* slots) {
  float most = -INFINITY, sum = 0;
  uint32_t at_target = target - (uint32_t)vocab0;
  bool here = target != IGNORED && target >= (uint32_t)vocab0 && at_target < (uint32_t)vocab;
  float logit = here ? as_f32(row[at_target]) : 0.0f;
  each_logit(row, vocab, [&](const float(&v)[8], int, int) {
    float top = v[0];
#pragma unroll
    for (int i = 1; i < 8; ++i) top = fmaxf(top, v[i]);
    if (top > most) {
      sum *= expf(most - top);
      most = top;
    }
    if (most == -INFINITY) return;
#pragma unroll
    for (int i = 0; i < 8; ++i) sum += expf(v[i] - most);
  });
  float max = block_max(most, slots);
  sum = most == -INFINITY ? 0.0f : sum * expf(most - max);
  return {max, block_sum(sum, slots + 32), logit};
}

// What the gradient has beside the cross-entropy's: `z` is the factor of the squared log-sum-exp of a row, and logits
// were squeezed to `1 / per_cap` (0: they were not). Without either, nothing is rounded otherwise.
struct Terms {
  float scale, z, per_cap;
};

// Writes (softmax - onehot) scale, and what `terms` has beside it, over the logits; gives the row's loss.
template <class T>
__device__ __forceinline__ float gradient(T* row, uint32_t target, int vocab0, int vocab, Stats s, Terms terms) {
  bool counts = target != IGNORED;
  float inverse = 1.0f / s.sum;
  // d/dx of z lse^2 is 2 z lse softmax(x).
  float more = 1.0f + 2.0f * terms.z * (FAULT == 30 ? logf(s.sum) : logf(s.sum) + s.max);
  uint32_t at_target = counts && target >= (uint32_t)vocab0 ? target - (uint32_t)vocab0 : IGNORED;
  each_logit(row, vocab, [&](const float(&v)[8], int at, int step) {
    float g[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      float p = expf(v[i] - s.max) * inverse * more, share = v[i] * terms.per_cap;
      if ((uint32_t)(at + i * step) == at_target) p -= 1.0f;
      g[i] = counts ? p * fmaf(-share, share, 1.0f) * terms.scale : 0.0f;
    }
    if (step == 1) {
      put8(row, at, vocab, true, g);
    } else {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        if (at + i * step < vocab) put_f32(row + at + i * step, g[i]);
      }
    }
  });
  return counts ? logf(s.sum) + (s.max - s.target) : 0.0f;
}

// Squeezes logits in place: cap tanh(x / cap).
template <class T> __device__ __forceinline__ void soft_cap(T* logits, long long len, float cap) {
  float inverse = 1.0f / cap;
  bool wide = len % 8 == 0;
  long long step = (long long)gridDim.x * blockDim.x * 8;
  for (long long at = ((long long)blockIdx.x * blockDim.x + threadIdx.x) * 8; at < len; at += step) {
    int rest = (int)min(len - at, 8LL);
    float v[8];
    get8(logits + at, 0, rest, wide).unpack(v);
#pragma unroll
    for (int i = 0; i < 8; ++i) v[i] = tanhf(v[i] * inverse) * cap;
    put8(logits + at, 0, rest, wide, v);
  }
}

#define LOSS_KERNELS(T, S)                                                                                        \
  extern "C" __global__ void xent_##S(T* logits, const uint32_t* targets, const Numbers* numbers, float* losses,  \
                                      int vocab, Terms terms) {                                                   \
    SHARED_ARRAY(float, slots, 64);                                                                               \
    T* row = logits + (long long)blockIdx.x * vocab;                                                              \
    uint32_t target = targets[blockIdx.x];                                                                        \
    Stats s = stats_of(row, target, 0, vocab, slots);                                                             \
    terms.scale *= numbers->loss_scale;                                                                           \
    float loss = gradient(row, target, 0, vocab, s, terms);                                                       \
    if (threadIdx.x == 0) losses[blockIdx.x] = loss;                                                              \
  }                                                                                                               \
  extern "C" __global__ void xent_stats_##S(const T* logits, const uint32_t* targets, int vocab0, float* stats,   \
                                            int vocab) {                                                          \
    SHARED_ARRAY(float, slots, 64);                                                                               \
    Stats s = stats_of(logits + (long long)blockIdx.x * vocab, targets[blockIdx.x], vocab0, vocab, slots);        \
    if (threadIdx.x == 0) {                                                                                       \
      float* to = stats + 3LL * blockIdx.x;                                                                       \
      to[0] = s.max, to[1] = s.sum, to[2] = s.target;                                                             \
    }                                                                                                             \
  }                                                                                                               \
  extern "C" __global__ void xent_grad_##S(T* logits, const uint32_t* targets, int vocab0, const float* stats,    \
                                           const Numbers* numbers, float* losses, int vocab, Terms terms) {       \
    const float* from = stats + 3LL * blockIdx.x;                                                                 \
    Stats s = {from[0], from[1], from[2]};                                                                        \
    terms.scale *= numbers->loss_scale;                                                                           \
    float loss = gradient(logits + (long long)blockIdx.x * vocab, targets[blockIdx.x], vocab0, vocab, s, terms);  \
    if (threadIdx.x == 0) losses[blockIdx.x] = loss;                                                              \
  }                                                                                                               \
  extern "C" __global__ void __launch_bounds__(256) soft_cap_##S(T* logits, long long len, float cap) {           \
    soft_cap(logits, len, cap);                                                                                   \
  }

LOSS_KERNELS(bf16, bf16)
LOSS_KERNELS(float, f32)

// Stats of shards, [shards, n, 3], become those of whole rows, [n, 3], in the order of the shards.
extern "C" __global__ void xent_combine(const float* stats, int shards, float* out, int n) {
  int row = (int)(blockIdx.x * blockDim.x + threadIdx.x);
  if (row >= n) return;
  float max = -INFINITY, sum = 0, target = 0;
  for (int s = 0; s < shards; ++s) max = fmaxf(max, stats[((long long)s * n + row) * 3]);
  for (int s = 0; s < shards; ++s) {
    const float* from = stats + ((long long)s * n + row) * 3;
    sum += from[1] * expf(from[0] - max);
    target += from[2];
  }
  float* to = out + 3LL * row;
  to[0] = max, to[1] = sum, to[2] = target;
}

extern "C" __global__ void __launch_bounds__(1024) loss_sum(const float* losses, double* out, int n) {
  SHARED_ARRAY(double, slots, 32);
  double sum = 0;
#pragma unroll 4
  for (int i = (int)threadIdx.x; i < n; i += (int)blockDim.x) sum += (double)losses[i];
  sum = block_sum(sum, slots);
  if (threadIdx.x == 0) *out = sum;
}
