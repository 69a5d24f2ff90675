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

// Registers of accumulators from c[n] on.
#define PHALANX_C4(n) "+f"(c[n][0]), "+f"(c[n][1]), "+f"(c[n][2]), "+f"(c[n][3])
#define PHALANX_C16(n) PHALANX_C4(n), PHALANX_C4(n + 1), PHALANX_C4(n + 2), PHALANX_C4(n + 3)
#define PHALANX_C64(n) PHALANX_C16(n), PHALANX_C16(n + 4), PHALANX_C16(n + 8), PHALANX_C16(n + 12)
#define PHALANX_R64 \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15" ", " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31" ", " \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47" ", " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
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
#define PHALANX_WGMMA(SHAPE, REGISTERS, A, B, ADD, TA, TB, ...)                                               \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " ADD ", 0;\n"                                               \
               "wgmma.mma_async.sync.aligned." SHAPE ".f32.bf16.bf16 {" REGISTERS "}, " A ", " B ", p, 1, 1, " TA \
               ", " TB ";\n}"                                                                                 \
               : __VA_ARGS__                                                                                  \
               : "l"(a), "l"(b), "r"((int)add), "n"((int)A_COLUMNS), "n"((int)B_COLUMNS))
  static_assert(N == 128 || N == 192 || N == 256, "a width that is spelled out here");
  if constexpr (N == 128) {
    PHALANX_WGMMA("m64n128k16", PHALANX_R64, "%64", "%65", "%66", "%67", "%68", PHALANX_C64(0));
  } else if constexpr (N == 192) {
    PHALANX_WGMMA("m64n192k16", PHALANX_R96, "%96", "%97", "%98", "%99", "%100", PHALANX_C64(0), PHALANX_C16(16),
                  PHALANX_C16(20));
  } else {
    PHALANX_WGMMA("m64n256k16", PHALANX_R128, "%128", "%129", "%130", "%131", "%132", PHALANX_C64(0), PHALANX_C64(16));
  }
#undef PHALANX_WGMMA
}
#undef PHALANX_C4
#undef PHALANX_C16
#undef PHALANX_C64
#undef PHALANX_R64
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
