// The stand-in driver's modules, functions and launches.
#include "cpu.h"
#include "driver.h"
#include "registry.h"

namespace driver {

namespace {
constexpr char MAGIC[] = "phalanx emulated code\n";

struct Module {
  std::string unit;
};
struct Function {
  const Kernel* kernel;
  unsigned allowed_shared = PLAIN_SHARED_BYTES;
};

std::set<void*>& modules() {
  static auto& live = *new std::set<void*>;
  return live;
}
std::map<const Kernel*, Function>& functions() {
  static auto& all = *new std::map<const Kernel*, Function>;
  return all;
}

Result function_of(void* handle, Function*& function) {
  Guard guard(lock());
  for (auto& [kernel, f] : functions()) {
    if (&f != handle) continue;
    function = &f;
    return SUCCESS;
  }
  return wrong(INVALID_HANDLE, "%p is no function", handle);
}

// The addresses of a launch, at the call and when it runs.
Result check_pointers(const Kernel& kernel, const Bound& bound) {
  for (size_t i = 0; i < bound.pointers.size(); ++i) {
    const void* p = bound.pointers[i];
    if (!p || on_card(reinterpret_cast<uint64_t>(p), 0)) continue;
    return wrong(ILLEGAL_ADDRESS, "%s: its pointer %zu, %p, lies in no live allocation", kernel.name.c_str(), i, p);
  }
  return SUCCESS;
}

// The line of a text that begins with `key`.
std::string line(const std::string& text, const std::string& key) {
  size_t at = text.find("\n" + key + " ");
  if (at == std::string::npos) return "";
  at += key.size() + 2;
  return text.substr(at, text.find('\n', at) - at);
}

// Whether code for an architecture such as sm_90a runs on the card.
bool runs(const std::string& arch) {
  if (arch.empty()) return true;
  int number = std::atoi(arch.c_str() + 3), own = 10 * settings().major;
  return arch.back() == 'a' ? number == own : number / 10 == settings().major && number <= own;
}
}  // namespace
}  // namespace driver

using namespace driver;

EXPORT int cuModuleLoadData(void** out, const void* image) {
  Context* context;
  if (Result result = current_unsafe(context, "cuModuleLoadData")) return result;
  if (std::strncmp(static_cast<const char*>(image), MAGIC, sizeof MAGIC - 1) != 0) {
    return wrong(INVALID_IMAGE, "a module that the emulated NVRTC did not make");
  }
  std::string text(static_cast<const char*>(image));
  if (!runs(line(text, "arch"))) return NO_BINARY_FOR_GPU;
  auto* module = new Module{line(text, "name")};
  Guard guard(lock());
  modules().insert(module);
  *out = module;
  return SUCCESS;
}
EXPORT int cuModuleLoadDataEx(void** out, const void* image, unsigned, void*, void*) {
  return cuModuleLoadData(out, image);
}

EXPORT int cuModuleUnload(void* handle) {
  Guard guard(lock());
  if (!modules().erase(handle)) return INVALID_HANDLE;
  delete static_cast<Module*>(handle);
  return SUCCESS;
}

// Kernels of the module's own file; of any, if no file has its name.
EXPORT int cuModuleGetFunction(void** out, void* handle, const char* name) {
  Context* context;
  if (Result result = current(context)) return result;
  Guard guard(lock());
  if (!modules().count(handle)) return wrong(INVALID_HANDLE, "%p is no module", handle);
  auto& unit = static_cast<Module*>(handle)->unit;
  bool known = false;
  for (auto& [_, kernel] : kernels()) known |= kernel.unit == unit;
  auto [first, last] = kernels().equal_range(name);
  for (auto i = first; i != last; ++i) {
    if (known && i->second.unit != unit) continue;
    auto& function = functions()[&i->second];
    function.kernel = &i->second;
    *out = &function;
    return SUCCESS;
  }
  return NOT_FOUND;
}

EXPORT int cuFuncSetAttribute(void* handle, int what, int value) {
  Function* function;
  if (Result result = function_of(handle, function)) return result;
  if (what == 9) return SUCCESS;  // a wish for the share of the L1 cache
  if (what != 8) return INVALID_VALUE;
  if (value < 0 || unsigned(value) > MAX_SHARED_BYTES) {
    return wrong(INVALID_VALUE, "%s: %d bytes of shared memory", function->kernel->name.c_str(), value);
  }
  function->allowed_shared = std::max(unsigned(value), PLAIN_SHARED_BYTES);
  return SUCCESS;
}

EXPORT int cuFuncGetAttribute(int* value, int what, void* handle) {
  Function* function;
  if (Result result = function_of(handle, function)) return result;
  *value = what == 0 ? int(MAX_THREADS) : what == 4 ? 32 : what == 8 ? int(function->allowed_shared) : 0;
  return SUCCESS;
}

EXPORT int cuOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, void* handle, int threads, size_t shared) {
  Function* function;
  if (Result result = function_of(handle, function)) return result;
  if (threads <= 0) return INVALID_VALUE;
  *blocks = std::min(2048 / threads, int(233472 / (shared + 1024)));
  return SUCCESS;
}

EXPORT int cuLaunchKernel(void* handle, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                          unsigned shared, void* on, void** parameters, void** extra) {
  Stream* stream;
  Function* function;
  if (Result result = stream_of(on, stream)) return result;
  if (Result result = function_of(handle, function)) return result;
  const Kernel& kernel = *function->kernel;
  const char* name = kernel.name.c_str();
  if (gx == 0 || gy == 0 || gz == 0 || bx == 0 || by == 0 || bz == 0 || gx > 0x7fffffffu || gy > 65535 || gz > 65535) {
    return wrong(INVALID_VALUE, "%s: a grid of %u x %u x %u", name, gx, gy, gz);
  }
  if (uint64_t(bx) * by * bz > MAX_THREADS) return wrong(INVALID_VALUE, "%s: blocks of %u x %u x %u", name, bx, by, bz);
  if (shared > function->allowed_shared) {
    return wrong(INVALID_VALUE, "%s: %u bytes of shared memory, it was allowed %u", name, shared, function->allowed_shared);
  }
  if (extra) return NOT_SUPPORTED;
  for (size_t i = 0; i < kernel.parameters; ++i) {
    if (!parameters || !parameters[i]) return wrong(INVALID_VALUE, "%s takes %zu parameters, got %zu", name, kernel.parameters, i);
  }
  auto bound = std::make_shared<Bound>(kernel.bind(kernel.function, parameters));
  if (Result result = check_pointers(kernel, *bound)) return lose(stream->context, result);
  return enqueue(stream, [=, &kernel] {
    if (Result result = check_pointers(kernel, *bound)) return result;
    cpu::launch_raw(bound->call, dim3(gx, gy, gz), dim3(bx, by, bz), shared, kernel.name.c_str());
    return SUCCESS;
  }, 1);
}

namespace {
// The public layouts of `CUlaunchAttribute` and `CUlaunchConfig`.
struct LaunchAttribute {
  int id, pad;
  union {
    char bytes[64];
    unsigned dims[3];
  };
};
struct LaunchConfig {
  unsigned grid[3], block[3], shared;
  void* stream;
  LaunchAttribute* attributes;
  unsigned count;
};
}  // namespace

EXPORT int cuLaunchKernelEx(const LaunchConfig* c, void* function, void** parameters, void** extra) {
  for (unsigned i = 0; i < c->count; ++i) {
    auto& a = c->attributes[i];
    if (a.id == 4 && a.dims[0] * a.dims[1] * a.dims[2] > 1) return wrong(NOT_SUPPORTED, "clusters of blocks");
  }
  return cuLaunchKernel(function, c->grid[0], c->grid[1], c->grid[2], c->block[0], c->block[1], c->block[2], c->shared,
                        c->stream, parameters, extra);
}
