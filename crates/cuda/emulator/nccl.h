// What the parts of the stand-in NCCL share: communicators and their sockets.
#pragma once
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace nccl {

// `ncclResult_t`.
enum Result : int {
  SUCCESS = 0,
  UNHANDLED_CUDA_ERROR = 1,
  SYSTEM_ERROR = 2,
  INTERNAL_ERROR = 3,
  INVALID_ARGUMENT = 4,
  INVALID_USAGE = 5,
  REMOTE_ERROR = 6,
  IN_PROGRESS = 7,
};

struct UniqueId {
  char bytes[128];
};

struct Comm {
  int rank = 0, size = 1, device = 0;
  uint32_t card = 0;         // which GPU of the machine it is
  std::vector<int> sockets;  // by peer
  std::atomic<int> error{SUCCESS};
  std::atomic<bool> aborted{false};
  bool blocks = true;
  std::atomic<bool> launching{false};  // of one that does not block: until somebody asks how it stands
  uint64_t id = 0;                     // the same on all its ranks
  std::thread beginning;  // of one that does not block
  // Operations run in the order in which they were issued, whatever their streams.
  std::mutex lock;
  std::condition_variable changed;
  uint64_t issued = 0, served = 0;
  ~Comm();
};
using Shared = std::shared_ptr<Comm>;

// Remembers what `ncclGetLastError` says.
Result fail(Result result, const std::string& why);

// Reads or writes all of a span, unless the communicator is aborted, `seconds` pass, or the peer leaves.
Result transfer(int socket, void* at, size_t bytes, bool sending, const Comm* comm, int seconds);

UniqueId make_id();
// Meets the other ranks of the id and connects to each.
Result meet(Comm& comm, const UniqueId& id);

// One span for one peer; the header must be what the other side expects.
struct Header {
  uint32_t magic = 0x6c63636e, what, type, op;
  uint64_t bytes;
};
struct Transfer {
  Comm* comm;
  int peer;
  bool sending;
  char* at;
  Header header;
};
// Does all of them, those of a peer and a direction in order.
Result exchange(std::vector<Transfer>& transfers);

}  // namespace nccl
