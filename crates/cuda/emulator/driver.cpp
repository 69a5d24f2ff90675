// A stand-in for libcuda.so.1: host memory for a card's, and kernels that the emulator runs. Here: cards, contexts, errors.
//
// PHALANX_EMULATED_GPUS (1) and PHALANX_EMULATED_BYTES (1 GiB) size it, CUDA_VISIBLE_DEVICES hides cards,
// PHALANX_EMULATED_STREAMS=async gives every stream a thread of its own, PHALANX_EMULATED_ORDER=SEED runs the nodes of a
// graph in an order drawn among those that its events allow. PHALANX_EMULATED_FAULT is one of no-device, old-driver, sm70,
// lost-after:N, failed-after:N (launch N and all calls after it); nvrtc.cpp and cublaslt.cpp have more.
#include "driver.h"

#include <dlfcn.h>

#include <algorithm>
#include <cstdarg>
#include <cstdlib>
#include <cstring>

namespace driver {

namespace {
std::string environment(const char* key) {
  const char* value = std::getenv(key);
  return value ? value : "";
}
bool initialised = false;
// Never destroyed, as nothing here is: threads may still be at work when the process ends.
auto& contexts = *new std::vector<std::unique_ptr<Context>>;
thread_local std::vector<Context*> stack;
}  // namespace

Settings::Settings() {
  auto number = [](const char* key, long otherwise) {
    std::string text = environment(key);
    return text.empty() ? otherwise : std::atol(text.c_str());
  };
  int count = int(number("PHALANX_EMULATED_GPUS", 1));
  if (const char* visible = std::getenv("CUDA_VISIBLE_DEVICES")) {
    // As the driver does: the list ends at the first entry that is no card.
    for (const char* at = visible; *at;) {
      char* end;
      long card = std::strtol(at, &end, 10);
      if (end == at || card < 0 || card >= count) break;
      cards.push_back(int(card));
      at = *end == ',' ? end + 1 : end + std::strlen(end);
    }
  } else {
    for (int i = 0; i < count; ++i) cards.push_back(i);
  }
  bytes = size_t(number("PHALANX_EMULATED_BYTES", 1L << 30));
  asynchronous = environment("PHALANX_EMULATED_STREAMS") == "async";
  order = uint64_t(number("PHALANX_EMULATED_ORDER", 0));
  std::string fault = environment("PHALANX_EMULATED_FAULT");
  if (fault == "no-device") no_device = true;
  if (fault == "old-driver") version = 11040;
  if (fault == "sm70") major = 7;
  if (fault.rfind("lost-after:", 0) == 0) fails_at = std::atol(fault.c_str() + 11);
  if (fault.rfind("failed-after:", 0) == 0) {
    fails_at = std::atol(fault.c_str() + 13);
    failure = LAUNCH_FAILED;
  }
}

const Settings& settings() {
  static Settings settings;
  return settings;
}

std::recursive_mutex& lock() {
  static auto& lock = *new std::recursive_mutex;
  return lock;
}

Result wrong(Result result, const char* format, ...) {
  char text[512];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  std::fprintf(stderr, "emulated driver: %s\n", text);
  return result;
}

Result current(Context*& context) {
  Guard guard(lock());
  if (!initialised) return NOT_INITIALIZED;
  if (stack.empty() || !stack.back()) return wrong(INVALID_CONTEXT, "no context is current on this thread");
  context = stack.back();
  if (context->references == 0) return wrong(CONTEXT_IS_DESTROYED, "the context of this thread was released");
  return context->lost;
}

Result current_unsafe(Context*& context, const char* call) {
  if (Result result = current(context)) return result;
  if (spoil_recordings()) return wrong(CAPTURE_UNSUPPORTED, "%s while this thread records", call);
  return SUCCESS;
}

Result lose(Context* context, Result why) {
  Guard guard(lock());
  if (!context->lost) context->lost = why;
  return context->lost;
}

Result count_launches(Context* context, int kernels) {
  Guard guard(lock());
  context->launches += kernels;
  if (settings().fails_at >= 0 && context->launches >= settings().fails_at && kernels > 0) {
    return lose(context, settings().failure);
  }
  return SUCCESS;
}

void free_all(Context* context);

namespace {
Result device(int ordinal, Context*& context) {
  if (!initialised) return NOT_INITIALIZED;
  if (ordinal < 0 || size_t(ordinal) >= contexts.size()) return INVALID_DEVICE;
  context = contexts[size_t(ordinal)].get();
  return SUCCESS;
}

int attribute(int what, int card) {
  switch (what) {
    case 1: case 2: case 3: return int(MAX_THREADS);  // threads of a block, in x and y
    case 4: return 64;
    case 5: return 0x7fffffff;                         // blocks of a grid
    case 6: case 7: return 65535;
    case 8: return int(PLAIN_SHARED_BYTES);
    case 10: return 32;                                // lanes of a warp
    case 12: case 82: return 65536;                    // registers
    case 13: case 36: return 1000000;                  // kHz
    case 16: return 4;                                 // multiprocessors
    case 19: case 31: case 41: case 95: return 1;
    case 33: return card + 1;                          // PCI bus
    case 37: return 64;
    case 38: return 1 << 20;                           // L2
    case 39: return 2048;
    case 40: return 2;
    case 75: return settings().major;
    case 81: return 233472;
    case 97: return int(MAX_SHARED_BYTES);
    case 106: return 32;
    case 111: return 1024;
    default: return 0;
  }
}

const std::pair<int, const char*> NAMES[] = {
    {SUCCESS, "CUDA_SUCCESS"}, {INVALID_VALUE, "CUDA_ERROR_INVALID_VALUE"},
    {OUT_OF_MEMORY, "CUDA_ERROR_OUT_OF_MEMORY"}, {NOT_INITIALIZED, "CUDA_ERROR_NOT_INITIALIZED"},
    {NO_DEVICE, "CUDA_ERROR_NO_DEVICE"}, {INVALID_DEVICE, "CUDA_ERROR_INVALID_DEVICE"},
    {INVALID_IMAGE, "CUDA_ERROR_INVALID_IMAGE"}, {INVALID_CONTEXT, "CUDA_ERROR_INVALID_CONTEXT"},
    {NO_BINARY_FOR_GPU, "CUDA_ERROR_NO_BINARY_FOR_GPU"}, {ECC_UNCORRECTABLE, "CUDA_ERROR_ECC_UNCORRECTABLE"},
    {INVALID_HANDLE, "CUDA_ERROR_INVALID_HANDLE"}, {NOT_FOUND, "CUDA_ERROR_NOT_FOUND"},
    {NOT_READY, "CUDA_ERROR_NOT_READY"}, {ILLEGAL_ADDRESS, "CUDA_ERROR_ILLEGAL_ADDRESS"},
    {LAUNCH_OUT_OF_RESOURCES, "CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES"},
    {CONTEXT_IS_DESTROYED, "CUDA_ERROR_CONTEXT_IS_DESTROYED"}, {LAUNCH_FAILED, "CUDA_ERROR_LAUNCH_FAILED"},
    {NOT_SUPPORTED, "CUDA_ERROR_NOT_SUPPORTED"}, {CAPTURE_UNSUPPORTED, "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED"},
    {CAPTURE_INVALIDATED, "CUDA_ERROR_STREAM_CAPTURE_INVALIDATED"}, {CAPTURE_MERGE, "CUDA_ERROR_STREAM_CAPTURE_MERGE"},
    {CAPTURE_UNMATCHED, "CUDA_ERROR_STREAM_CAPTURE_UNMATCHED"}, {CAPTURE_UNJOINED, "CUDA_ERROR_STREAM_CAPTURE_UNJOINED"},
    {CAPTURE_IMPLICIT, "CUDA_ERROR_STREAM_CAPTURE_IMPLICIT"}, {CAPTURED_EVENT, "CUDA_ERROR_CAPTURED_EVENT"},
    {CAPTURE_WRONG_THREAD, "CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD"},
};
const char* name_of(int result) {
  for (auto& [number, name] : NAMES) {
    if (number == result) return name;
  }
  return nullptr;
}
}  // namespace
}  // namespace driver

using namespace driver;

EXPORT int cuInit(unsigned flags) {
  Guard guard(lock());
  if (flags != 0) return INVALID_VALUE;
  if (settings().no_device || settings().cards.empty()) return NO_DEVICE;
  for (size_t i = contexts.size(); i < settings().cards.size(); ++i) {
    contexts.emplace_back(new Context);
    contexts[i]->ordinal = int(i);
    contexts[i]->legacy.reset(new Stream);
    contexts[i]->legacy->context = contexts[i].get();
  }
  initialised = true;
  return SUCCESS;
}

EXPORT int cuDriverGetVersion(int* version) {
  *version = settings().version;
  return SUCCESS;
}

EXPORT int cuGetErrorName(int result, const char** name) {
  *name = name_of(result);
  return *name ? SUCCESS : INVALID_VALUE;
}

EXPORT int cuGetErrorString(int result, const char** text) {
  static std::map<int, std::string> texts;
  Guard guard(lock());
  const char* name = name_of(result);
  *text = nullptr;
  if (!name) return INVALID_VALUE;
  auto& kept = texts[result];
  if (kept.empty()) {
    kept = name + (result == SUCCESS ? 5 : 11);
    std::transform(kept.begin(), kept.end(), kept.begin(), [](char c) { return c == '_' ? ' ' : char(std::tolower(c)); });
  }
  *text = kept.c_str();
  return SUCCESS;
}

EXPORT int cuDeviceGetCount(int* count) {
  Guard guard(lock());
  if (!initialised) return NOT_INITIALIZED;
  *count = int(contexts.size());
  return SUCCESS;
}

EXPORT int cuDeviceGet(int* out, int ordinal) {
  Guard guard(lock());
  Context* context;
  if (Result result = device(ordinal, context)) return result;
  *out = ordinal;
  return SUCCESS;
}

EXPORT int cuDeviceGetName(char* name, int len, int ordinal) {
  Guard guard(lock());
  Context* context;
  if (Result result = device(ordinal, context)) return result;
  std::snprintf(name, size_t(len), "Emulated GPU");
  return SUCCESS;
}

EXPORT int cuDeviceGetAttribute(int* value, int what, int ordinal) {
  Guard guard(lock());
  Context* context;
  if (Result result = device(ordinal, context)) return result;
  *value = attribute(what, settings().cards[size_t(ordinal)]);
  return SUCCESS;
}

EXPORT int cuDeviceTotalMem_v2(size_t* bytes, int ordinal) {
  Guard guard(lock());
  Context* context;
  if (Result result = device(ordinal, context)) return result;
  *bytes = settings().bytes;
  return SUCCESS;
}

EXPORT int cuDeviceGetUuid_v2(char* uuid, int ordinal) {
  Guard guard(lock());
  Context* context;
  if (Result result = device(ordinal, context)) return result;
  std::memcpy(uuid, "emulated GPU\0\0\0\0", 16);
  uuid[15] = char(settings().cards[size_t(ordinal)]);
  return SUCCESS;
}
EXPORT int cuDeviceGetUuid(char* uuid, int ordinal) { return cuDeviceGetUuid_v2(uuid, ordinal); }

EXPORT int cuDeviceGetPCIBusId(char* text, int len, int ordinal) {
  Guard guard(lock());
  Context* context;
  if (Result result = device(ordinal, context)) return result;
  std::snprintf(text, size_t(len), "0000:%02x:00.0", unsigned(settings().cards[size_t(ordinal)] + 1));
  return SUCCESS;
}

EXPORT int cuDeviceCanAccessPeer(int* can, int, int) {
  *can = 1;
  return SUCCESS;
}

EXPORT int cuDevicePrimaryCtxRetain(void** out, int ordinal) {
  Guard guard(lock());
  Context* context;
  if (Result result = device(ordinal, context)) return result;
  ++context->references;
  *out = context;
  return SUCCESS;
}

EXPORT int cuDevicePrimaryCtxReset_v2(int ordinal) {
  Guard guard(lock());
  Context* context;
  if (Result result = device(ordinal, context)) return result;
  free_all(context);
  context->lost = SUCCESS;
  return SUCCESS;
}

EXPORT int cuDevicePrimaryCtxRelease_v2(int ordinal) {
  Guard guard(lock());
  Context* context;
  if (Result result = device(ordinal, context)) return result;
  if (context->references == 0) return INVALID_CONTEXT;
  if (--context->references == 0) free_all(context);
  return SUCCESS;
}

EXPORT int cuDevicePrimaryCtxSetFlags_v2(int ordinal, unsigned) {
  Guard guard(lock());
  Context* context;
  return device(ordinal, context);
}

EXPORT int cuDevicePrimaryCtxGetState(int ordinal, unsigned* flags, int* active) {
  Guard guard(lock());
  Context* context;
  if (Result result = device(ordinal, context)) return result;
  *flags = 0;
  *active = context->references > 0;
  return SUCCESS;
}

namespace {
bool is_context(void* p) {
  return std::any_of(contexts.begin(), contexts.end(), [&](auto& c) { return c.get() == p; });
}
}  // namespace

EXPORT int cuCtxSetCurrent(void* context) {
  Guard guard(lock());
  if (!initialised) return NOT_INITIALIZED;
  if (context && !is_context(context)) return wrong(INVALID_CONTEXT, "cuCtxSetCurrent of what is no context");
  if (!stack.empty()) stack.pop_back();
  if (context) stack.push_back(static_cast<Context*>(context));
  return SUCCESS;
}

EXPORT int cuCtxGetCurrent(void** context) {
  if (!initialised) return NOT_INITIALIZED;
  *context = stack.empty() ? nullptr : stack.back();
  return SUCCESS;
}

EXPORT int cuCtxPushCurrent_v2(void* context) {
  Guard guard(lock());
  if (!initialised) return NOT_INITIALIZED;
  if (!is_context(context)) return INVALID_CONTEXT;
  stack.push_back(static_cast<Context*>(context));
  return SUCCESS;
}

EXPORT int cuCtxPopCurrent_v2(void** context) {
  if (stack.empty()) return INVALID_CONTEXT;
  if (context) *context = stack.back();
  stack.pop_back();
  return SUCCESS;
}

EXPORT int cuCtxGetDevice(int* ordinal) {
  Context* context;
  if (Result result = current(context)) return result;
  *ordinal = context->ordinal;
  return SUCCESS;
}

EXPORT int cuCtxGetStreamPriorityRange(int* least, int* greatest) {
  if (least) *least = 0;
  if (greatest) *greatest = -5;
  return SUCCESS;
}

EXPORT int cuCtxSynchronize() {
  Context* context;
  if (Result result = current_unsafe(context, "cuCtxSynchronize")) return result;
  drain(context);
  return context->lost;
}

// Finds what this library exports: with the version that a name has since CUDA 12, or as it is.
EXPORT int cuGetProcAddress_v2(const char* symbol, void** function, int, uint64_t, int* status) {
  Dl_info self;
  dladdr(reinterpret_cast<void*>(&cuInit), &self);
  void* library = dlopen(self.dli_fname, RTLD_NOW | RTLD_NOLOAD);
  *function = nullptr;
  for (const char* suffix : {"_v3", "_v2", ""}) {
    if (!*function && library) *function = dlsym(library, (std::string(symbol) + suffix).c_str());
  }
  if (status) *status = *function ? 0 : 1;
  return *function ? SUCCESS : NOT_FOUND;
}
