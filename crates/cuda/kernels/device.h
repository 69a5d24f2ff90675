// What every kernel includes: the seam to the hardware, on a GPU or in the emulator, and what host and kernels share.
#pragma once
#ifdef PHALANX_EMULATOR
#include "../emulator/cpu.h"
#else
#include "gpu.h"
#endif

// What kernels read of a turn. It lies in device memory, so that a recorded stretch runs again with other numbers.
struct Numbers {
  float loss_scale, grad_scale, keep, one_minus_beta1, beta2, one_minus_beta2, root_correction2, eps, minus_step_size;
  // Of an average of the weights.
  float average_keep, average_share;
  // Muon's.
  float momentum, momentum_rest, minus_lr;
  // Of what is left out at random.
  uint64_t draws;
};

// The order in which the leaves of a gradient are added: radices above 1, from the leaves up. The children of a node
// are added left to right.
struct Tree {
  int depth;
  int radices[15];
};

// bf16 and float alike.
__device__ __forceinline__ float as_f32(float x) { return x; }
__device__ __forceinline__ float as_f32(bf16 x) { return bf2f(x); }
__device__ __forceinline__ void put_f32(float* to, float x) { *to = x; }
__device__ __forceinline__ void put_f32(bf16* to, float x) { *to = f2bf(x); }
