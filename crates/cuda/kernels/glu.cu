// Gated linear units: any grid, 256 threads, 8 elements a thread at a time.
#include "device.h"
#include "lanes.h"

__device__ __forceinline__ float sigmoid(float x) {
  float e = expf(-fabsf(x));
  return (x < 0.0f ? e : 1.0f) / (1.0f + e);
}

// Of the sigmoid that comes near the error function, and the bounds of gates and ups.
constexpr float CLAMPED_SLOPE = 1.702f, CLAMPED_LIMIT = 7.0f;

// A unit, and what its gate and its up are multiplied by in the gradient. CLAMPED: gates and ups have bounds, at which the
// gradient passes; comparisons let NaN through.
template <bool CLAMPED> struct Unit {
  float value, of_gate, of_up;
  __device__ __forceinline__ Unit(float gate, float up) {
    if (!CLAMPED) {
      float s = sigmoid(gate), silu = gate * s;
      value = silu * up, of_gate = fmaf(silu, 1.0f - s, s), of_up = silu;
      return;
    }
    float g = gate > CLAMPED_LIMIT ? CLAMPED_LIMIT : gate, u = up > CLAMPED_LIMIT ? CLAMPED_LIMIT : up;
    u = u < -CLAMPED_LIMIT ? -CLAMPED_LIMIT : u;
    float s = sigmoid(g * CLAMPED_SLOPE), part = g * s;
    value = part * (u + 1.0f);
    of_gate = gate > CLAMPED_LIMIT ? 0.0f : (u + 1.0f) * fmaf(CLAMPED_SLOPE * part, 1.0f - s, s);
    of_up = up > CLAMPED_LIMIT || up < -CLAMPED_LIMIT ? 0.0f : part;
  }
};

template <bool CLAMPED, class T> __device__ __forceinline__ void glu(const T* gate_up, T* h, int n, int F) {
  bool wide = F % 8 == 0 && aligned16(gate_up) && aligned16(h);
  each8_of_rows(n, F, [&](long long row, int at) {
    float g[8], u[8];
    get8(gate_up + row * 2 * F, at, F, wide).unpack(g);
    get8(gate_up + row * 2 * F + F, at, F, wide).unpack(u);
#pragma unroll
    for (int i = 0; i < 8; ++i) g[i] = Unit<CLAMPED>(g[i], u[i]).value;
    put8(h + row * F, at, F, wide, g);
  });
}

template <bool CLAMPED, class T>
__device__ __forceinline__ void glu_dx(const T* dh, const T* gate_up, T* dgate_up, int n, int F) {
  bool wide = F % 8 == 0 && aligned16(gate_up) && aligned16(dh) && aligned16(dgate_up);
  each8_of_rows(n, F, [&](long long row, int at) {
    float g[8], u[8], d[8];
    get8(gate_up + row * 2 * F, at, F, wide).unpack(g);
    get8(gate_up + row * 2 * F + F, at, F, wide).unpack(u);
    get8(dh + row * F, at, F, wide).unpack(d);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      Unit<CLAMPED> unit(g[i], u[i]);
      g[i] = d[i] * (CLAMPED ? 1.0f : u[i]) * unit.of_gate;
      u[i] = d[i] * unit.of_up;
    }
    put8(dgate_up + row * 2 * F, at, F, wide, g);
    put8(dgate_up + row * 2 * F + F, at, F, wide, u);
  });
}

#define GLU_KERNELS(T, S, NAME, CLAMPED)                                                                  \
  extern "C" __global__ void __launch_bounds__(256) NAME##_##S(const T* gate_up, T* h, int n, int F) {    \
    glu<CLAMPED>(gate_up, h, n, F);                                                                       \
  }                                                                                                       \
  extern "C" __global__ void __launch_bounds__(256)                                                       \
      NAME##_dx_##S(const T* dh, const T* gate_up, T* dgate_up, int n, int F) {                           \
    glu_dx<CLAMPED>(dh, gate_up, dgate_up, n, F);                                                         \
  }
GLU_KERNELS(bf16, bf16, swiglu, false)
GLU_KERNELS(float, f32, swiglu, false)
GLU_KERNELS(bf16, bf16, swiglu_clamped, true)
GLU_KERNELS(float, f32, swiglu_clamped, true)
