// What ../kernels/warpgroup.h has as PTX for sm_90a, by the documented layouts. What is asynchronous on a device happens
// here at once or as late as its wait allows.
#pragma once
#include <deque>
#include <map>

#include "cpu.h"

struct alignas(64) TensorMap {
  unsigned char bytes[128];
};

namespace cpu {
// A map's bytes as the stand-in driver writes them. Strides are bytes, of all dims but the first.
struct alignas(64) MapFields {
  uint64_t base, dims[5], strides[4];
  uint16_t box[5];
  uint8_t element_strides[5], type, rank, swizzle, interleave, out_of_bounds;
};
static_assert(sizeof(MapFields) == sizeof(TensorMap));

struct Phases {
  int expected = 0, arrived = 0;
  long long bytes = 0;
  uint32_t parity = 0;
  std::vector<std::function<void()>> copies;  // that have not landed

  void arrive() {
    if (++arrived > expected) die("more arrivals at a barrier than it expects");
    settle();
  }
  void settle() {
    if (arrived < expected || bytes != 0) return;
    arrived = 0;
    parity ^= 1;
  }
};
struct Numbered {
  int arrived = 0;
  unsigned phase = 0;
};
// Products of a thread's part that have not been done: of the open group, and of those committed, oldest first.
struct Products {
  std::vector<std::function<void()>> open;
  std::deque<std::vector<std::function<void()>>> groups;
};
struct Warpgroups {
  std::map<const void*, Phases> phases;
  std::map<int, Numbered> numbered;
  std::map<unsigned, Products> products;
};
inline Warpgroups warpgroups;

inline Phases& phases_of(const void* barrier) {
  auto found = warpgroups.phases.find(barrier);
  if (found == warpgroups.phases.end()) die("a barrier in memory that is not initialised");
  return found->second;
}
inline void numbered(int number, int threads, bool wait) {
  if (number < 0 || number > 15 || threads % 32 != 0) die("a barrier's number or threads");
  auto& b = warpgroups.numbered[number];
  unsigned phase = b.phase;
  if (++b.arrived == threads) b.arrived = 0, ++b.phase;
  if (wait) wait_until([=] { return warpgroups.numbered[number].phase != phase; }, 10000 + number);
}

// An element of an operand whose rows of 128 bytes are swizzled.
inline float swizzled(uintptr_t at) { return bf2f(*reinterpret_cast<const bf16*>(at ^ (at >> 7 & 7) << 4)); }
// A descriptor here: an address, and above it by how many 1024 bytes columns are apart.
inline float along_rows(uint64_t d, int row, int k) { return swizzled(uintptr_t(d) + unsigned(row * 128 + k * 2)); }
inline float along_columns(uint64_t d, int col, int k) {
  uintptr_t at = uintptr_t(d & 0xffffffffffff), next = uintptr_t(d >> 48) * 1024;
  return swizzled(at + unsigned(col / 64) * next + unsigned(k * 128 + col % 64 * 2));
}
// c of this lane from what `left(row of its two, k)` and `right(col, k)` give.
template <int N, class Left, class Right> void multiply(float (*c)[4], bool add, Left left, Right right) {
  int q = int(lane() % 4);
  for (int n = 0; n < N / 8; ++n) {
    for (int i = 0; i < 4; ++i) {
      float sum = add ? c[n][i] : 0.0f;
      for (int k = 0; k < 16; ++k) sum += left(i >> 1, k) * right(n * 8 + 2 * q + (i & 1), k);
      c[n][i] = sum;
    }
  }
}
}  // namespace cpu

// The first of a block forgets what the block before left.
inline void mbarrier_init(uint64_t* barrier, int arrivals) {
  cpu::need_aligned(barrier, 8);
  if (*barrier == ~0ull && cpu::warpgroups.phases.count(barrier)) cpu::warpgroups = {};
  *barrier = 0;
  cpu::warpgroups.phases[barrier] = {};
  cpu::warpgroups.phases[barrier].expected = arrivals;
}
inline void mbarrier_init_fence() {}
inline void mbarrier_arrive(uint64_t* barrier) { cpu::phases_of(barrier).arrive(); }
inline void mbarrier_expect(uint64_t* barrier, int bytes) {
  auto& phases = cpu::phases_of(barrier);
  phases.bytes += bytes;
  phases.arrive();
}
inline void mbarrier_wait(uint64_t* barrier, uint32_t parity) {
  cpu::wait_until(
      [=] {
        auto& phases = cpu::phases_of(barrier);
        auto copies = std::move(phases.copies);
        phases.copies.clear();
        for (auto& copy : copies) copy();
        return phases.parity != parity;
      },
      __LINE__);
}

inline void tma_load_3d(void* shared, const TensorMap* map, uint64_t* barrier, int x, int y, int z) {
  cpu::need_aligned(shared, 1024);
  cpu::MapFields m;
  std::memcpy(&m, map, sizeof m);
  if (m.rank != 3 || m.swizzle != 3 || m.box[0] != 64 || m.box[2] != 1) cpu::die("a map of another kind");
  auto copy = [=] {
    for (int row = 0; row < m.box[1]; ++row) {
      for (int col = 0; col < 64; ++col) {
        auto inside = [](long long i, uint64_t n) { return i >= 0 && uint64_t(i) < n; };
        bool real = inside(x + col, m.dims[0]) && inside(y + row, m.dims[1]) && inside(z, m.dims[2]);
        auto from = m.base + uint64_t(x + col) * 2 + uint64_t(y + row) * m.strides[0] + uint64_t(z) * m.strides[1];
        static_cast<bf16*>(shared)[row * 64 + ((col / 8) ^ (row & 7)) * 8 + col % 8] =
            real ? *reinterpret_cast<const bf16*>(from) : bf16(0);
      }
    }
    auto& phases = cpu::phases_of(barrier);
    phases.bytes -= m.box[1] * 128;
    phases.settle();
  };
  if (cpu::draw() & 1) {
    copy();
  } else {
    cpu::phases_of(barrier).copies.push_back(copy);
  }
}
inline void async_fence() {}

inline void barrier_sync(int number, int threads) { cpu::numbered(number, threads, true); }
inline void barrier_arrive(int number, int threads) { cpu::numbered(number, threads, false); }
template <int N> inline void registers_up() { static_assert(N % 8 == 0 && N <= 256); }
template <int N> inline void registers_down() { static_assert(N % 8 == 0 && N >= 24); }

inline void wgmma_fence() {}
inline void wgmma_commit() {
  auto& products = cpu::warpgroups.products[cpu::machine.current];
  products.groups.push_back(std::move(products.open));
  products.open.clear();
}
template <int N> inline void wgmma_wait() {
  __syncwarp();
  auto& groups = cpu::warpgroups.products[cpu::machine.current].groups;
  while (groups.size() > N) {
    for (auto& product : groups.front()) product();
    groups.pop_front();
  }
  __syncwarp();
}

inline uint64_t wgmma_rows(const void* at) { return reinterpret_cast<uintptr_t>(at); }
inline uint64_t wgmma_columns(const void* at, int next) {
  cpu::need_aligned(at, 1024);
  if (next % 1024 != 0) cpu::die("columns of an operand that are no multiple of 1024 bytes apart");
  return reinterpret_cast<uintptr_t>(at) | uint64_t(next / 1024) << 48;
}
template <int N> inline void wgmma_ss(float (&c)[N / 8][4], uint64_t a, uint64_t b, bool add) {
  float (*to)[4] = c;
  int row = int(cpu::machine.current / 32 % 4 * 16 + cpu::lane() / 4);
  cpu::warpgroups.products[cpu::machine.current].open.push_back([=] {
    cpu::multiply<N>(
        to, add, [=](int half, int k) { return cpu::along_rows(a, row + half * 8, k); },
        [=](int col, int k) { return cpu::along_rows(b, col, k); });
  });
}
template <int N>
inline void wgmma_rs_transposed(float (&c)[N / 8][4], const uint32_t (&a)[4], uint64_t b, bool add) {
  struct Words {
    uint32_t a[4];
  };
  cpu::post(Words{{a[0], a[1], a[2], a[3]}}, __LINE__);
  std::vector<float> rows(32);
  for (int i = 0; i < 32; ++i) {
    int half = i / 16, k = i % 16;
    auto words = cpu::given<Words>(cpu::lane() / 4 * 4 + unsigned(k % 8 / 2));
    rows[size_t(i)] = bf2f(bf16(words.a[half + 2 * (k / 8)] >> 16 * (k & 1)));
  }
  float (*to)[4] = c;
  cpu::warpgroups.products[cpu::machine.current].open.push_back([=] {
    cpu::multiply<N>(
        to, add, [&](int half, int k) { return rows[size_t(half * 16 + k)]; },
        [=](int col, int k) { return cpu::along_columns(b, col, k); });
  });
}
