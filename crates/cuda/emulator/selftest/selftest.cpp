// Tests the stand-in libraries as a program meets them: loaded by name, called by address.
// Usage: selftest FOLDER [CASE]; without a case it runs each in a process of its own.
#include <dlfcn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <string>
#include <thread>
#include <vector>

static std::string folder;

static void* library(const char* file) {
  void* l = dlopen((folder + "/" + file).c_str(), RTLD_NOW | RTLD_GLOBAL);
  if (!l) std::fprintf(stderr, "%s\n", dlerror()), std::exit(1);
  return l;
}
template <class... A> int call(const char* file, const char* name, A... arguments) {
  auto* f = reinterpret_cast<int (*)(A...)>(dlsym(library(file), name));
  if (!f) std::fprintf(stderr, "%s is missing\n", name), std::exit(1);
  return f(arguments...);
}
template <class... A> int cu(const char* name, A... a) { return call("libcuda.so.1", name, a...); }
template <class... A> int rtc(const char* name, A... a) { return call("libnvrtc.so.13", name, a...); }
template <class... A> int lt(const char* name, A... a) { return call("libcublasLt.so.13", name, a...); }

#define EXPECT(condition)                                                                \
  do {                                                                                   \
    if (!(condition)) {                                                                  \
      std::fprintf(stderr, "line %d: expected %s\n", __LINE__, #condition);              \
      std::exit(1);                                                                      \
    }                                                                                    \
  } while (0)
#define OK(call_) EXPECT((call_) == 0)

using Address = uint64_t;

static void start() {
  void* context;
  OK(cu("cuInit", 0u));
  OK(cu("cuDevicePrimaryCtxRetain", &context, 0));
  OK(cu("cuCtxSetCurrent", context));
}
static Address memory(size_t bytes) {
  Address p;
  OK(cu("cuMemAlloc_v2", &p, bytes));
  return p;
}
static void* stream() {
  void* s;
  OK(cu("cuStreamCreate", &s, 1u));
  return s;
}
static void* event() {
  void* e;
  OK(cu("cuEventCreate", &e, 2u));
  return e;
}
static void put(Address to, const std::vector<float>& x) { OK(cu("cuMemcpyHtoD_v2", to, (const void*)x.data(), 4 * x.size())); }
static std::vector<float> read(Address from, size_t n) {
  std::vector<float> x(n);
  OK(cu("cuMemcpyDtoH_v2", (void*)x.data(), from, 4 * n));
  return x;
}

static void* module(const char* name = "unit.cu", const char* arch = "--gpu-architecture=sm_90a", int expected = 0) {
  void *program, *loaded = nullptr;
  OK(rtc("nvrtcCreateProgram", &program, "text", name, 0, (void*)nullptr, (void*)nullptr));
  OK(rtc("nvrtcCompileProgram", program, 1, &arch));
  size_t bytes;
  OK(rtc("nvrtcGetCUBINSize", program, &bytes));
  std::vector<char> code(bytes);
  OK(rtc("nvrtcGetCUBIN", program, code.data()));
  OK(rtc("nvrtcDestroyProgram", &program));
  EXPECT(cu("cuModuleLoadData", &loaded, (const void*)code.data()) == expected);
  return loaded;
}
static void* function(const char* name) {
  static void* loaded = module();
  void* f;
  OK(cu("cuModuleGetFunction", &f, loaded, name));
  return f;
}
static int launch(void* f, unsigned block, unsigned shared, void* on, std::vector<void*> parameters) {
  return cu("cuLaunchKernel", f, 1u, 1u, 1u, block, 1u, 1u, shared, on, parameters.data(), (void**)nullptr);
}
static int times(void* on, Address x, long long n, float by) {
  return launch(function("double_it"), 32, 0, on, {&x, &n, &by});
}

static void runs_kernels() {
  start();
  Address x = memory(400), y = memory(1024);
  std::vector<float> data(256);
  for (size_t i = 0; i < data.size(); ++i) data[i] = float(i);
  Address z = memory(1024);
  put(z, data);
  void* s = stream();
  OK(launch(function("reverse_f32"), 256, 1024, s, {&z, &y}));
  OK(cu("cuStreamSynchronize", s));
  EXPECT(read(y, 256)[3] == 252);
  OK(cu("cuMemsetD32Async", x, 0x3f800000u, size_t(100), s));
  OK(times(s, x, 100, 3));
  OK(times(s, x, 50, 2));
  OK(cu("cuStreamSynchronize", s));
  EXPECT(read(x, 100)[49] == 6 && read(x, 100)[50] == 3);
  struct { int depth, radices[15]; } tree{2, {4, 7}};
  OK(launch(function("by_value"), 32, 0, s, {&x, &tree}));
  OK(cu("cuStreamSynchronize", s));
  EXPECT(read(x, 1)[0] == 7);
  void* unknown;
  EXPECT(cu("cuModuleGetFunction", &unknown, module(), "no_such_kernel") == 500);
  OK(cu("cuStreamDestroy_v2", s));
  EXPECT(cu("cuStreamSynchronize", s) == 400);
}

static void replays_graphs() {
  start();
  Address x = memory(4 * 64), y = memory(4 * 64);
  void *s = stream(), *t = stream(), *e = event(), *f = event(), *graph, *ready;
  function("double_it");
  put(x, std::vector<float>(64, 1));
  put(y, std::vector<float>(64, 1));
  OK(cu("cuStreamBeginCapture_v2", s, 1));
  OK(times(s, x, 64, 2));
  OK(cu("cuEventRecord", e, s));
  OK(cu("cuStreamWaitEvent", t, e, 0u));
  int status;
  OK(cu("cuStreamIsCapturing", t, &status));
  EXPECT(status == 1);
  OK(cu("cuMemcpyDtoDAsync_v2", y, x, size_t(128), t));
  OK(times(s, x + 128, 32, 5));
  OK(cu("cuEventRecord", f, t));
  OK(cu("cuStreamWaitEvent", s, f, 0u));
  OK(times(s, x, 64, 10));
  OK(cu("cuStreamEndCapture", s, &graph));
  EXPECT(read(x, 1)[0] == 1);
  size_t nodes = 0;
  OK(cu("cuGraphGetNodes", graph, (void**)nullptr, &nodes));
  EXPECT(nodes == 4);
  OK(cu("cuGraphInstantiateWithFlags", &ready, graph, 0ull));
  OK(cu("cuGraphDestroy", graph));
  for (int i = 0; i < 2; ++i) OK(cu("cuGraphLaunch", ready, s));
  OK(cu("cuStreamSynchronize", s));
  EXPECT(read(x, 64)[0] == 400 && read(x, 64)[63] == 10000);
  EXPECT(read(y, 64)[0] == 40 && read(y, 64)[32] == 1);
  OK(cu("cuGraphExecDestroy", ready));
}

// Events that are nodes of a graph tell the time of its last run; others of a recording tell nothing.
static void tells_times_of_graphs() {
  start();
  Address x = memory(4 * 64);
  void *s = stream(), *none = event(), *from, *to, *graph, *ready;
  float first = -1, second = -1;
  OK(cu("cuEventCreate", &from, 0u));
  OK(cu("cuEventCreate", &to, 0u));
  EXPECT(cu("cuEventRecordWithFlags", from, s, 1u) == 1);
  function("double_it");
  put(x, std::vector<float>(64, 1));
  OK(cu("cuStreamBeginCapture_v2", s, 1));
  OK(cu("cuEventRecordWithFlags", from, s, 1u));
  OK(times(s, x, 64, 2));
  OK(cu("cuEventRecordWithFlags", to, s, 1u));
  OK(cu("cuEventRecord", none, s));
  OK(cu("cuStreamEndCapture", s, &graph));
  OK(cu("cuGraphInstantiateWithFlags", &ready, graph, 0ull));
  EXPECT(cu("cuEventElapsedTime", &first, from, to) == 600);
  OK(cu("cuGraphLaunch", ready, s));
  OK(cu("cuStreamSynchronize", s));
  OK(cu("cuEventElapsedTime", &first, from, to));
  OK(cu("cuGraphLaunch", ready, s));
  OK(cu("cuStreamSynchronize", s));
  OK(cu("cuEventElapsedTime", &second, from, to));
  EXPECT(first > 0 && second > 0 && first != second);
  EXPECT(cu("cuEventElapsedTime", &first, from, none) == 907);
  OK(cu("cuEventRecord", none, s));
  OK(cu("cuStreamSynchronize", s));
  EXPECT(cu("cuEventElapsedTime", &first, from, none) == 400);
}

static void refuses_recordings() {
  start();
  Address x = memory(256);
  void *s = stream(), *t = stream(), *e = event(), *graph;
  std::vector<float> pageable(64);
  function("double_it");
  auto spoiled = [&](std::function<int()> what, int expected) {
    OK(cu("cuStreamBeginCapture_v2", s, 1));
    EXPECT(what() == expected);
    EXPECT(cu("cuStreamEndCapture", s, &graph) == 901);
  };
  spoiled([&] { return cu("cuMemcpyHtoDAsync_v2", x, (const void*)pageable.data(), size_t(256), s); }, 900);
  spoiled([&] { return cu("cuStreamSynchronize", s); }, 900);
  spoiled([&] { Address y; return cu("cuMemAlloc_v2", &y, size_t(16)); }, 900);
  spoiled([&] { return times(nullptr, x, 64, 2); }, 906);
  OK(cu("cuStreamBeginCapture_v2", s, 1));
  OK(cu("cuEventRecord", e, s));
  OK(cu("cuStreamWaitEvent", t, e, 0u));
  OK(times(t, x, 64, 2));
  EXPECT(cu("cuStreamEndCapture", s, &graph) == 904);
}

static void refuses_bad_calls() {
  start();
  Address x = memory(256);
  std::vector<float> host(1024);
  EXPECT(cu("cuMemcpyHtoD_v2", x, (const void*)host.data(), size_t(257)) == 1);
  EXPECT(cu("cuMemcpyDtoH_v2", (void*)host.data(), x + 255, size_t(2)) == 1);
  EXPECT(cu("cuMemsetD8Async", x + 256, (unsigned char)0, size_t(1), (void*)nullptr) == 1);
  EXPECT(launch(function("reverse_f32"), 1056, 0, nullptr, {&x, &x}) == 1);
  EXPECT(launch(function("reverse_f32"), 32, 50000, nullptr, {&x, &x}) == 1);
  OK(cu("cuFuncSetAttribute", function("reverse_f32"), 8, 50000));
  OK(launch(function("reverse_f32"), 32, 50000, nullptr, {&x, &x}));
  EXPECT(cu("cuFuncSetAttribute", function("reverse_f32"), 8, 232449) == 1);
  EXPECT(launch(nullptr, 32, 0, nullptr, {&x}) == 400);
  EXPECT(launch(function("reverse_f32"), 32, 0, nullptr, {&x, nullptr}) == 1);
  Address big;
  EXPECT(cu("cuMemAlloc_v2", &big, size_t(3) << 30) == 2);
  size_t free = 0, total = 0;
  OK(cu("cuMemGetInfo_v2", &free, &total));
  EXPECT(total == size_t(1) << 30 && free == total - 256);
  module("unit.cu", "--gpu-architecture=sm_100a", 209);
  EXPECT(cu("cuModuleLoadData", &host, (const void*)"\x7f" "ELF") == 200);
  int elsewhere = 0;
  std::thread([&] { elsewhere = cu("cuStreamSynchronize", (void*)nullptr); }).join();
  EXPECT(elsewhere == 201);
  OK(cu("cuMemFree_v2", x));
  EXPECT(cu("cuMemFree_v2", x) == 1);
  // A kernel that would touch what was freed loses the card, as an illegal address does.
  EXPECT(times(nullptr, x, 64, 2) == 700);
  EXPECT(cu("cuStreamSynchronize", (void*)nullptr) == 700);
}

static void maps_tensors() {
  start();
  constexpr int BF16_ELEMENTS = 9, SWIZZLE_128 = 3;
  alignas(64) char map[128];
  Address x = memory(2 * 64 * 32 * 3);
  uint64_t dims[] = {64, 32, 3}, strides[] = {128, 4096};
  unsigned box[] = {64, 16, 1}, steps[] = {1, 1, 1};
  auto encode = [&](int elements, Address at, int swizzle) {
    return cu("cuTensorMapEncodeTiled", (void*)map, elements, 3u, at, (const uint64_t*)dims, (const uint64_t*)strides,
              (const unsigned*)box, (const unsigned*)steps, 0, swizzle, 0, 0);
  };
  OK(encode(BF16_ELEMENTS, x, SWIZZLE_128));
  EXPECT(encode(BF16_ELEMENTS, x + 2, SWIZZLE_128) == 1);
  EXPECT(encode(BF16_ELEMENTS, x, SWIZZLE_128 - 1) == 1);
  dims[2] = 4;
  EXPECT(encode(BF16_ELEMENTS, x, SWIZZLE_128) == 1);
}

static float rounded(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  bits = (bits + 0x7fff + (bits >> 16 & 1)) & 0xffff0000;
  std::memcpy(&x, &bits, 4);
  return x;
}

// D = op(A) op(B) + C + bias, against sums in f64.
static void multiplies() {
  start();
  constexpr int M = 13, N = 6, K = 21, BATCHES = 2, PAD = 3;
  void *handle, *s = stream();
  OK(lt("cublasLtCreate", &handle));
  for (int form = 0; form < 16; ++form) {
    int left_op = form & 1, right_op = form >> 1 & 1, narrow = form >> 2 & 1, acc = form >> 3 & 1;
    int type = narrow ? 14 : 0, size = narrow ? 2 : 4;
    uint32_t state = 1 + uint32_t(form);
    auto make = [&](int n, std::vector<float>& x) {
      x.resize(size_t(n));
      std::vector<uint16_t> half(x.size());
      for (size_t i = 0; i < x.size(); ++i) {
        state = state * 1664525 + 1013904223;
        x[i] = float(int(state >> 16) % 2000 - 1000) / 1000;
        if (narrow) x[i] = rounded(x[i]);
        uint32_t bits;
        std::memcpy(&bits, &x[i], 4);
        half[i] = uint16_t(bits >> 16);
      }
      Address p = memory(size_t(n) * 4);
      const void* from = narrow ? (const void*)half.data() : (const void*)x.data();
      OK(cu("cuMemcpyHtoD_v2", p, from, size_t(n * size)));
      return p;
    };
    int a_rows = left_op ? K : M, a_cols = left_op ? M : K, b_rows = right_op ? N : K, b_cols = right_op ? K : N;
    int lda = a_rows + PAD, ldb = b_rows + PAD, ldc = M, stride_a = lda * a_cols, stride_b = ldb * b_cols, stride_c = ldc * N;
    std::vector<float> a, b, c, bias;
    Address pa = make(stride_a * BATCHES, a), pb = make(stride_b * BATCHES, b), pc = make(stride_c * BATCHES, c);
    Address pbias = make(M, bias), pd = memory(size_t(stride_c * BATCHES * 4)), workspace = memory(1024);
    void *product, *la, *lb, *lc;
    OK(lt("cublasLtMatmulDescCreate", &product, 68, 0));
    int epilogue = 4;
    OK(lt("cublasLtMatmulDescSetAttribute", product, 3, (const void*)&left_op, size_t(4)));
    OK(lt("cublasLtMatmulDescSetAttribute", product, 4, (const void*)&right_op, size_t(4)));
    OK(lt("cublasLtMatmulDescSetAttribute", product, 7, (const void*)&epilogue, size_t(4)));
    OK(lt("cublasLtMatmulDescSetAttribute", product, 8, (const void*)&pbias, size_t(8)));
    auto layout = [&](void** out, int rows, int cols, int ld, int64_t batch) {
      int batches = BATCHES;
      OK(lt("cublasLtMatrixLayoutCreate", out, type, uint64_t(rows), uint64_t(cols), int64_t(ld)));
      OK(lt("cublasLtMatrixLayoutSetAttribute", *out, 5, (const void*)&batches, size_t(4)));
      OK(lt("cublasLtMatrixLayoutSetAttribute", *out, 6, (const void*)&batch, size_t(8)));
    };
    layout(&la, a_rows, a_cols, lda, stride_a);
    layout(&lb, b_rows, b_cols, ldb, stride_b);
    layout(&lc, M, N, ldc, stride_c);
    void* preference;
    OK(lt("cublasLtMatmulPreferenceCreate", &preference));
    struct { uint64_t algorithm[8]; size_t workspace; int status; float waves; int reserved[4]; } heuristic;
    int found;
    OK(lt("cublasLtMatmulAlgoGetHeuristic", handle, product, la, lb, lc, lc, preference, 1, (void*)&heuristic, &found));
    EXPECT(found == 1 && heuristic.workspace == 0);
    float one = 1, beta = float(acc);
    auto multiply = [&] {
      return lt("cublasLtMatmul", handle, product, (const void*)&one, pa, la, pb, lb, (const void*)&beta, pc, lc, pd, lc,
                (const void*)&heuristic, workspace, size_t(1024), s);
    };
    void *graph, *ready;
    OK(cu("cuStreamBeginCapture_v2", s, 1));
    OK(multiply());
    OK(cu("cuStreamEndCapture", s, &graph));
    OK(cu("cuGraphInstantiateWithFlags", &ready, graph, 0ull));
    OK(cu("cuGraphLaunch", ready, s));
    OK(cu("cuStreamSynchronize", s));
    std::vector<float> d(size_t(stride_c * BATCHES));
    std::vector<uint16_t> half(d.size());
    OK(cu("cuMemcpyDtoH_v2", narrow ? (void*)half.data() : (void*)d.data(), pd, d.size() * size_t(size)));
    double error = 0, norm = 0;
    for (int batch = 0; batch < BATCHES; ++batch) {
      for (int j = 0; j < N; ++j) {
        for (int i = 0; i < M; ++i) {
          double sum = bias[size_t(i)];
          for (int k = 0; k < K; ++k) {
            sum += double(a[size_t(batch * stride_a + (left_op ? i * lda + k : k * lda + i))]) *
                   b[size_t(batch * stride_b + (right_op ? k * ldb + j : j * ldb + k))];
          }
          size_t at = size_t(batch * stride_c + j * ldc + i);
          if (acc) sum += c[at];
          if (narrow) {
            uint32_t bits = uint32_t(half[at]) << 16;
            std::memcpy(&d[at], &bits, 4);
          }
          error += (d[at] - sum) * (d[at] - sum);
          norm += sum * sum;
        }
      }
    }
    EXPECT(std::sqrt(error / norm) < (narrow ? 4e-3 : 1e-6));
    // An inner dim that does not fit.
    EXPECT(lt("cublasLtMatmulAlgoGetHeuristic", handle, product, la, lc, lc, lc, preference, 1, (void*)&heuristic, &found) == 7);
  }
}

static void has_no_device() {
  EXPECT(cu("cuInit", 0u) == 100);
}
static void has_an_old_driver() {
  int version;
  OK(cu("cuDriverGetVersion", &version));
  EXPECT(version == 11040);
}
static void is_old() {
  start();
  int major;
  OK(cu("cuDeviceGetAttribute", &major, 75, 0));
  EXPECT(major == 7);
}
static void is_lost() {
  start();
  Address x = memory(256);
  OK(times(nullptr, x, 64, 2));
  OK(times(nullptr, x, 64, 2));
  EXPECT(times(nullptr, x, 64, 2) == 214);
  EXPECT(cu("cuStreamSynchronize", (void*)nullptr) == 214);
  const char* name;
  OK(cu("cuGetErrorName", 214, &name));
  EXPECT(std::string(name) == "CUDA_ERROR_ECC_UNCORRECTABLE");
}
static void two_cards() {
  void *first, *second;
  int count;
  OK(cu("cuInit", 0u));
  OK(cu("cuDeviceGetCount", &count));
  EXPECT(count == 2);
  OK(cu("cuDevicePrimaryCtxRetain", &first, 0));
  OK(cu("cuDevicePrimaryCtxRetain", &second, 1));
  EXPECT(first != second);
  OK(cu("cuCtxSetCurrent", first));
  void* s = stream();
  OK(cu("cuCtxSetCurrent", second));
  EXPECT(cu("cuStreamSynchronize", s) == 400);
  OK(cu("cuCtxSetCurrent", first));
  OK(cu("cuDevicePrimaryCtxRelease_v2", 0));
  EXPECT(cu("cuStreamSynchronize", s) == 709);
}

#if __has_include("collectives.h")
#include "collectives.h"
#endif

struct Case {
  const char* name;
  void (*run)();
  std::vector<const char*> environment;
};
static const std::vector<Case> cases = {
    {"runs_kernels", runs_kernels, {}},
    {"runs_kernels_async", runs_kernels, {"PHALANX_EMULATED_STREAMS=async"}},
    {"tells_times_of_graphs", tells_times_of_graphs, {}},
    {"tells_times_of_graphs_async", tells_times_of_graphs, {"PHALANX_EMULATED_STREAMS=async"}},
    {"replays_graphs", replays_graphs, {}},
    {"replays_graphs_async", replays_graphs, {"PHALANX_EMULATED_STREAMS=async", "PHALANX_EMULATED_ORDER=5"}},
    {"refuses_recordings", refuses_recordings, {}},
    {"refuses_bad_calls", refuses_bad_calls, {}},
    {"maps_tensors", maps_tensors, {}},
    {"multiplies", multiplies, {}},
    {"has_no_device", has_no_device, {"PHALANX_EMULATED_FAULT=no-device"}},
    {"hides_devices", has_no_device, {"CUDA_VISIBLE_DEVICES="}},
    {"has_an_old_driver", has_an_old_driver, {"PHALANX_EMULATED_FAULT=old-driver"}},
    {"is_old", is_old, {"PHALANX_EMULATED_FAULT=sm70"}},
    {"is_lost", is_lost, {"PHALANX_EMULATED_FAULT=lost-after:3"}},
    {"two_cards", two_cards, {"PHALANX_EMULATED_GPUS=2"}},
#ifdef COLLECTIVES
    COLLECTIVES
#endif
};

int main(int count, char** words) {
  folder = words[1];
  int failed = 0;
  for (auto& c : cases) {
    if (count > 2 && std::string(words[2]) != c.name) continue;
    std::fflush(nullptr);
    pid_t child = fork();
    if (child == 0) {
      for (auto* e : c.environment) putenv(const_cast<char*>(e));
      c.run();
      std::fflush(nullptr);
      std::_Exit(0);
    }
    int status;
    waitpid(child, &status, 0);
    std::printf("%s: %s\n", c.name, status == 0 ? "ok" : "FAILED");
    failed += status != 0;
  }
  return failed != 0;
}
