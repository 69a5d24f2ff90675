// Tests of kernels against references in double precision, one source for the emulator (g++ -DPHALANX_EMULATOR) and for
// a GPU (nvcc -DPHALANX_ON_DEVICE). A test includes the kernels' file and this, and ends with `return finish();`.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

#ifdef PHALANX_ON_DEVICE
#include <cuda_runtime.h>
constexpr bool ON_DEVICE = true;
inline void must(cudaError_t e, const char* what) {
  if (e == cudaSuccess) return;
  std::printf("%s: %s\n", what, cudaGetErrorString(e));
  std::exit(99);
}
#define LAUNCH(kernel, grid, block, shared_bytes, ...)                                                             \
  do {                                                                                                             \
    if ((shared_bytes) > (48 << 10)) {                                                                             \
      must(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (shared_bytes)), "attribute"); \
    }                                                                                                              \
    kernel<<<grid, block, shared_bytes>>>(__VA_ARGS__);                                                            \
    must(cudaGetLastError(), #kernel);                                                                             \
    must(cudaDeviceSynchronize(), #kernel);                                                                        \
  } while (0)
#else
constexpr bool ON_DEVICE = false;
#define LAUNCH(kernel, grid, block, shared_bytes, ...) \
  cpu::launch_raw([&] { kernel(__VA_ARGS__); }, grid, block, shared_bytes, #kernel)
#endif

// Memory that kernels see, with a guard on either side. New memory is all ones, which is NaN.
template <class T> class Buffer {
 public:
  explicit Buffer(size_t count) : count_(count) {
    take();
    poison();
  }
  Buffer(const std::vector<T>& from) : count_(from.size()) {
    take();
    write(from);
  }
  Buffer(const Buffer&) = delete;
  ~Buffer() {
#ifdef PHALANX_ON_DEVICE
    cudaFree(base_);
#endif
  }
  operator T*() const { return at_; }
  T* ptr() const { return at_; }
  size_t size() const { return count_; }
  void fill(int byte) {
#ifdef PHALANX_ON_DEVICE
    must(cudaMemset(at_, byte, count_ * sizeof(T)), "fill");
#else
    std::memset((void*)at_, byte, count_ * sizeof(T));
#endif
  }
  void poison() { fill(0xff); }
  void write(const std::vector<T>& from) { copy(at_, from.data(), count_ * sizeof(T), true); }
  std::vector<T> read() const {
    std::vector<unsigned char> all(bytes());
    copy(all.data(), base_, bytes(), false);
    for (size_t i = 0; i < bytes(); ++i) {
      if ((i < GUARD || i >= GUARD + count_ * sizeof(T)) && all[i] != 0xc3) {
        std::printf("FAILED: written outside of a buffer of %zu, %lld bytes from its start\n", count_,
                    (long long)i - (long long)GUARD);
        std::exit(98);
      }
    }
    std::vector<T> out(count_);
    if (count_ > 0) std::memcpy((void*)out.data(), all.data() + GUARD, count_ * sizeof(T));
    return out;
  }

 private:
  static constexpr size_t GUARD = 256;
  size_t bytes() const { return count_ * sizeof(T) + 2 * GUARD; }
  static void copy(void* to, const void* from, size_t bytes, bool) {
#ifdef PHALANX_ON_DEVICE
    must(cudaMemcpy(to, from, bytes, cudaMemcpyDefault), "copy");
#else
    if (bytes > 0) std::memcpy(to, from, bytes);
#endif
  }
  void take() {
#ifdef PHALANX_ON_DEVICE
    must(cudaMalloc(&base_, bytes()), "allocate");
    must(cudaMemset(base_, 0xc3, bytes()), "guard");
#else
    held_.resize(bytes() / 64 + 2);
    base_ = (unsigned char*)held_.data();
    std::memset(base_, 0xc3, bytes());
#endif
    at_ = (T*)(base_ + GUARD);
  }
  struct alignas(64) Line {
    unsigned char bytes[64];
  };
  size_t count_;
  unsigned char* base_ = nullptr;
  T* at_ = nullptr;
  std::vector<Line> held_;
};

// Uniform numbers that every machine draws alike.
struct Random {
  uint64_t state;
  explicit Random(uint64_t seed) : state(seed * 0x9e3779b97f4a7c15 + 1) {}
  uint64_t next() {
    uint64_t z = state += 0x9e3779b97f4a7c15;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
    z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
    return z ^ (z >> 31);
  }
  int below(int n) { return int(next() % uint64_t(n)); }
  // In [-1, 1).
  double unit() { return double(next() >> 11) * 0x1p-52 - 1.0; }
};

inline float host_bf2f(uint16_t x) {
  uint32_t bits = uint32_t(x) << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}
inline uint16_t host_f2bf(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
inline double number(float x) { return x; }
inline double number(double x) { return x; }
inline double number(uint16_t x) { return host_bf2f(x); }
inline double number(int x) { return x; }
inline void assign(float& to, double x) { to = float(x); }
inline void assign(double& to, double x) { to = x; }
inline void assign(uint16_t& to, double x) { to = host_f2bf(float(x)); }

// `count` elements of [offset - scale, offset + scale), rounded to T.
template <class T> std::vector<T> random_values(Random& r, size_t count, double scale = 1.0, double offset = 0.0) {
  std::vector<T> out(count);
  for (auto& x : out) assign(x, offset + scale * r.unit());
  return out;
}
template <class T> std::vector<double> numbers_of(const std::vector<T>& x) {
  std::vector<double> out;
  out.reserve(x.size());
  for (auto v : x) out.push_back(number(v));
  return out;
}
// How far apart neighbours are: what rounding once may cost, with room for sums in f32.
template <class T> double tolerance() { return sizeof(T) == 2 ? 4e-3 : 2e-6; }

inline int failures = 0, cases = 0;

inline void report(const std::string& name, bool good, double figure) {
  ++cases;
  failures += !good;
#ifndef PHALANX_ON_DEVICE
  if (FAULT != 0 && !good) std::exit(1);  // the fault was noticed
#endif
  if (!good || std::getenv("PHALANX_TEST_ALL") || ON_DEVICE) {
    std::printf("%s %s %.3g\n", good ? "ok    " : "FAILED", name.c_str(), figure);
    std::fflush(stdout);
  }
}

// ||out - expected|| / ||expected|| is at most `tolerance`; NaN fails.
template <class T>
void check(const std::string& name, const std::vector<T>& out, const std::vector<double>& expected, double tolerance) {
  double error = 0, norm = 0;
  bool sizes = out.size() == expected.size();
  for (size_t i = 0; sizes && i < out.size(); ++i) {
    double d = number(out[i]) - expected[i];
    error += d * d;
    norm += expected[i] * expected[i];
  }
  double relative = norm > 0 ? std::sqrt(error / norm) : std::sqrt(error);
  report(name, sizes && relative <= tolerance, relative);
}

// Equal bits; the figure is the first element that differs.
template <class T> void check_same(const std::string& name, const std::vector<T>& a, const std::vector<T>& b) {
  size_t i = 0;
  while (i < a.size() && i < b.size() && std::memcmp(&a[i], &b[i], sizeof(T)) == 0) ++i;
  report(name, i == a.size() && i == b.size(), double(i));
}

inline int finish() {
  std::printf("%d cases, %d failed\n", cases, failures);
  return failures > 0 ? 1 : 0;
}

// Runs a test under several schedules of the emulator, or once on a device.
template <class Test> void for_seeds(int count, Test test) {
  for (int seed = 1; seed <= (ON_DEVICE ? 1 : count); ++seed) {
#ifndef PHALANX_ON_DEVICE
    cpu::seed = uint64_t(seed);
#endif
    test(uint64_t(seed));
  }
}
