// AdamW and the norm of gradients, with the operations of the host's CPU kernels in their order and each rounded: no
// product is fused with a sum.
//
//   sum_squares: a block of 256 threads for each 4096 elements; sum_f64: one block of 1024
//   adamw_*: any grid, 256 threads
#include "device.h"
#include "lanes.h"

constexpr int NORM_CHUNK = 4096;

extern "C" __global__ void __launch_bounds__(256) sum_squares(const float* x, double* partials, long long len) {
  SHARED_ARRAY(double, slots, 32);
  long long first = (long long)blockIdx.x * NORM_CHUNK;
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
  if (threadIdx.x == 0) partials[blockIdx.x] = sum;
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

// `param`, if any, gets the weights rounded.
__device__ __forceinline__ void adamw_all(bf16* param, float* w, float* m, float* v, const float* grad,
                                          const Numbers* numbers, long long len, int decay) {
  const Numbers c = *numbers;
  float keep = decay ? c.keep : c.keep_no_decay;
  bool wide = aligned16(w) && aligned16(m) && aligned16(v) && aligned16(grad) && ((unsigned long long)param & 7) == 0;
  long long step = (long long)gridDim.x * blockDim.x * 4;
  for (long long at = ((long long)blockIdx.x * blockDim.x + threadIdx.x) * 4; at < len; at += step) {
    if (wide && at + 4 <= len) {
      float4 a = *(float4*)(w + at), b = *(float4*)(m + at), d = *(float4*)(v + at), g = *(const float4*)(grad + at);
      a.x = adamw(c, keep, a.x, b.x, d.x, g.x);
      a.y = adamw(c, keep, a.y, b.y, d.y, g.y);
      a.z = adamw(c, keep, a.z, b.z, d.z, g.z);
      a.w = adamw(c, keep, a.w, b.w, d.w, g.w);
      *(float4*)(w + at) = a;
      *(float4*)(m + at) = b;
      *(float4*)(v + at) = d;
      if (param) *(uint2*)(param + at) = make_uint2(pack_bf16(a.x, a.y), pack_bf16(a.z, a.w));
    } else {
      for (long long i = at; i < min(at + 4, len); ++i) {
        w[i] = adamw(c, keep, w[i], m[i], v[i], grad[i]);
        if (param) param[i] = f2bf(w[i]);
      }
    }
  }
}

extern "C" __global__ void __launch_bounds__(256)
    adamw_f32(float* w, float* m, float* v, const float* grad, const Numbers* numbers, long long len, int decay) {
  adamw_all(nullptr, w, m, v, grad, numbers, len, decay);
}

extern "C" __global__ void __launch_bounds__(256) adamw_bf16(bf16* param, float* master, float* m, float* v,
                                                              const float* grad, const Numbers* numbers, long long len,
                                                              int decay) {
  adamw_all(param, master, m, v, grad, numbers, len, decay);
}
