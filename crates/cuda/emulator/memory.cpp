// The stand-in driver's memory: its allocations end at a page that nobody may touch, and every copy is checked.
#include <sys/mman.h>

#include <cstring>

#include "driver.h"

namespace driver {

namespace {
constexpr size_t PAGE = 4096, ALIGNMENT = 256, POISONED_BYTES = size_t(256) << 20;

struct Allocation {
  size_t bytes;
  Context* context;
  void* map;
  size_t map_bytes;
};
using Allocations = std::map<uint64_t, Allocation>;
Allocations& card_memory() {
  static auto& all = *new Allocations;
  return all;
}
Allocations& host_memory() {
  static auto& all = *new Allocations;
  return all;
}

Result take(Allocations& all, Context* context, size_t bytes, uint64_t& address) {
  size_t used = (bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT, whole = (used + PAGE - 1) / PAGE * PAGE;
  void* map = mmap(nullptr, whole + PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (map == MAP_FAILED) return OUT_OF_MEMORY;
  auto* base = static_cast<char*>(map) + whole - used;
  mprotect(static_cast<char*>(map) + whole, PAGE, PROT_NONE);
  if (bytes <= POISONED_BYTES) std::memset(base, 0xff, used);
  address = reinterpret_cast<uint64_t>(base);
  all[address] = {bytes, context, map, whole + PAGE};
  return SUCCESS;
}

bool inside(const Allocations& all, uint64_t p, size_t bytes) {
  Guard guard(lock());
  auto next = all.upper_bound(p);
  if (next == all.begin()) return false;
  auto& [base, a] = *std::prev(next);
  return p - base <= a.bytes && bytes <= a.bytes - (p - base);
}

void give_back(Allocation& a) { munmap(a.map, a.map_bytes); }

char* at(uint64_t p) { return reinterpret_cast<char*>(p); }

Result checked(const char* call, uint64_t p, size_t bytes, Result result) {
  if (bytes == 0 || on_card(p, bytes)) return SUCCESS;
  return wrong(result, "%s: %zu bytes at %#llx do not lie in a live allocation", call, bytes, (unsigned long long)p);
}
}  // namespace

bool on_card(uint64_t p, size_t bytes) { return inside(card_memory(), p, bytes) || inside(host_memory(), p, bytes); }
bool pinned(const void* p, size_t bytes) { return inside(host_memory(), reinterpret_cast<uint64_t>(p), bytes); }

void free_all(Context* context) {
  Guard guard(lock());
  context->used = 0;
  for (auto* all : {&card_memory(), &host_memory()}) {
    for (auto i = all->begin(); i != all->end();) {
      if (i->second.context != context) { ++i; continue; }
      give_back(i->second);
      i = all->erase(i);
    }
  }
}

namespace {
// Copies of the legacy stream: after its own work and that of streams that do not opt out, and over when they return.
Result now(const char* call, Work work) {
  Context* context;
  if (Result result = current_unsafe(context, call)) return result;
  std::vector<Stream*> streams;
  {
    Guard guard(lock());
    for (auto* s : context->streams) {
      if (s->blocking) streams.push_back(s);
    }
  }
  for (auto* s : streams) s->drain();
  Result result = enqueue(context->legacy.get(), std::move(work));
  context->legacy->drain();
  return result ? result : context->lost;
}

// A check at the call, and one when the copy happens: memory may have gone meanwhile.
Result later(void* handle, Work check, Work work) {
  Context* context;
  if (Result result = current(context)) return result;
  Stream* stream;
  if (Result result = stream_of(handle, stream)) return result;
  if (Result result = check()) return result;
  return enqueue(stream, [check = std::move(check), work = std::move(work)] {
    return check() ? ILLEGAL_ADDRESS : work();
  });
}

Work card_check(const char* call, uint64_t p, size_t bytes, uint64_t q = 0, size_t more = 0) {
  return [=] {
    Result result = checked(call, p, bytes, INVALID_VALUE);
    return result ? result : checked(call, q, more, INVALID_VALUE);
  };
}

// A recorded copy reads and writes the host's memory whenever it is replayed.
Result recordable(const char* call, void* handle, const void* host, size_t bytes) {
  Stream* stream;
  if (Result result = stream_of(handle, stream)) return result;
  if (!stream->capture || pinned(host, bytes)) return SUCCESS;
  stream->capture->invalid = true;
  return wrong(CAPTURE_UNSUPPORTED, "%s records host memory that is not pinned", call);
}
}  // namespace
}  // namespace driver

using namespace driver;

EXPORT int cuMemAlloc_v2(uint64_t* out, size_t bytes) {
  Context* context;
  if (Result result = current_unsafe(context, "cuMemAlloc")) return result;
  if (bytes == 0 || !out) return INVALID_VALUE;
  Guard guard(lock());
  if (bytes > settings().bytes - context->used) return OUT_OF_MEMORY;
  if (Result result = take(card_memory(), context, bytes, *out)) return result;
  context->used += bytes;
  return SUCCESS;
}

EXPORT int cuMemFree_v2(uint64_t p) {
  Context* context;
  if (Result result = current_unsafe(context, "cuMemFree")) return result;
  if (p == 0) return SUCCESS;
  drain(context);
  Guard guard(lock());
  auto found = card_memory().find(p);
  if (found == card_memory().end()) return wrong(INVALID_VALUE, "cuMemFree of %#llx, which is not live", (unsigned long long)p);
  found->second.context->used -= found->second.bytes;
  give_back(found->second);
  card_memory().erase(found);
  return SUCCESS;
}

EXPORT int cuMemGetInfo_v2(size_t* free, size_t* total) {
  Context* context;
  if (Result result = current(context)) return result;
  Guard guard(lock());
  *total = settings().bytes;
  *free = settings().bytes - context->used;
  return SUCCESS;
}

EXPORT int cuMemHostAlloc(void** out, size_t bytes, unsigned) {
  Context* context;
  if (Result result = current_unsafe(context, "cuMemHostAlloc")) return result;
  if (bytes == 0 || !out) return INVALID_VALUE;
  Guard guard(lock());
  uint64_t address;
  if (Result result = take(host_memory(), context, bytes, address)) return result;
  *out = at(address);
  return SUCCESS;
}
EXPORT int cuMemAllocHost_v2(void** out, size_t bytes) { return cuMemHostAlloc(out, bytes, 0); }

EXPORT int cuMemFreeHost(void* p) {
  Context* context;
  if (Result result = current_unsafe(context, "cuMemFreeHost")) return result;
  drain(context);
  Guard guard(lock());
  auto found = host_memory().find(reinterpret_cast<uint64_t>(p));
  if (found == host_memory().end()) return wrong(INVALID_VALUE, "cuMemFreeHost of %p, which is not live", p);
  give_back(found->second);
  host_memory().erase(found);
  return SUCCESS;
}

EXPORT int cuMemHostGetDevicePointer_v2(uint64_t* out, void* p, unsigned) {
  *out = reinterpret_cast<uint64_t>(p);
  return pinned(p, 1) ? SUCCESS : INVALID_VALUE;
}

EXPORT int cuMemHostRegister_v2(void*, size_t, unsigned) { return NOT_SUPPORTED; }
EXPORT int cuMemHostUnregister(void*) { return NOT_SUPPORTED; }

EXPORT int cuPointerGetAttribute(void* out, int what, uint64_t p) {
  bool host = pinned(at(p), 1);
  if (!host && !on_card(p, 1)) return INVALID_VALUE;
  if (what != 2) return NOT_SUPPORTED;
  *static_cast<unsigned*>(out) = host ? 1 : 2;
  return SUCCESS;
}

EXPORT int cuMemcpyHtoD_v2(uint64_t to, const void* from, size_t bytes) {
  if (Result result = checked("cuMemcpyHtoD", to, bytes, INVALID_VALUE)) return result;
  return now("cuMemcpyHtoD", [=] {
    std::memcpy(at(to), from, bytes);
    return SUCCESS;
  });
}

EXPORT int cuMemcpyDtoH_v2(void* to, uint64_t from, size_t bytes) {
  if (Result result = checked("cuMemcpyDtoH", from, bytes, INVALID_VALUE)) return result;
  return now("cuMemcpyDtoH", [=] {
    std::memcpy(to, at(from), bytes);
    return SUCCESS;
  });
}

EXPORT int cuMemcpyDtoD_v2(uint64_t to, uint64_t from, size_t bytes) {
  if (Result result = card_check("cuMemcpyDtoD", to, bytes, from, bytes)()) return result;
  return now("cuMemcpyDtoD", [=] {
    std::memmove(at(to), at(from), bytes);
    return SUCCESS;
  });
}

EXPORT int cuMemcpyHtoDAsync_v2(uint64_t to, const void* from, size_t bytes, void* stream) {
  const char* call = "cuMemcpyHtoDAsync";
  if (Result result = recordable(call, stream, from, bytes)) return result;
  if (pinned(from, bytes)) {
    return later(stream, card_check(call, to, bytes, reinterpret_cast<uint64_t>(from), bytes), [=] {
      std::memcpy(at(to), from, bytes);
      return SUCCESS;
    });
  }
  // The driver, too, reads pageable memory before it returns.
  auto* first = static_cast<const char*>(from);
  auto staged = std::make_shared<std::vector<char>>(first, first + bytes);
  return later(stream, card_check(call, to, bytes), [=] {
    std::memcpy(at(to), staged->data(), bytes);
    return SUCCESS;
  });
}

EXPORT int cuMemcpyDtoHAsync_v2(void* to, uint64_t from, size_t bytes, void* handle) {
  const char* call = "cuMemcpyDtoHAsync";
  if (Result result = recordable(call, handle, to, bytes)) return result;
  bool is_pinned = pinned(to, bytes);
  Result result = later(handle, card_check(call, from, bytes, is_pinned ? reinterpret_cast<uint64_t>(to) : 0, is_pinned ? bytes : 0), [=] {
    std::memcpy(to, at(from), bytes);
    return SUCCESS;
  });
  Stream* stream;
  if (!result && !is_pinned && !stream_of(handle, stream)) stream->drain();
  return result;
}

EXPORT int cuMemcpyDtoDAsync_v2(uint64_t to, uint64_t from, size_t bytes, void* stream) {
  return later(stream, card_check("cuMemcpyDtoDAsync", to, bytes, from, bytes), [=] {
    std::memmove(at(to), at(from), bytes);
    return SUCCESS;
  });
}

EXPORT int cuMemsetD8Async(uint64_t to, unsigned char byte, size_t count, void* stream) {
  return later(stream, card_check("cuMemsetD8Async", to, count), [=] {
    std::memset(at(to), byte, count);
    return SUCCESS;
  });
}

namespace {
Result fill(uint64_t to, unsigned word, size_t count) {
  for (size_t i = 0; i < count; ++i) std::memcpy(at(to) + 4 * i, &word, 4);
  return SUCCESS;
}
}  // namespace

EXPORT int cuMemsetD32Async(uint64_t to, unsigned word, size_t count, void* stream) {
  if (to % 4 != 0) return INVALID_VALUE;
  return later(stream, card_check("cuMemsetD32Async", to, 4 * count), [=] { return fill(to, word, count); });
}

EXPORT int cuMemsetD8_v2(uint64_t to, unsigned char byte, size_t count) {
  if (Result result = checked("cuMemsetD8", to, count, INVALID_VALUE)) return result;
  return now("cuMemsetD8", [=] {
    std::memset(at(to), byte, count);
    return SUCCESS;
  });
}

EXPORT int cuMemsetD32_v2(uint64_t to, unsigned word, size_t count) {
  if (to % 4 != 0) return INVALID_VALUE;
  if (Result result = checked("cuMemsetD32", to, 4 * count, INVALID_VALUE)) return result;
  return now("cuMemsetD32", [=] { return fill(to, word, count); });
}
