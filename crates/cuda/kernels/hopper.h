// Products of warpgroups whose factors both lie in shared memory, each by rows or by columns: sm_90a, and the emulator.
#pragma once
#include "warpgroup.h"
#ifdef PHALANX_EMULATOR
#include "../emulator/hopper_cpu.h"
#else

// Brings what the driver encoded nearer to the unit that reads it.
__device__ __forceinline__ void tensor_map_prefetch(const TensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// The compiler forgets what it knows of x, and keeps nothing that follows from it for later.
__device__ __forceinline__ void recompute(int& x) { asm volatile("" : "+r"(x)); }

// Registers of products wider than those of warpgroup.h.
#define PHALANX_R96 \
  PHALANX_R64 ", " \
  "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79" ", " \
  "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define PHALANX_R128 \
  PHALANX_R96 ", " \
  "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111" ", " \
  "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"

// c = (add ? c : 0) + a b: 64 x 16 by 16 x N, from what `wgmma_operand` gives. The inner dimension runs along the rows
// of shared memory, or across them where COLUMNS. Warp w of the group holds rows 16 w on of c, as mma_bf16 does.
template <int N, bool A_COLUMNS, bool B_COLUMNS>
__device__ __forceinline__ void wgmma(float (&c)[N / 8][4], uint64_t a, uint64_t b, bool add) {
#define PHALANX_KINDS "l"(a), "l"(b), "r"((int)add), "n"((int)A_COLUMNS), "n"((int)B_COLUMNS)
  static_assert(N == 128 || N == 192 || N == 256, "a width that is spelled out here");
  if constexpr (N == 128) {
    PHALANX_WGMMA("m64n128k16", PHALANX_R64, "%66", "%64, %65, p, 1, 1, %67, %68", : PHALANX_C64(0) : PHALANX_KINDS);
  } else if constexpr (N == 192) {
    PHALANX_WGMMA("m64n192k16", PHALANX_R96, "%98", "%96, %97, p, 1, 1, %99, %100",
                  : PHALANX_C64(0), PHALANX_C32(16) : PHALANX_KINDS);
  } else {
    PHALANX_WGMMA("m64n256k16", PHALANX_R128, "%130", "%128, %129, p, 1, 1, %131, %132",
                  : PHALANX_C64(0), PHALANX_C64(16) : PHALANX_KINDS);
  }
#undef PHALANX_KINDS
}
#undef PHALANX_R96
#undef PHALANX_R128
#endif

// A factor as wgmma finds it from the address of its first row: rows of 128 bytes, of which eight make a pattern of the
// 128-byte swizzle, and eight rows on are 1024 bytes on. Along the rows, N or M is the number of rows, and the next 16
// of the inner dimension are 32 bytes on, so that a row holds 64. Across them, the inner dimension is the number of
// rows, a row holds 64 of N or M, the next 64 are `next` bytes on, and the next 16 of the inner dimension 2048.
__device__ __forceinline__ uint64_t wgmma_operand(uint32_t address, uint32_t next) {
  return (uint64_t)((address & 0x3ffff) >> 4) | (uint64_t)(next >> 4) << 16 | (uint64_t)(1024 >> 4) << 32 | 1ull << 62;
}
// The same operand, so many bytes further.
__device__ __forceinline__ uint64_t wgmma_further(uint64_t operand, uint32_t bytes) { return operand + (bytes >> 4); }
