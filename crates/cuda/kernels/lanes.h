// What kernels over rows share: eight elements at a time, sums over a block in an order that depends on its size alone,
// and sums in the order of a tree.
#pragma once

// Eight neighbouring elements as they lie in memory: what a thread keeps between two passes over a row.
template <class T> struct Eight;

template <> struct Eight<bf16> {
  uint4 bits;
  __device__ __forceinline__ void load(const bf16* p) { bits = load16_rw(p); }
  __device__ __forceinline__ void store(bf16* p) const { store16(p, bits); }
  __device__ __forceinline__ void unpack(float (&v)[8]) const {
    const uint32_t words[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      v[2 * i] = __uint_as_float(words[i] << 16);
      v[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
    }
  }
  __device__ __forceinline__ void pack(const float (&v)[8]) {
    bits = make_uint4(pack_bf16(v[0], v[1]), pack_bf16(v[2], v[3]), pack_bf16(v[4], v[5]), pack_bf16(v[6], v[7]));
  }
};

template <> struct Eight<float> {
  float4 low, high;
  __device__ __forceinline__ void load(const float* p) {
    low = *(const float4*)p;
    high = *(const float4*)(p + 4);
  }
  __device__ __forceinline__ void store(float* p) const {
    *(float4*)p = low;
    *(float4*)(p + 4) = high;
  }
  __device__ __forceinline__ void unpack(float (&v)[8]) const {
    v[0] = low.x, v[1] = low.y, v[2] = low.z, v[3] = low.w;
    v[4] = high.x, v[5] = high.y, v[6] = high.z, v[7] = high.w;
  }
  __device__ __forceinline__ void pack(const float (&v)[8]) {
    low = make_float4(v[0], v[1], v[2], v[3]);
    high = make_float4(v[4], v[5], v[6], v[7]);
  }
};

__device__ __forceinline__ bool aligned16(const void* p) { return ((unsigned long long)p & 15) == 0; }

// Elements at `at` of a row of `dim`, 0 beyond it. `wide`: the row is aligned and a multiple of 8 long; sums go in the
// same order either way.
template <class T> __device__ __forceinline__ Eight<T> get8(const T* row, int at, int dim, bool wide) {
  Eight<T> e;
  if (wide && at < dim) {
    e.load(row + at);
  } else {
    float v[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) v[i] = !wide && at + i < dim ? as_f32(row[at + i]) : 0.0f;
    e.pack(v);
  }
  return e;
}

template <class T> __device__ __forceinline__ void put8(T* row, int at, int dim, bool wide, const float (&v)[8]) {
  if (wide) {
    if (at < dim) {
      Eight<T> e;
      e.pack(v);
      e.store(row + at);
    }
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if (at + i < dim) put_f32(row + at + i, v[i]);
    }
  }
}

template <class S> __device__ __forceinline__ S warp_sum(S x) {
#pragma unroll
  for (int bits = 16; bits > 0; bits >>= 1) x += __shfl_xor_sync(~0u, x, bits);
  return x;
}

__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
  for (int bits = 16; bits > 0; bits >>= 1) x = fmaxf(x, __shfl_xor_sync(~0u, x, bits));
  return x;
}

// The sum over the block, in every thread. `slots` (one for each warp) is not used otherwise in the kernel.
template <class S> __device__ __forceinline__ S block_sum(S x, S* slots) {
  x = warp_sum(x);
  if (blockDim.x <= 32) return x;
  if (threadIdx.x % 32 == 0) slots[threadIdx.x / 32] = x;
  if (FAULT != 1) __syncthreads();
  S sum = slots[0];
  for (int i = 1; i < (int)blockDim.x / 32; ++i) sum += slots[i];
  return sum;
}

__device__ __forceinline__ float block_max(float x, float* slots) {
  x = warp_max(x);
  if (blockDim.x <= 32) return x;
  if (threadIdx.x % 32 == 0) slots[threadIdx.x / 32] = x;
  if (FAULT != 2) __syncthreads();
  float most = slots[0];
  for (int i = 1; i < (int)blockDim.x / 32; ++i) most = fmaxf(most, slots[i]);
  return most;
}

// Calls `body` with each of `len` elements, on any grid along x.
template <class Body> __device__ __forceinline__ void each(long long len, Body body) {
  long long step = (long long)gridDim.x * blockDim.x;
#pragma unroll 4
  for (long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x; i < len; i += step) body(i);
}

__device__ __forceinline__ float plus(float a, float b) { return a + b; }
__device__ __forceinline__ double plus(double a, double b) { return a + b; }
__device__ __forceinline__ float4 plus(float4 a, float4 b) {
  return make_float4(a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w);
}

// The sum of a subtree of D levels: loops without arrays, so that all stays in registers. `leaf(i)` gives a leaf's value;
// leaves are asked for in order.
template <int D> struct Node {
  template <class V, class Leaf> static __device__ __forceinline__ V sum(const Tree& tree, int& next, Leaf& leaf) {
    V total = {};
    int radix = D <= tree.depth ? tree.radices[D - 1] : 1;
#pragma unroll 1
    for (int r = 0; r < radix; ++r) {
      V part = Node<D - 1>::template sum<V>(tree, next, leaf);
      total = r == 0 ? part : plus(total, part);
    }
    return total;
  }
};
template <> struct Node<0> {
  template <class V, class Leaf> static __device__ __forceinline__ V sum(const Tree&, int& next, Leaf& leaf) {
    return leaf(next++);
  }
};

// Trees deeper than that are rare: a counter, with an array that does not fit in registers.
template <class V, class Leaf> __device__ __forceinline__ V sum_deep(const Tree& tree, Leaf leaf) {
  V held[15], r = {};
  int digits[15];
  for (int d = 0; d < tree.depth; ++d) digits[d] = 0;
  for (int next = 0;; ++next) {
    r = leaf(next);
    int d = 0;
    for (; d < tree.depth; ++d) {
      if (digits[d] > 0) r = plus(held[d], r);
      if (++digits[d] < tree.radices[d]) break;
      digits[d] = 0;
    }
    if (d == tree.depth) return r;
    held[d] = r;
  }
}

// Trees of at most so many levels. One copy of the leaf's code for all: levels that are not there have one child.
constexpr int SHALLOW = 3;
template <class V, class Leaf> __device__ __forceinline__ V sum_shallow(const Tree& tree, Leaf leaf) {
  int next = 0;
  return Node<SHALLOW>::sum<V>(tree, next, leaf);
}

template <class V, class Leaf> __device__ __forceinline__ V sum_tree(const Tree& tree, Leaf leaf) {
  return tree.depth <= SHALLOW ? sum_shallow<V>(tree, leaf) : sum_deep<V>(tree, leaf);
}

// Calls `body(at)` for each group of 8 below `len`.
template <class Body> __device__ __forceinline__ void each8(long long len, Body body) {
  long long step = (long long)gridDim.x * blockDim.x * 8;
  for (long long at = ((long long)blockIdx.x * blockDim.x + threadIdx.x) * 8; at < len; at += step) body(at);
}

// Rows of F, each rounded up to groups of 8, in the order of memory.
template <class Body> __device__ __forceinline__ void each8_of_rows(int n, int F, Body body) {
  int groups = (F + 7) / 8;
  each8((long long)n * groups * 8, [&](long long at) {
    long long group = at / 8;
    // Division of 32 bits is much faster, and nearly always enough.
    bool small = group >> 32 == 0;
    long long row = small ? (uint32_t)group / (uint32_t)groups : group / groups;
    body(row, (int)(group - row * groups) * 8);
  });
}
