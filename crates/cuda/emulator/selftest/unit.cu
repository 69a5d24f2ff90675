// Kernels for the test of the stand-in libraries: plain, with barriers, and made by a macro.
#include "device.h"

extern "C" __global__ void double_it(float* x, long long len, float by) {
  for (long long i = blockIdx.x * blockDim.x + threadIdx.x; i < len; i += gridDim.x * blockDim.x) x[i] = x[i] * by;
}

#define REVERSE(T, suffix)                                                                  \
  extern "C" __global__ void __launch_bounds__(256) reverse_##suffix(const T* from, T* to) { \
    SHARED(T, held);                                                                        \
    held[threadIdx.x] = from[threadIdx.x];                                                  \
    __syncthreads();                                                                        \
    to[threadIdx.x] = held[blockDim.x - 1 - threadIdx.x];                                   \
  }
REVERSE(float, f32)
REVERSE(int, i32)

extern "C" __global__ void by_value(float* out, Tree tree) {
  if (threadIdx.x == 0) out[0] = float(tree.radices[tree.depth - 1]);
}
