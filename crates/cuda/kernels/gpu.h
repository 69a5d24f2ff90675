// The seam on a GPU: each PTX instruction that kernels use is one function, of the same name and meaning as in
// ../emulator/cpu.h. sm_80 and later.
#pragma once
#ifdef __CUDACC_RTC__
typedef unsigned char uint8_t;
typedef unsigned short uint16_t;
typedef unsigned int uint32_t;
typedef unsigned long long uint64_t;
typedef int int32_t;
typedef long long int64_t;
#ifndef INFINITY
#define INFINITY __int_as_float(0x7f800000)
#endif
#else
#include <math.h>
#include <stdint.h>
#endif

typedef unsigned short bf16;

// Which fault is planted: in the emulator, by tests that must notice it.
constexpr int FAULT = 0;

// The dynamic shared memory of a block, 1024-byte aligned.
#define SHARED(T, name)                                                  \
  extern __shared__ __align__(1024) unsigned char phalanx_shared[];      \
  T* name = reinterpret_cast<T*>(phalanx_shared)
// An array in the static shared memory of a block.
#define SHARED_ARRAY(T, name, count) __shared__ T name[count]

__device__ __forceinline__ float bf2f(bf16 x) { return __uint_as_float((uint32_t)x << 16); }

// To nearest even.
__device__ __forceinline__ bf16 f2bf(float x) {
  bf16 r;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(r) : "f"(x));
  return r;
}

// Two of them in a word, `low` in the lower half, which is first in memory.
__device__ __forceinline__ uint32_t pack_bf16(float low, float high) {
  uint32_t r;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}

// 2^x within 2 ulp; results below the normal range are 0.
__device__ __forceinline__ float exp2_fast(float x) {
  float r;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
  return r;
}

__device__ __forceinline__ uint32_t shared_address(const void* p) { return (uint32_t)__cvta_generic_to_shared(p); }

// 16 bytes through the read-only path; `p` is aligned to 16.
__device__ __forceinline__ uint4 load16(const void* p) { return __ldg((const uint4*)p); }
// 16 bytes that this kernel may also write.
__device__ __forceinline__ uint4 load16_rw(const void* p) { return *(const uint4*)p; }
__device__ __forceinline__ void store16(void* p, uint4 x) { *(uint4*)p = x; }

// Starts to copy 16 bytes from global to shared memory, past the L1 cache. It belongs to this thread's next group.
__device__ __forceinline__ void cp_async16(void* shared, const void* global) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(shared)), "l"(global) : "memory");
}
// The same where `valid`; otherwise 16 zero bytes, and `global` is not read.
__device__ __forceinline__ void cp_async16_or_zero(void* shared, const void* global, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global),
               "r"(valid ? 16 : 0)
               : "memory");
}
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most the N latest groups of this thread are under way.
template <int N> __device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// Matrices of 8 x 8 bf16: lane 8 i + r gives the address of row r of matrix i (aligned to 16), and receives of each
// matrix row lane / 4, columns 2 (lane % 4) and the next. Transposed: column lane / 4, rows 2 (lane % 4) and the next.
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}
__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}
// The same of two matrices, whose addresses lanes 0 to 15 give.
__device__ __forceinline__ void ldmatrix_x2(uint32_t (&r)[2], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(shared_address(row))
               : "memory");
}
__device__ __forceinline__ void ldmatrix_x2_trans(uint32_t (&r)[2], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(shared_address(row))
               : "memory");
}

// c += a b with a 16 x 16 (by rows), b 16 x 8 (by columns), c 16 x 8. With g = lane / 4 and q = lane % 4 a lane holds
//   a[0]: row g, columns 2q, 2q + 1; a[1]: row g + 8; a[2], a[3]: the same rows, columns 2q + 8, 2q + 9
//   b0: column g, rows 2q, 2q + 1; b1: rows 2q + 8, 2q + 9
//   c[0], c[1]: row g, columns 2q, 2q + 1; c[2], c[3]: row g + 8
__device__ __forceinline__ void mma_bf16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
