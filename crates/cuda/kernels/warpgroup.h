// Instructions of warpgroups, of barriers in memory, and of copies of tiles by tensor maps: sm_90a, and the emulator.
#pragma once
#ifdef PHALANX_EMULATOR
#include "../emulator/warpgroup.h"
#else
#include "gpu.h"

// What the driver encodes of a tensor in global memory.
struct alignas(64) TensorMap {
  unsigned char bytes[128];
};

// A barrier in shared memory has phases. A phase ends when `arrivals` have come and all bytes expected have landed.
__device__ __forceinline__ void mbarrier_init(uint64_t* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}
// Before others use the barriers that this thread has initialised, and after it a barrier of the block.
__device__ __forceinline__ void mbarrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
__device__ __forceinline__ void mbarrier_arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}
// Arrives, and lets the phase wait for so many bytes more.
__device__ __forceinline__ void mbarrier_expect(uint64_t* barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}
// Waits until the phase of this parity, 0 for the first, has ended. The one before the first counts as ended.
__device__ __forceinline__ void mbarrier_wait(uint64_t* barrier, uint32_t parity) {
  asm volatile(
      "{\n.reg .pred p;\nAGAIN:\nmbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n@p bra DONE;\nbra AGAIN;\n"
      "DONE:\n}" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}

// Starts to copy the map's box at (x, y, z) to shared memory, aligned to 1024; `barrier` sees its bytes land.
__device__ __forceinline__ void tma_load_3d(void* shared, const TensorMap* map, uint64_t* barrier, int x, int y, int z) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], [%2];" ::"r"(
          shared_address(shared)),
      "l"(map), "r"(shared_address(barrier)), "r"(x), "r"(y), "r"(z)
      : "memory");
}
// Between plain accesses to shared memory and those of copies and wgmma after it.
__device__ __forceinline__ void async_fence() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// A barrier by number for so many threads, some of which may only arrive.
__device__ __forceinline__ void barrier_sync(int number, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(number), "r"(threads) : "memory");
}
__device__ __forceinline__ void barrier_arrive(int number, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(number), "r"(threads) : "memory");
}

// Registers of each thread of this warpgroup, from what the launch gave to all.
template <int N> __device__ __forceinline__ void registers_up() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N));
}
template <int N> __device__ __forceinline__ void registers_down() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N));
}

// Before the first wgmma, and before one that takes registers that others have written.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Waits until at most the N latest groups are under way.
template <int N> __device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}

// Operands in shared memory in columns of 64 elements: rows of 128 bytes with the 128-byte swizzle. `at` is one of the
// first four 16-element parts of a row that is a multiple of 8.
// With the inner dimension along the rows: 16 elements from `at` on, of as many rows as the instruction takes.
__device__ __forceinline__ uint64_t wgmma_rows(const void* at) {
  return (uint64_t)((shared_address(at) & 0x3ffff) >> 4) | 1ull << 16 | (1024ull >> 4) << 32 | 1ull << 62;
}
// With the inner dimension along the columns: 16 rows; columns of 64 elements are `next` bytes apart.
__device__ __forceinline__ uint64_t wgmma_columns(const void* at, int next) {
  return (uint64_t)((shared_address(at) & 0x3ffff) >> 4) | (uint64_t)(next >> 4) << 16 | (1024ull >> 4) << 32 |
         1ull << 62;
}

// c = (add ? c : 0) + a b with 64 x 16 by 16 x N. Warp w of the group holds rows 16 w on of c, and of a where that is
// in registers, as mma_bf16 does.
// Accumulators of the columns from 8 n on: as operands, and as an instruction names the first so many.
#define PHALANX_C4(n) "+f"(c[n][0]), "+f"(c[n][1]), "+f"(c[n][2]), "+f"(c[n][3])
#define PHALANX_C16(n) PHALANX_C4(n), PHALANX_C4(n + 1), PHALANX_C4(n + 2), PHALANX_C4(n + 3)
#define PHALANX_C32(n) PHALANX_C16(n), PHALANX_C16(n + 4)
#define PHALANX_C64(n) PHALANX_C32(n), PHALANX_C32(n + 8)
#define PHALANX_R32 \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15" ", " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define PHALANX_R64 \
  PHALANX_R32 ", " \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47" ", " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"

// One instruction of a shape; ADD, then what the factors and their kinds are called, then the operands.
#define PHALANX_WGMMA(SHAPE, REGISTERS, ADD, FACTORS, ...)      \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " ADD ", 0;\n" \
               "wgmma.mma_async.sync.aligned." SHAPE ".f32.bf16.bf16 {" REGISTERS "}, " FACTORS ";\n}" __VA_ARGS__)

template <int N>
__device__ __forceinline__ void wgmma_ss(float (&c)[N / 8][4], uint64_t a, uint64_t b, bool add) {
  static_assert(N == 64 || N == 128, "a width that is spelled out here");
  if constexpr (N == 64) {
    PHALANX_WGMMA("m64n64k16", PHALANX_R32, "%34", "%32, %33, p, 1, 1, 0, 0",
                  : PHALANX_C32(0) : "l"(a), "l"(b), "r"((int)add));
  } else {
    PHALANX_WGMMA("m64n128k16", PHALANX_R64, "%66", "%64, %65, p, 1, 1, 0, 0",
                  : PHALANX_C64(0) : "l"(a), "l"(b), "r"((int)add));
  }
}
template <int N>
__device__ __forceinline__ void wgmma_rs_transposed(float (&c)[N / 8][4], const uint32_t (&a)[4], uint64_t b, bool add) {
  static_assert(N == 64 || N == 128, "a width that is spelled out here");
  if constexpr (N == 64) {
    PHALANX_WGMMA("m64n64k16", PHALANX_R32, "%37", "{%32, %33, %34, %35}, %36, p, 1, 1, 1",
                  : PHALANX_C32(0) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"((int)add));
  } else {
    PHALANX_WGMMA("m64n128k16", PHALANX_R64, "%69", "{%64, %65, %66, %67}, %68, p, 1, 1, 1",
                  : PHALANX_C64(0) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"((int)add));
  }
}
#endif
