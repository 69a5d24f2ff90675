// What the parts of the stand-in driver share: contexts, memory, streams, and the faults that tests ask for.
#pragma once
#include <condition_variable>
#include <cstdint>
#include <cstdio>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <thread>
#include <vector>

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace driver {

// `CUresult`, as far as it is used.
enum Result : int {
  SUCCESS = 0,
  INVALID_VALUE = 1,
  OUT_OF_MEMORY = 2,
  NOT_INITIALIZED = 3,
  NO_DEVICE = 100,
  INVALID_DEVICE = 101,
  INVALID_IMAGE = 200,
  INVALID_CONTEXT = 201,
  NO_BINARY_FOR_GPU = 209,
  ECC_UNCORRECTABLE = 214,
  INVALID_HANDLE = 400,
  NOT_FOUND = 500,
  NOT_READY = 600,
  ILLEGAL_ADDRESS = 700,
  LAUNCH_OUT_OF_RESOURCES = 701,
  CONTEXT_IS_DESTROYED = 709,
  LAUNCH_FAILED = 719,
  NOT_SUPPORTED = 801,
  CAPTURE_UNSUPPORTED = 900,
  CAPTURE_INVALIDATED = 901,
  CAPTURE_MERGE = 902,
  CAPTURE_UNMATCHED = 903,
  CAPTURE_UNJOINED = 904,
  CAPTURE_IMPLICIT = 906,
  CAPTURED_EVENT = 907,
  CAPTURE_WRONG_THREAD = 908,
};

constexpr unsigned MAX_THREADS = 1024;
constexpr unsigned PLAIN_SHARED_BYTES = 48 << 10;   // of a block that was not allowed more
constexpr unsigned MAX_SHARED_BYTES = 232448;       // of a block that was

// What the environment asks for; read once.
struct Settings {
  std::vector<int> cards;  // by ordinal: which emulated card it is
  size_t bytes = size_t(1) << 30;
  int version = 13000, major = 9;
  bool no_device = false, asynchronous = false;
  long fails_at = -1;  // the launch from which on the card is lost
  Result failure = ECC_UNCORRECTABLE;
  uint64_t order = 0;  // draws the order of graphs' nodes if not 0
  Settings();
};
const Settings& settings();

struct Stream;

struct Context {
  int ordinal = 0;
  int references = 0;
  size_t used = 0;
  long launches = 0;
  Result lost = SUCCESS;  // what every call says since the card was lost
  std::unique_ptr<Stream> legacy;
  std::set<Stream*> streams;
};

// Guards contexts, allocations and the sets of handles; never held while work runs.
std::recursive_mutex& lock();
using Guard = std::lock_guard<std::recursive_mutex>;

// Says on stderr what a caller did wrong, which the driver would not.
Result wrong(Result result, const char* format, ...) __attribute__((format(printf, 2, 3)));

// The thread's context, or why a call cannot go on.
Result current(Context*& context);
// As `current`, for calls that a recording thread must not make: they end its recordings.
Result current_unsafe(Context*& context, const char* call);
Result lose(Context* context, Result why);

// Whether `bytes` at `p` lie in one live allocation of the card, or of memory that the host has pinned.
bool on_card(uint64_t p, size_t bytes);
bool pinned(const void* p, size_t bytes);

using Work = std::function<Result()>;

struct Node {
  Work work;
  std::set<int> after;
  int kernels;
  bool waits;  // for other cards
};
// What is or was recorded.
struct Capture {
  std::vector<Node> nodes;
  Stream* origin = nullptr;
  std::thread::id thread;
  bool invalid = false, relaxed = false, over = false;
};
// A point in a stream's order.
struct Mark {
  std::mutex lock;
  std::condition_variable changed;
  bool done = false;
  double milliseconds = 0;
  void reach();
  void wait();
  bool reached();
};
struct Event {
  bool timed = true;
  std::shared_ptr<Mark> mark;
  std::shared_ptr<Capture> capture;
  std::set<int> after;
};
struct Stream {
  Context* context = nullptr;
  bool blocking = true;
  std::shared_ptr<Capture> capture;
  std::set<int> after;  // the nodes that the next one waits for

  ~Stream();
  void push(Work work);
  void drain();
  bool idle();

 private:
  std::mutex lock_;
  std::condition_variable changed_;
  std::deque<Work> queue_;
  bool busy_ = false, closing_ = false;
  std::thread worker_;
  void serve();
};

// A stream by its handle, the legacy one for null.
Result stream_of(void* handle, Stream*& stream);
// Records the work, or runs it, or queues it.
Result enqueue(Stream* stream, Work work, int kernels = 0, bool waits = false);
// Waits for all streams of a context.
void drain(Context* context);
// Ends recordings that this thread must not disturb; whether there was one.
bool spoil_recordings();
// Counts launches, and says when the card is lost by them.
Result count_launches(Context* context, int kernels);

}  // namespace driver
