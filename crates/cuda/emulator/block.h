// Runs the threads of a block as fibers, one block after another.
//
// Barriers and warp instructions are rendezvous. Between them threads run in an order drawn from a seed, warps far
// ahead of each other, so that a missing barrier shows as a wrong result; a rendezvous that not all reach is reported.
#pragma once
#include <algorithm>
#include <cstdio>
#include <functional>
#include <memory>
#include <mutex>
#include <vector>

#include "fiber.h"

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace cpu {

constexpr unsigned WARP_LANES = 32;
constexpr size_t STACK_BYTES = 256 << 10;
constexpr size_t MAX_SHARED_BYTES = 227 << 10;  // of a block on sm_90

enum class State { Ready, Block, Warp, Condition, Done };

// An asynchronous copy that has not landed.
struct Copy {
  void* to;
  unsigned char bytes[16];
};

struct Thread {
  Context context;
  std::unique_ptr<unsigned char[]> stack;
  dim3 index;
  State state = State::Ready;
  int site = 0;       // the source line it waits at
  unsigned mask = 0;  // the lanes it waits for
  std::function<bool()> condition;
  alignas(16) unsigned char posted[64], held[64];  // what it gives to the warp, and gave at the last rendezvous
  std::vector<Copy> open;                // of the group that is not committed yet
  std::vector<std::vector<Copy>> groups;  // committed, oldest first
};

// One launch at a time; kernels see these by the names of CUDA.
struct Machine {
  std::vector<Thread> threads;
  Context scheduler;
  unsigned current = 0;
  dim3 grid, block, block_index;
  std::function<void()> kernel;
  std::vector<unsigned char> shared;
  uint64_t random = 1;
  const char* name = "kernel";
  std::mutex lock;
  std::vector<std::pair<void*, size_t>> static_shared;
};
inline Machine machine;
// Varies the schedule. A test that passes for one seed has seen one schedule.
inline uint64_t seed = 1;

inline Thread& self() { return machine.threads[machine.current]; }
inline unsigned lane() { return machine.current % WARP_LANES; }
inline unsigned warp_start() { return machine.current - lane(); }

inline uint64_t draw() {
  uint64_t z = machine.random += 0x9e3779b97f4a7c15;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
  z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
  return z ^ (z >> 31);
}

[[noreturn]] inline void die(const char* what) {
  auto& b = machine.block_index;
  std::fprintf(stderr, "emulator: %s: %s (block %u %u %u, thread %u)\n", machine.name, what, b.x, b.y, b.z,
               machine.current);
  for (unsigned i = 0, shown = 0; i < machine.threads.size() && shown < 8; ++i) {
    auto& t = machine.threads[i];
    if (i > 0 && t.state == machine.threads[i - 1].state && t.site == machine.threads[i - 1].site) continue;
    const char* names[] = {"is ready", "waits for the block", "waits for its warp", "waits for a condition", "is done"};
    std::fprintf(stderr, "  from thread %u on: %s, line %d\n", i, names[int(t.state)], t.site);
    ++shown;
  }
  std::fflush(nullptr);
  std::_Exit(99);
}

// Leaves the thread until it may go on.
inline void wait(State state, int site, unsigned mask = ~0u) {
  Thread& t = self();
  t.state = state;
  t.site = site;
  t.mask = mask;
  Context::swap(t.context, machine.scheduler);
}

// Leaves the thread until `ready()`; for barriers in memory.
template <class Ready> void wait_until(Ready ready, int site) {
  if (ready()) return;
  self().condition = ready;
  wait(State::Condition, site);
}

// Gives `value` to the lanes of the warp, and waits for all of `mask`. `given` reads it until the next rendezvous.
template <class T> void post(const T& value, int site, unsigned mask = ~0u) {
  static_assert(sizeof(T) <= sizeof(Thread::posted));
  std::memcpy(self().posted, &value, sizeof value);
  wait(State::Warp, site, mask);
}
template <class T> T given(unsigned lane) {
  unsigned from = warp_start() + lane % WARP_LANES;
  T value;
  std::memcpy(&value, machine.threads[from < machine.threads.size() ? from : machine.current].held, sizeof value);
  return value;
}
template <class T> T exchange(T value, unsigned lane, int site, unsigned mask = ~0u) {
  post(value, site, mask);
  return given<T>(lane);
}

inline void enter() {
  machine.kernel();
  self().state = State::Done;
  Context::swap(self().context, machine.scheduler);
  std::abort();
}

// Lets lanes go that have all of their masks waiting at one place.
inline bool release_warp(unsigned first, unsigned end) {
  bool any = false;
  for (unsigned i = first; i < end; ++i) {
    Thread& t = machine.threads[i];
    if (t.state != State::Warp) continue;
    bool all = true;
    for (unsigned j = first; j < end; ++j) {
      if (!(t.mask >> (j - first) & 1)) continue;
      Thread& other = machine.threads[j];
      if (other.state == State::Done) { machine.current = i; die("a warp instruction waits for a lane that has left"); }
      if (other.state == State::Warp && (other.site != t.site || other.mask != t.mask)) {
        machine.current = i;
        die("lanes of a warp meet at different instructions");
      }
      all &= other.state == State::Warp;
    }
    if (!all) continue;
    any = true;
    for (unsigned j = first; j < end; ++j) {
      if (!(t.mask >> (j - first) & 1)) continue;
      Thread& other = machine.threads[j];
      std::memcpy(other.held, other.posted, sizeof other.held);
      other.state = State::Ready;
    }
  }
  return any;
}

// Lets the block go if all threads that have not left wait at one barrier.
inline bool release_block() {
  const Thread* first = nullptr;
  for (auto& t : machine.threads) {
    if (t.state == State::Done) continue;
    if (t.state != State::Block) return false;
    if (first && first->site != t.site) die("threads of a block meet at different barriers");
    if (!first) first = &t;
  }
  for (auto& t : machine.threads) {
    if (t.state == State::Block) t.state = State::Ready;
  }
  return first != nullptr;
}

// Runs each lane of a warp that can, in an order that starts anywhere.
inline bool step_warp(unsigned first, unsigned end) {
  bool any = false;
  unsigned offset = unsigned(draw() % (end - first));
  for (unsigned k = 0; k < end - first; ++k) {
    unsigned i = first + (k + offset) % (end - first);
    Thread& t = machine.threads[i];
    if (t.state == State::Condition && t.condition()) t.state = State::Ready;
    if (t.state != State::Ready) continue;
    machine.current = i;
    any = true;
    Context::swap(machine.scheduler, t.context);
  }
  return release_warp(first, end) || any;
}

inline void run_block(size_t shared_bytes) {
  unsigned count = machine.block.x * machine.block.y * machine.block.z;
  if (machine.threads.size() != count) machine.threads = std::vector<Thread>(count);
  // Shared memory is not zero on a device either; the pattern is a NaN as f64, f32 pairs and a large number as integers.
  machine.shared.assign(shared_bytes + 1024, 0xff);
  for (auto& [at, bytes] : machine.static_shared) std::memset(at, 0xff, bytes);
  for (unsigned i = 0; i < count; ++i) {
    Thread& t = machine.threads[i];
    if (!t.stack) t.stack.reset(new unsigned char[STACK_BYTES]);
    t.index = dim3(i % machine.block.x, i / machine.block.x % machine.block.y, i / machine.block.x / machine.block.y);
    t.state = State::Ready;
    t.open.clear();
    t.groups.clear();
    t.context.start(t.stack.get(), STACK_BYTES, enter);
  }
  unsigned warps = (count + WARP_LANES - 1) / WARP_LANES, idle = 0;
  for (;;) {
    // A warp drawn at random runs on alone, through as many rendezvous as it can, before the next is drawn.
    unsigned first = unsigned(draw() % warps) * WARP_LANES, end = std::min(first + WARP_LANES, count);
    bool any = false;
    for (uint64_t stretch = 1 + draw() % 200; stretch > 0 && step_warp(first, end); --stretch) any = true;
    any |= release_block();
    idle = any ? 0 : idle + 1;
    if (idle <= 2 * warps) continue;
    // Unlucky draws, or nobody can go on: look at all.
    bool done = true, stuck = true;
    for (unsigned w = 0; w < warps; ++w) {
      if (step_warp(w * WARP_LANES, std::min((w + 1) * WARP_LANES, count))) stuck = false;
    }
    for (auto& t : machine.threads) done &= t.state == State::Done;
    if (done) return;
    if (stuck && !release_block()) die("a barrier that not all threads reach");
    idle = 0;
  }
}

// Runs `kernel` for every thread of the grid. Any thread may call it; launches take turns.
inline void launch_raw(std::function<void()> kernel, dim3 grid, dim3 block, size_t shared_bytes,
                       const char* name = "kernel") {
  std::lock_guard<std::mutex> alone(machine.lock);
  machine.name = name;
  machine.kernel = std::move(kernel);
  machine.grid = grid;
  machine.block = block;
  machine.random = seed;
  if (shared_bytes > MAX_SHARED_BYTES) die("more shared memory than a block can have");
  if (block.x * block.y * block.z > 1024) die("more than 1024 threads in a block");
  for (unsigned z = 0; z < grid.z; ++z) {
    for (unsigned y = 0; y < grid.y; ++y) {
      for (unsigned x = 0; x < grid.x; ++x) {
        machine.block_index = dim3(x, y, z);
        run_block(shared_bytes);
      }
    }
  }
}

inline void* dynamic_shared() {
  return reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(machine.shared.data()) + 1023) & ~uintptr_t(1023));
}

// A static array of a block that is poisoned before each.
template <class T, int COUNT> struct StaticShared {
  alignas(16) T items[COUNT];
  StaticShared() {
    std::memset((void*)items, 0xff, sizeof items);
    machine.static_shared.emplace_back(items, sizeof items);
  }
};

}  // namespace cpu
