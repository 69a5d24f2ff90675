// A stand-in for libnccl.so.2: ranks are threads or processes of one machine, results are folds in the order of ranks.
//
// It does at once, in the caller, what NCCL leaves to the card, unless streams have threads of their own
// (PHALANX_EMULATED_STREAMS=async): a program in which a rank waits for what it has only later to offer needs that. An
// error is also what the call returns then, and not only what `ncclCommGetAsyncError` tells.
//
// PHALANX_EMULATED_NCCL_VERSION is what it says it is. Into the file PHALANX_EMULATED_NCCL_LOG goes a line for each
// operation as it begins: communicator, rank/size, `call` or `graph`, the operation, elements, type, peer or root.
// PHALANX_EMULATED_FAULT=nccl-hang waits for ranks that have left, as NCCL does within a machine.
#include "nccl.h"

#include <sys/socket.h>

#include <algorithm>
#include <climits>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>

#include "stream.h"

extern "C" int cuCtxGetDevice(int* ordinal);
extern "C" int cuDeviceGetAttribute(int* value, int what, int ordinal);
extern "C" int cuStreamIsCapturing(void* stream, int* status);

namespace nccl {

namespace {
enum What : uint32_t { SEND, ALL_REDUCE, REDUCE_SCATTER, ALL_GATHER, BROADCAST, REDUCE };
enum Type : int { I8, U8, I32, U32, I64, U64, F16, F32, F64, BF16 };
enum Op : int { SUM, PRODUCT, MAXIMUM, MINIMUM, AVERAGE };

constexpr const char* NAMES[] = {"send", "all-reduce", "reduce-scatter", "all-gather", "broadcast", "reduce"};

// Never destroyed: threads may still be at work when the process ends.
auto& lock = *new std::mutex;  // of the following two
auto& comms = *new std::map<Comm*, Shared>;
auto& last_error = *new std::string;

// An operation as it was asked for. `root` is the peer of one between two.
struct Operation {
  What what;
  Shared comm;
  const void* from;
  void* to;
  size_t count;
  int type, op, root;
  void* stream;
};

// What a rank sends to itself: the k-th is what it receives k-th.
struct ToSelf {
  const char* from = nullptr;
  char* to = nullptr;
};

// What the thread has begun and not yet ended.
struct Group {
  int depth = 0;
  Result result = SUCCESS;
  std::vector<Operation> operations;
  std::vector<std::pair<Shared, std::thread>> beginnings;
};
thread_local Group group;

size_t bytes_of(int type) {
  constexpr size_t BYTES[] = {1, 1, 4, 4, 8, 8, 2, 4, 8, 2};
  return type >= 0 && type < int(std::size(BYTES)) ? BYTES[type] : 0;
}

struct Bf16 {
  uint16_t bits;
  operator float() const {
    uint32_t wide = uint32_t(bits) << 16;
    float x;
    std::memcpy(&x, &wide, 4);
    return x;
  }
  Bf16() = default;
  Bf16(float x) {
    uint32_t wide;
    std::memcpy(&wide, &x, 4);
    bool nan = (wide & 0x7fffffff) > 0x7f800000;
    bits = uint16_t(nan ? 0x7fff : (wide + 0x7fff + (wide >> 16 & 1)) >> 16);
  }
};

template <class T, class Wide = T> void fold(const std::vector<const char*>& parts, char* to, size_t count, int op) {
  for (size_t i = 0; i < count; ++i) {
    auto at = [&](size_t rank) {
      T x;
      std::memcpy(&x, parts[rank] + i * sizeof(T), sizeof(T));
      return Wide(x);
    };
    Wide sum = at(0);
    for (size_t rank = 1; rank < parts.size(); ++rank) {
      Wide x = at(rank);
      sum = op == PRODUCT ? Wide(sum * x) : op == MAXIMUM ? std::max(sum, x) : op == MINIMUM ? std::min(sum, x) : Wide(sum + x);
    }
    if (op == AVERAGE) sum = Wide(sum / Wide(parts.size()));
    T out = T(sum);
    std::memcpy(to + i * sizeof(T), &out, sizeof(T));
  }
}

void fold(int type, const std::vector<const char*>& parts, char* to, size_t count, int op) {
  switch (type) {
    case I8: return fold<int8_t>(parts, to, count, op);
    case U8: return fold<uint8_t>(parts, to, count, op);
    case I32: return fold<int32_t>(parts, to, count, op);
    case U32: return fold<uint32_t>(parts, to, count, op);
    case I64: return fold<int64_t>(parts, to, count, op);
    case U64: return fold<uint64_t>(parts, to, count, op);
    case F64: return fold<double>(parts, to, count, op);
    case BF16: return fold<Bf16, float>(parts, to, count, op);
    default: return fold<float>(parts, to, count, op);
  }
}

// The operations of a group, together: every transfer of all of them, then what is left to do with what arrived.
class Batch {
 public:
  explicit Batch(std::vector<Operation> all, bool recorded) : all_(std::move(all)), recorded_(recorded) {}

  Result run() {
    log();
    std::vector<Transfer> transfers;
    std::vector<std::function<void()>> after;
    std::vector<std::vector<char>> buffers;
    std::map<Comm*, std::vector<ToSelf>> to_self;
    for (auto& o : all_) {
      if (int error = o.comm->error) return fail(Result(error), "the communicator has failed before");
      plan(o, transfers, after, buffers, to_self);
    }
    for (auto& [comm, pairs] : to_self) {
      for (auto& pair : pairs) {
        if (!pair.from || !pair.to) return fail(INVALID_USAGE, "rank " + std::to_string(comm->rank) + " does not receive what it sends to itself");
      }
    }
    if (Result result = exchange(transfers)) {
      for (auto& o : all_) o.comm->error = result;
      return result;
    }
    for (auto& f : after) f();
    return SUCCESS;
  }

  const std::vector<Operation>& operations() const { return all_; }

 private:
  std::vector<Operation> all_;
  bool recorded_;

  void log() const {
    static const char* path = std::getenv("PHALANX_EMULATED_NCCL_LOG");
    if (!path) return;
    std::string lines;
    for (auto& o : all_) {
      char line[160];
      const char* name = o.what == SEND && o.to ? "receive" : NAMES[o.what];
      std::snprintf(line, sizeof line, "%016llx %d/%d %s %s %zu %d %d\n", (unsigned long long)o.comm->id, o.comm->rank,
                    o.comm->size, recorded_ ? "graph" : "call", name, o.count, o.type, o.root);
      lines += line;
    }
    static auto& writing = *new std::mutex;
    std::lock_guard<std::mutex> guard(writing);
    if (FILE* file = std::fopen(path, "a")) {
      std::fwrite(lines.data(), 1, lines.size(), file);
      std::fclose(file);
    }
  }

  static void plan(const Operation& o, std::vector<Transfer>& transfers, std::vector<std::function<void()>>& after,
                   std::vector<std::vector<char>>& buffers,
                   std::map<Comm*, std::vector<ToSelf>>& to_self) {
    Comm* comm = o.comm.get();
    size_t bytes = o.count * bytes_of(o.type), size = size_t(comm->size), rank = size_t(comm->rank);
    auto* from = const_cast<char*>(static_cast<const char*>(o.from));
    auto* to = static_cast<char*>(o.to);
    Header header{0x6c63636e, o.what, uint32_t(o.type), uint32_t(o.op), bytes};
    auto each = [&](bool sending, auto at) {
      for (size_t peer = 0; peer < size; ++peer) {
        if (peer != rank) transfers.push_back({comm, int(peer), sending, at(peer), header});
      }
    };
    auto one = [&](bool sending, char* at) { transfers.push_back({comm, o.root, sending, at, header}); };
    // Parts of all ranks, in their order, for the fold that comes after.
    auto gather = [&](char* own) {
      std::vector<const char*> parts(size, own);
      each(false, [&](size_t peer) {
        buffers.emplace_back(bytes);
        parts[peer] = buffers.back().data();
        return buffers.back().data();
      });
      after.push_back([=, &o] { fold(o.type, parts, to, o.count, o.op); });
    };
    switch (o.what) {
      case SEND:
        if (o.root == comm->rank) {
          auto& pairs = to_self[comm];
          auto open = std::find_if(pairs.begin(), pairs.end(), [&](ToSelf& p) { return from ? !p.from : !p.to; });
          if (open == pairs.end()) open = pairs.insert(open, ToSelf());
          if (from) open->from = from;
          if (to) open->to = to;
          if (open->from && open->to) after.push_back([p = *open, bytes] { std::memmove(p.to, p.from, bytes); });
        } else {
          one(from != nullptr, from ? from : to);
        }
        return;
      case ALL_REDUCE:
        each(true, [&](size_t) { return from; });
        return gather(from);
      case REDUCE_SCATTER:
        each(true, [&](size_t peer) { return from + peer * bytes; });
        return gather(from + rank * bytes);
      case ALL_GATHER:
        each(true, [&](size_t) { return from; });
        each(false, [&](size_t peer) { return to + peer * bytes; });
        after.push_back([=] { std::memmove(to + rank * bytes, from, bytes); });
        return;
      case BROADCAST:
        if (o.root == comm->rank) {
          each(true, [&](size_t) { return from; });
          after.push_back([=] { std::memmove(to, from, bytes); });
        } else {
          one(false, to);
        }
        return;
      case REDUCE:
        return o.root == comm->rank ? gather(from) : one(true, from);
    }
  }
};

// A place in the order of a communicator's operations.
uint64_t take_turn(Comm& comm) {
  std::lock_guard<std::mutex> guard(comm.lock);
  return comm.issued++;
}
void wait_turn(Comm& comm, uint64_t turn) {
  std::unique_lock<std::mutex> guard(comm.lock);
  comm.changed.wait(guard, [&] { return comm.served == turn; });
}
void end_turn(Comm& comm) {
  std::lock_guard<std::mutex> guard(comm.lock);
  ++comm.served;
  comm.changed.notify_all();
}

// Puts operations on the stream of the first; all of them begin when it comes to them.
Result issue(std::vector<Operation> operations) {
  if (operations.empty()) return SUCCESS;
  void* stream = operations[0].stream;
  std::vector<Shared> used;
  for (auto& o : operations) {
    if (std::find(used.begin(), used.end(), o.comm) == used.end()) used.push_back(o.comm);
  }
  int recording = 0;
  if (cuStreamIsCapturing(stream, &recording)) return fail(UNHANDLED_CUDA_ERROR, "a stream that is none, or another card's");
  std::vector<uint64_t> turns;
  if (!recording) {
    for (auto& comm : used) turns.push_back(take_turn(*comm));
  }
  auto batch = std::make_shared<Batch>(std::move(operations), recording != 0);
  auto outcome = std::make_shared<std::atomic<int>>(SUCCESS);
  std::function<int()> work = [=] {
    auto mine = turns;
    for (size_t i = 0; i < used.size(); ++i) {
      if (recording) mine.push_back(take_turn(*used[i]));
      wait_turn(*used[i], mine[i]);
    }
    *outcome = batch->run();
    for (auto& comm : used) end_turn(*comm);
    return 0;
  };
  if (phalanx_emulator_enqueue(stream, &work, 1)) {
    for (size_t i = 0; i < turns.size(); ++i) {
      wait_turn(*used[i], turns[i]);
      end_turn(*used[i]);
    }
    return fail(UNHANDLED_CUDA_ERROR, "the card is lost");
  }
  bool begun = false;
  for (auto& comm : used) {
    if (!comm->blocks) begun = comm->launching = true;
  }
  auto result = Result(outcome->load());
  return result == SUCCESS && begun ? IN_PROGRESS : result;
}

Shared find(Comm* comm) {
  std::lock_guard<std::mutex> guard(lock);
  auto found = comms.find(comm);
  return found == comms.end() ? nullptr : found->second;
}

// Checks an operation, and issues it or adds it to the group.
Result ask(Operation o, size_t read_count, size_t written_count) {
  auto check = [&]() -> Result {
    if (!o.comm) return fail(INVALID_ARGUMENT, "a communicator that is none");
    if (o.comm->error == IN_PROGRESS || o.comm->launching) return fail(INVALID_USAGE, "the communicator is not ready");
    size_t size = bytes_of(o.type);
    if (size == 0 || o.type == F16) return fail(INVALID_ARGUMENT, "a type that is not emulated");
    if (o.op < SUM || o.op > AVERAGE) return fail(INVALID_ARGUMENT, "a reduction that is none");
    if (o.root < 0 || o.root >= o.comm->size) return fail(INVALID_ARGUMENT, "a rank that is none");
    if ((read_count && !phalanx_emulator_on_card(o.from, read_count * size)) ||
        (written_count && !phalanx_emulator_on_card(o.to, written_count * size))) {
      return fail(INVALID_ARGUMENT, "a buffer that does not lie in a live allocation of a card");
    }
    return SUCCESS;
  };
  Result result = check();
  if (group.depth == 0) return result ? result : issue({o});
  if (result && !group.result) group.result = result;
  if (!result) group.operations.push_back(o);
  return result;
}

Result begin(Comm** out, int size, const UniqueId& id, int rank, bool blocks) {
  *out = nullptr;
  if (size < 1 || rank < 0 || rank >= size) return fail(INVALID_ARGUMENT, "a rank outside of the communicator");
  auto comm = std::make_shared<Comm>();
  comm->rank = rank;
  comm->size = size;
  int bus = 0;
  if (cuCtxGetDevice(&comm->device) || cuDeviceGetAttribute(&bus, 33, comm->device)) {
    return fail(UNHANDLED_CUDA_ERROR, "no card is current on this thread");
  }
  comm->card = uint32_t(bus);
  comm->blocks = blocks;
  std::memcpy(&comm->id, id.bytes + 8, sizeof comm->id);
  comm->error = IN_PROGRESS;
  {
    std::lock_guard<std::mutex> guard(lock);
    comms[comm.get()] = comm;
  }
  *out = comm.get();
  auto work = [c = comm.get(), id] { c->error = c->size == 1 ? SUCCESS : meet(*c, id); };
  if (!blocks) {
    comm->beginning = std::thread(work);
    return IN_PROGRESS;
  }
  if (group.depth > 0) {
    group.beginnings.emplace_back(comm, std::thread(work));
    return SUCCESS;
  }
  work();
  return Result(comm->error.load());
}

Result end_group() {
  Result result = group.result;
  for (auto& [comm, thread] : group.beginnings) {
    thread.join();
    if (!result) result = Result(comm->error.load());
  }
  auto operations = std::move(group.operations);
  group = Group();
  return result ? result : issue(std::move(operations));
}

void leave(Shared& comm, bool abort) {
  if (abort) {
    comm->aborted = true;
    // Peers see it at once; while the ranks still meet, the flag alone must do.
    if (comm->error != IN_PROGRESS) {
      for (int s : comm->sockets) {
        if (s >= 0) shutdown(s, SHUT_RDWR);
      }
    }
  }
  std::lock_guard<std::mutex> guard(lock);
  comms.erase(comm.get());
}
}  // namespace

Result fail(Result result, const std::string& why) {
  std::lock_guard<std::mutex> guard(lock);
  last_error = why;
  return result;
}

}  // namespace nccl

using namespace nccl;

EXPORT int ncclGetVersion(int* version) {
  const char* text = std::getenv("PHALANX_EMULATED_NCCL_VERSION");
  *version = text ? std::atoi(text) : 22809;
  return SUCCESS;
}
EXPORT int ncclGetUniqueId(UniqueId* id) {
  *id = make_id();
  return SUCCESS;
}
EXPORT const char* ncclGetErrorString(int result) {
  constexpr const char* TEXTS[] = {"no error", "unhandled cuda error", "unhandled system error", "internal error",
                                   "invalid argument", "invalid usage", "remote process exited or there was a network error",
                                   "NCCL operation in progress"};
  return result >= 0 && result < int(std::size(TEXTS)) ? TEXTS[result] : "unknown result code";
}
EXPORT const char* ncclGetLastError(Comm*) {
  static thread_local std::string copy;
  std::lock_guard<std::mutex> guard(lock);
  copy = last_error;
  return copy.c_str();
}

EXPORT int ncclCommInitRank(Comm** out, int size, UniqueId id, int rank) { return begin(out, size, id, rank, true); }

// The first fields of `ncclConfig_t`.
struct Config {
  size_t size;
  unsigned magic, version;
  int blocking;
};
EXPORT int ncclCommInitRankConfig(Comm** out, int size, UniqueId id, int rank, const Config* config) {
  if (config && config->magic != 0xcafebeef) return fail(INVALID_ARGUMENT, "a configuration that was not initialised");
  return begin(out, size, id, rank, !config || config->blocking != 0);
}

EXPORT int ncclCommFinalize(Comm* comm) { return find(comm) ? SUCCESS : INVALID_ARGUMENT; }
EXPORT int ncclCommDestroy(Comm* comm) {
  auto shared = find(comm);
  if (!shared) return INVALID_ARGUMENT;
  leave(shared, false);
  return SUCCESS;
}
EXPORT int ncclCommAbort(Comm* comm) {
  auto shared = find(comm);
  if (!shared) return INVALID_ARGUMENT;
  leave(shared, true);
  return SUCCESS;
}
EXPORT int ncclCommGetAsyncError(Comm* comm, int* error) {
  auto shared = find(comm);
  if (!shared) return INVALID_ARGUMENT;
  *error = shared->launching.exchange(false) ? IN_PROGRESS : Result(shared->error.load());
  return SUCCESS;
}
EXPORT int ncclCommCount(Comm* comm, int* size) {
  auto shared = find(comm);
  if (!shared) return INVALID_ARGUMENT;
  *size = shared->size;
  return SUCCESS;
}
EXPORT int ncclCommUserRank(Comm* comm, int* rank) {
  auto shared = find(comm);
  if (!shared) return INVALID_ARGUMENT;
  *rank = shared->rank;
  return SUCCESS;
}
EXPORT int ncclCommCuDevice(Comm* comm, int* device) {
  auto shared = find(comm);
  if (!shared) return INVALID_ARGUMENT;
  *device = shared->device;
  return SUCCESS;
}

EXPORT int ncclGroupStart() {
  ++group.depth;
  return SUCCESS;
}
EXPORT int ncclGroupEnd() {
  if (group.depth == 0) return fail(INVALID_USAGE, "a group ends that was not begun");
  return --group.depth > 0 ? SUCCESS : end_group();
}

EXPORT int ncclSend(const void* from, size_t count, int type, int peer, Comm* comm, void* stream) {
  return ask({SEND, find(comm), from, nullptr, count, type, SUM, peer, stream}, count, 0);
}
EXPORT int ncclRecv(void* to, size_t count, int type, int peer, Comm* comm, void* stream) {
  return ask({SEND, find(comm), nullptr, to, count, type, SUM, peer, stream}, 0, count);
}
EXPORT int ncclAllReduce(const void* from, void* to, size_t count, int type, int op, Comm* comm, void* stream) {
  return ask({ALL_REDUCE, find(comm), from, to, count, type, op, 0, stream}, count, count);
}
EXPORT int ncclReduceScatter(const void* from, void* to, size_t count, int type, int op, Comm* comm, void* stream) {
  auto shared = find(comm);
  size_t size = shared ? size_t(shared->size) : 0;
  return ask({REDUCE_SCATTER, shared, from, to, count, type, op, 0, stream}, count * size, count);
}
EXPORT int ncclAllGather(const void* from, void* to, size_t count, int type, Comm* comm, void* stream) {
  auto shared = find(comm);
  size_t size = shared ? size_t(shared->size) : 0;
  return ask({ALL_GATHER, shared, from, to, count, type, SUM, 0, stream}, count, count * size);
}
EXPORT int ncclBroadcast(const void* from, void* to, size_t count, int type, int root, Comm* comm, void* stream) {
  auto shared = find(comm);
  bool is_root = shared && shared->rank == root;
  return ask({BROADCAST, shared, from, to, count, type, SUM, root, stream}, is_root ? count : 0, count);
}
EXPORT int ncclBcast(void* both, size_t count, int type, int root, Comm* comm, void* stream) {
  return ncclBroadcast(both, both, count, type, root, comm, stream);
}
EXPORT int ncclReduce(const void* from, void* to, size_t count, int type, int op, int root, Comm* comm, void* stream) {
  auto shared = find(comm);
  bool is_root = shared && shared->rank == root;
  return ask({REDUCE, shared, from, to, count, type, op, root, stream}, count, is_root ? count : 0);
}
