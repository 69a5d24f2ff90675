// The seam in the emulator: CUDA's words for the host's compiler, and what ../kernels/gpu.h has as PTX, by the documented
// lane layouts.
#pragma once
#include <cmath>
#include <cstdlib>
#include <type_traits>

#include "block.h"

#define __global__
#define __device__
#define __host__
#define __constant__ static
#define __shared__ static  // blocks run one after another; not poisoned, which SHARED_ARRAY is
#define __forceinline__ inline
#define __restrict__
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) alignas(n)
#define SHARED(T, name) T* name = static_cast<T*>(cpu::dynamic_shared())
#define SHARED_ARRAY(T, name, count)          \
  static cpu::StaticShared<T, count> name##_; \
  T* name = name##_.items

#define threadIdx (cpu::self().index)
#define blockIdx (cpu::machine.block_index)
#define blockDim (cpu::machine.block)
#define gridDim (cpu::machine.grid)
#define warpSize 32

#define __syncthreads() cpu::wait(cpu::State::Block, __LINE__)
#define __syncwarp(...) cpu::wait(cpu::State::Warp, __LINE__, cpu::mask_of(__VA_ARGS__))
#define __threadfence() ((void)0)
#define __shfl_sync(mask, v, from) cpu::exchange(v, unsigned(from), __LINE__, mask)
#define __shfl_xor_sync(mask, v, bits) cpu::exchange(v, cpu::lane() ^ unsigned(bits), __LINE__, mask)
#define __shfl_down_sync(mask, v, by) \
  cpu::exchange(v, cpu::lane() + unsigned(by) < 32 ? cpu::lane() + unsigned(by) : cpu::lane(), __LINE__, mask)
#define __shfl_up_sync(mask, v, by) \
  cpu::exchange(v, cpu::lane() >= unsigned(by) ? cpu::lane() - unsigned(by) : cpu::lane(), __LINE__, mask)
#define __ballot_sync(mask, p) cpu::ballot(p, __LINE__, mask)
#define __any_sync(mask, p) (cpu::ballot(p, __LINE__, mask) != 0)
#define __all_sync(mask, p) (cpu::ballot(!(p), __LINE__, mask) == 0)

namespace cpu {
inline unsigned mask_of(unsigned mask = ~0u) { return mask; }
inline unsigned ballot(bool p, int site, unsigned mask) {
  post(int(p), site, mask);
  unsigned bits = 0;
  unsigned lanes = std::min<unsigned>(WARP_LANES, unsigned(machine.threads.size()) - warp_start());
  for (unsigned i = 0; i < lanes; ++i) {
    if (mask >> i & 1) bits |= unsigned(given<int>(i)) << i;
  }
  return bits;
}
template <class To, class From> To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}
}  // namespace cpu

struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(8) int2 { int x, y; };
struct alignas(16) int4 { int x, y, z, w; };
struct alignas(8) uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(16) double2 { double x, y; };
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline int2 make_int2(int x, int y) { return {x, y}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline double2 make_double2(double x, double y) { return {x, y}; }

template <class A, class B> std::common_type_t<A, B> min(A a, B b) { return b < a ? b : a; }
template <class A, class B> std::common_type_t<A, B> max(A a, B b) { return a < b ? b : a; }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline float __expf(float x) { return std::exp(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fsqrt_rn(float a) { return std::sqrt(a); }
inline float __uint_as_float(unsigned x) { return cpu::bits_as<float>(x); }
inline unsigned __float_as_uint(float x) { return cpu::bits_as<unsigned>(x); }
inline float __int_as_float(int x) { return cpu::bits_as<float>(x); }
inline int __float_as_int(float x) { return cpu::bits_as<int>(x); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(unsigned(x)); }
template <class T> T __ldg(const T* p) { return *p; }

// Threads change only at rendezvous, so plain operations are atomic.
template <class T, class V> T atomicAdd(T* p, V v) {
  static_assert(std::is_integral_v<T>, "sums of floats would depend on the order");
  T old = *p;
  *p = T(old + v);
  return old;
}
template <class T, class V> T atomicMax(T* p, V v) {
  T old = *p;
  *p = max(old, T(v));
  return old;
}
template <class T, class V> T atomicMin(T* p, V v) {
  T old = *p;
  *p = min(old, T(v));
  return old;
}

using bf16 = uint16_t;

// Which fault is planted, by its number in check-faults.sh.
inline const int FAULT = [] {
  const char* number = std::getenv("PHALANX_PLANTED_FAULT");
  return number ? std::atoi(number) : 0;
}();

inline float bf2f(bf16 x) { return __uint_as_float(uint32_t(x) << 16); }
inline bf16 f2bf(float x) {
  uint32_t bits = __float_as_uint(x);
  if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fff;
  return bf16((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
inline uint32_t pack_bf16(float low, float high) { return f2bf(low) | uint32_t(f2bf(high)) << 16; }
inline float exp2_fast(float x) {
  float y = std::exp2(x);
  return y < 1.17549435e-38f ? 0.0f : y;
}

namespace cpu {
inline void need_aligned(const void* p, size_t bytes) {
  if (reinterpret_cast<uintptr_t>(p) % bytes != 0) die("an address that is not aligned");
}
}  // namespace cpu

inline uint4 load16_rw(const void* p) {
  cpu::need_aligned(p, 16);
  uint4 x;
  std::memcpy(&x, p, 16);
  return x;
}
inline uint4 load16(const void* p) { return load16_rw(p); }
inline void store16(void* p, uint4 x) {
  cpu::need_aligned(p, 16);
  std::memcpy(p, &x, 16);
}

// A copy may land at any time until its wait: some land at once, the others at the wait. A forgotten wait reads poison, a
// buffer that others still read is overwritten.
inline void cp_async16_or_zero(void* shared, const void* global, bool valid) {
  cpu::need_aligned(shared, 16);
  cpu::Copy copy{shared, {}};
  if (valid) {
    cpu::need_aligned(global, 16);
    std::memcpy(copy.bytes, global, 16);
  }
  if (cpu::draw() & 1) {
    std::memcpy(shared, copy.bytes, 16);
  } else {
    cpu::self().open.push_back(copy);
  }
}
inline void cp_async16(void* shared, const void* global) { cp_async16_or_zero(shared, global, true); }
inline void cp_async_commit() {
  cpu::Thread& t = cpu::self();
  t.groups.push_back(std::move(t.open));
  t.open.clear();
}
template <int N> inline void cp_async_wait() {
  auto& groups = cpu::self().groups;
  while (groups.size() > N) {
    for (auto& copy : groups.front()) std::memcpy(copy.to, copy.bytes, 16);
    groups.erase(groups.begin());
  }
}

namespace cpu {
// What a lane receives of matrix i, whose rows' addresses lanes 8 i .. 8 i + 7 have posted.
inline uint32_t matrix_part(int i, bool transposed) {
  int g = int(lane() / 4), q = int(lane() % 4);
  auto element = [&](int row, int col) { return uint32_t(given<const bf16*>(unsigned(8 * i + row))[col]); };
  if (transposed) return element(2 * q, g) | element(2 * q + 1, g) << 16;
  return element(g, 2 * q) | element(g, 2 * q + 1) << 16;
}
template <int COUNT> void load_matrices(uint32_t (&r)[COUNT], const void* row, bool transposed, int site) {
  if (lane() < 8 * COUNT) need_aligned(row, 16);
  post(row, site);
  for (int i = 0; i < COUNT; ++i) r[i] = matrix_part(i, transposed);
}
}  // namespace cpu

inline void ldmatrix_x4(uint32_t (&r)[4], const void* row) { cpu::load_matrices(r, row, false, __LINE__); }
inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) { cpu::load_matrices(r, row, true, __LINE__); }
inline void ldmatrix_x2(uint32_t (&r)[2], const void* row) { cpu::load_matrices(r, row, false, __LINE__); }
inline void ldmatrix_x2_trans(uint32_t (&r)[2], const void* row) { cpu::load_matrices(r, row, true, __LINE__); }

inline void mma_bf16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  struct Operands {
    uint32_t a[4], b[2];
  };
  cpu::post(Operands{{a[0], a[1], a[2], a[3]}, {b0, b1}}, __LINE__);
  int g = int(cpu::lane() / 4), q = int(cpu::lane() % 4);
  for (int k = 0; k < 16; ++k) {
    int from = (k % 8) / 2, shift = 16 * (k & 1);
    auto half = [&](uint32_t word) { return bf2f(bf16(word >> shift)); };
    auto left = cpu::given<Operands>(unsigned(g * 4 + from));
    float column[2];
    for (int n = 0; n < 2; ++n) column[n] = half(cpu::given<Operands>(unsigned((2 * q + n) * 4 + from)).b[k / 8]);
    for (int i = 0; i < 4; ++i) c[i] += half(left.a[i / 2 + 2 * (k / 8)]) * column[i & 1];
  }
}
