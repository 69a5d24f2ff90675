// AdamW and the norm of gradients, with the operations of the host's CPU kernels in their order and each rounded: no
// product is fused with a sum.
//
//   sum_squares: a block of 256 threads for each 4096 elements; sum_f64: one block of 1024
//   adamw_*: any grid, 256 threads
//   average, swap_average_*: any grid, 256 threads
//   sum_squares_all, adamw_all: the same of many tensors in one launch, a block for each 4096 elements of one of them
#include "device.h"
#include "lanes.h"

constexpr int NORM_CHUNK = 4096, UPDATE_CHUNK = 4096;

// Which of the tensors the block works on: the last one whose first block is not after it. `of` has them in order.
template <class Of> __device__ __forceinline__ const Of& mine(const Of* of, int count) {
  int found = 0;
  for (int base = 0; base < count; base += 32) {
    int i = base + (int)threadIdx.x % 32;
    found += __popc(__ballot_sync(~0u, i < count && of[i].first_block <= (long long)blockIdx.x));
  }
  return of[found - 1];
}

// Sums the squares of the chunk from `first` on.
__device__ __forceinline__ void sum_chunk(const float* x, double* to, long long first, long long len, double* slots) {
  double sum = 0;
#pragma unroll
  for (int k = 0; k < NORM_CHUNK / 1024; ++k) {
    long long at = first + (k * 256 + (int)threadIdx.x) * 4;
    float v[4] = {0, 0, 0, 0};
    if (at + 4 <= len && aligned16(x)) {
      float4 q = *(const float4*)(x + at);
      v[0] = q.x, v[1] = q.y, v[2] = q.z, v[3] = q.w;
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) v[i] = at + i < len ? x[at + i] : 0.0f;
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) sum += (double)v[i] * (double)v[i];
  }
  sum = block_sum(sum, slots);
  if (threadIdx.x == 0) *to = sum;
}

extern "C" __global__ void __launch_bounds__(256) sum_squares(const float* x, double* partials, long long len) {
  SHARED_ARRAY(double, slots, 32);
  sum_chunk(x, partials + blockIdx.x, (long long)blockIdx.x * NORM_CHUNK, len, slots);
}

// A tensor of `sum_squares_all`, as the host lays it out: words of 64 bits.
struct Squared {
  const float* x;
  double* partials;
  long long len, first_block;
};

extern "C" __global__ void __launch_bounds__(256) sum_squares_all(const Squared* tensors, int count) {
  SHARED_ARRAY(double, slots, 32);
  const Squared t = mine(tensors, count);
  long long chunk = (long long)blockIdx.x - t.first_block;
  sum_chunk(t.x, t.partials + chunk, chunk * NORM_CHUNK, t.len, slots);
}

extern "C" __global__ void __launch_bounds__(1024) sum_f64(const double* x, double* out, long long len) {
  SHARED_ARRAY(double, slots, 32);
  double sum = 0;
#pragma unroll 4
  for (long long i = threadIdx.x; i < len; i += blockDim.x) sum += x[i];
  sum = block_sum(sum, slots);
  if (threadIdx.x == 0) *out = sum;
}

// The new weight; the moments are updated.
__device__ __forceinline__ float adamw(const Numbers& c, float keep, float w, float& m, float& v, float gradient) {
  float g = __fmul_rn(gradient, c.grad_scale);
  w = __fmul_rn(w, keep);
  m = __fadd_rn(m, __fmul_rn(c.one_minus_beta1, __fsub_rn(g, m)));
  v = __fadd_rn(__fmul_rn(v, c.beta2), __fmul_rn(__fmul_rn(c.one_minus_beta2, g), g));
  float root = __fadd_rn(__fdiv_rn(__fsqrt_rn(v), c.root_correction2), c.eps);
  return __fadd_rn(w, __fdiv_rn(__fmul_rn(c.minus_step_size, m), root));
}

// What an update reads and writes, as the host lays it out: words of 64 bits. `param`, if any, gets the weights
// rounded.
struct Updated {
  float* w;
  float* m;
  float* v;
  const float* grad;
  bf16* param;
  long long len, first_block, decay;
};

// Updates every `step`th four elements from `first` up to `end`.
__device__ __forceinline__ void update(const Updated& t, const Numbers* numbers, long long first, long long end,
                                       long long step) {
  const Numbers c = *numbers;
  float keep = t.decay ? c.keep : 1.0f;
  bool wide = aligned16(t.w) && aligned16(t.m) && aligned16(t.v) && aligned16(t.grad) &&
              ((unsigned long long)t.param & 7) == 0;
#pragma unroll 1
  for (long long at = first; at < end; at += step) {
    if (wide && at + 4 <= end) {
      float4 a = *(float4*)(t.w + at), b = *(float4*)(t.m + at), d = *(float4*)(t.v + at);
      float4 g = *(const float4*)(t.grad + at);
      a.x = adamw(c, keep, a.x, b.x, d.x, g.x);
      a.y = adamw(c, keep, a.y, b.y, d.y, g.y);
      a.z = adamw(c, keep, a.z, b.z, d.z, g.z);
      a.w = adamw(c, keep, a.w, b.w, d.w, g.w);
      *(float4*)(t.w + at) = a;
      *(float4*)(t.m + at) = b;
      *(float4*)(t.v + at) = d;
      if (t.param) *(uint2*)(t.param + at) = make_uint2(pack_bf16(a.x, a.y), pack_bf16(a.z, a.w));
    } else {
      for (long long i = at; i < min(at + 4, end); ++i) {
        t.w[i] = adamw(c, keep, t.w[i], t.m[i], t.v[i], t.grad[i]);
        if (t.param) t.param[i] = f2bf(t.w[i]);
      }
    }
  }
}

__device__ __forceinline__ void update_alone(const Updated& t, const Numbers* numbers) {
  long long first = ((long long)blockIdx.x * blockDim.x + threadIdx.x) * 4;
  update(t, numbers, first, t.len, (long long)gridDim.x * blockDim.x * 4);
}

extern "C" __global__ void __launch_bounds__(256)
    adamw_f32(float* w, float* m, float* v, const float* grad, const Numbers* numbers, long long len, int decay) {
  update_alone({w, m, v, grad, nullptr, len, 0, decay}, numbers);
}

extern "C" __global__ void __launch_bounds__(256) adamw_bf16(bf16* param, float* master, float* m, float* v,
                                                              const float* grad, const Numbers* numbers, long long len,
                                                              int decay) {
  update_alone({master, m, v, grad, param, len, 0, decay}, numbers);
}

extern "C" __global__ void __launch_bounds__(256, 4)
    adamw_all(const Updated* tensors, int count, const Numbers* numbers) {
  const Updated t = mine(tensors, count);
  long long first = ((long long)blockIdx.x - t.first_block) * UPDATE_CHUNK;
  update(t, numbers, first + (int)threadIdx.x * 4, min(first + UPDATE_CHUNK, t.len), 256 * 4);
}

// mean = keep mean + share w.
extern "C" __global__ void __launch_bounds__(256)
    average(float* mean, const float* w, const Numbers* numbers, long long len) {
  float keep = numbers->average_keep, share = numbers->average_share;
  each(len, [&](long long i) { mean[i] = __fadd_rn(__fmul_rn(keep, mean[i]), __fmul_rn(share, w[i])); });
}

// Weights and their average change places; `param` gets the weights rounded.
extern "C" __global__ void __launch_bounds__(256) swap_average_f32(float* w, float* mean, long long len) {
  each(len, [&](long long i) {
    float x = w[i];
    w[i] = mean[i], mean[i] = x;
  });
}

extern "C" __global__ void __launch_bounds__(256)
    swap_average_bf16(bf16* param, float* master, float* mean, long long len) {
  each(len, [&](long long i) {
    float x = mean[i];
    mean[i] = master[i], master[i] = x, param[i] = f2bf(x);
  });
}
