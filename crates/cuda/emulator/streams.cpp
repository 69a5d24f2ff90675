// The stand-in driver's streams, events and graphs.
//
// A stream runs its work in the call that brings it, or in a thread of its own if the environment asks for that. While it
// records, work becomes a node that waits for what the stream saw before: its own last node, and those of events.
#include <algorithm>
#include <chrono>

#include "driver.h"
#include "stream.h"

namespace driver {

namespace {
std::set<void*>& handles() {
  static auto& live = *new std::set<void*>;
  return live;
}
template <class T> Result find(void* handle, T*& out, const char* what) {
  Guard guard(lock());
  if (!handles().count(handle)) return wrong(INVALID_HANDLE, "%p is no %s that is alive", handle, what);
  out = static_cast<T*>(handle);
  return SUCCESS;
}
template <class T> T* born(T* object) {
  Guard guard(lock());
  handles().insert(object);
  return object;
}

// Recordings that are under way, of all threads.
std::vector<std::shared_ptr<Capture>>& recordings() {
  static auto& all = *new std::vector<std::shared_ptr<Capture>>;
  return all;
}

struct Graph {
  std::vector<Node> nodes;
};

double now_milliseconds() {
  return std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now().time_since_epoch()).count();
}
}  // namespace

void Mark::reach() {
  std::lock_guard<std::mutex> guard(lock);
  done = true;
  milliseconds = now_milliseconds();
  changed.notify_all();
}
void Mark::wait() {
  std::unique_lock<std::mutex> guard(lock);
  changed.wait(guard, [&] { return done; });
}
bool Mark::reached() {
  std::lock_guard<std::mutex> guard(lock);
  return done;
}

Stream::~Stream() {
  {
    std::lock_guard<std::mutex> guard(lock_);
    closing_ = true;
    changed_.notify_all();
  }
  if (worker_.joinable()) worker_.join();
}

void Stream::push(Work work) {
  std::lock_guard<std::mutex> guard(lock_);
  queue_.push_back(std::move(work));
  if (!worker_.joinable()) worker_ = std::thread([this] { serve(); });
  changed_.notify_all();
}

void Stream::serve() {
  std::unique_lock<std::mutex> guard(lock_);
  for (;;) {
    changed_.wait(guard, [&] { return closing_ || !queue_.empty(); });
    if (queue_.empty()) return;
    Work work = std::move(queue_.front());
    queue_.pop_front();
    busy_ = true;
    guard.unlock();
    // A lost card does nothing more, but what waits for its marks must not hang.
    if (Result result = work()) lose(context, result);
    work = nullptr;
    guard.lock();
    busy_ = false;
    changed_.notify_all();
  }
}

void Stream::drain() {
  std::unique_lock<std::mutex> guard(lock_);
  changed_.wait(guard, [&] { return queue_.empty() && !busy_; });
}
bool Stream::idle() {
  std::lock_guard<std::mutex> guard(lock_);
  return queue_.empty() && !busy_;
}

Result stream_of(void* handle, Stream*& stream) {
  Context* context;
  if (Result result = current(context)) return result;
  // Null, CU_STREAM_LEGACY and CU_STREAM_PER_THREAD.
  if (reinterpret_cast<uintptr_t>(handle) <= 2) {
    stream = context->legacy.get();
    Guard guard(lock());
    for (auto& r : recordings()) {
      if (r->relaxed || r->thread != std::this_thread::get_id()) continue;
      r->invalid = true;
      return wrong(CAPTURE_IMPLICIT, "the legacy stream is used while this thread records");
    }
    return SUCCESS;
  }
  if (Result result = find(handle, stream, "stream")) return result;
  if (stream->context != context) return wrong(INVALID_HANDLE, "a stream of another context than the thread's");
  return SUCCESS;
}

Result enqueue(Stream* stream, Work work, int kernels, bool waits) {
  if (stream->capture) {
    Guard guard(lock());
    Capture& capture = *stream->capture;
    if (capture.invalid) return CAPTURE_INVALIDATED;
    capture.nodes.push_back({std::move(work), stream->after, kernels, waits});
    stream->after = {int(capture.nodes.size()) - 1};
    return SUCCESS;
  }
  if (Result result = count_launches(stream->context, kernels)) return result;
  if (settings().asynchronous) {
    stream->push(std::move(work));
    return SUCCESS;
  }
  Result result = work();
  return result ? lose(stream->context, result) : SUCCESS;
}

void drain(Context* context) {
  std::vector<Stream*> streams{context->legacy.get()};
  {
    Guard guard(lock());
    streams.insert(streams.end(), context->streams.begin(), context->streams.end());
  }
  for (auto* s : streams) s->drain();
}

bool spoil_recordings() {
  Guard guard(lock());
  bool any = false;
  for (auto& r : recordings()) {
    if (r->relaxed || r->thread != std::this_thread::get_id()) continue;
    r->invalid = any = true;
  }
  return any;
}

namespace {
// A call that needs a stream which does not record; if it does, the recording is over.
Result idle_stream(void* handle, Stream*& stream, const char* call) {
  if (Result result = stream_of(handle, stream)) return result;
  if (!stream->capture) return SUCCESS;
  stream->capture->invalid = true;
  return wrong(CAPTURE_UNSUPPORTED, "%s of a stream that records", call);
}

// Whether all nodes lead to those that the origin has seen.
bool joined(const Capture& capture) {
  std::vector<bool> seen(capture.nodes.size());
  std::vector<int> rest(capture.origin->after.begin(), capture.origin->after.end());
  while (!rest.empty()) {
    int node = rest.back();
    rest.pop_back();
    if (seen[size_t(node)]) continue;
    seen[size_t(node)] = true;
    rest.insert(rest.end(), capture.nodes[size_t(node)].after.begin(), capture.nodes[size_t(node)].after.end());
  }
  return std::all_of(seen.begin(), seen.end(), [](bool s) { return s; });
}

// As a card does: what waits for other cards lets all go on that does not come after it. The rest in the order of
// recording, or in one drawn.
Result run_beside(const Graph& graph) {
  std::mutex lock;
  std::condition_variable changed;
  std::vector<std::thread> waiting;
  std::vector<char> begun(graph.nodes.size()), done(graph.nodes.size());
  Result failure = SUCCESS;
  uint64_t state = settings().order;
  std::unique_lock<std::mutex> guard(lock);
  for (size_t count = 0; count < graph.nodes.size();) {
    std::vector<size_t> ready;
    for (size_t i = 0; i < graph.nodes.size(); ++i) {
      auto& after = graph.nodes[i].after;
      if (begun[i] || !std::all_of(after.begin(), after.end(), [&](int j) { return done[size_t(j)]; })) continue;
      if (!graph.nodes[i].waits) {
        ready.push_back(i);
        continue;
      }
      begun[i] = true;
      ++count;
      waiting.emplace_back([&, i] {
        Result result = graph.nodes[i].work();
        std::lock_guard<std::mutex> held(lock);
        if (result && !failure) failure = result;
        done[i] = true;
        changed.notify_all();
      });
    }
    if (ready.empty()) {
      if (count < graph.nodes.size()) changed.wait(guard);
      continue;
    }
    state = state * 6364136223846793005u + 1442695040888963407u;
    size_t next = ready[settings().order ? size_t(state >> 33) % ready.size() : 0];
    begun[next] = true;
    ++count;
    guard.unlock();
    Result result = graph.nodes[next].work();
    guard.lock();
    if (result && !failure) failure = result;
    done[next] = true;
  }
  guard.unlock();
  for (auto& t : waiting) t.join();
  return failure;
}

// In the order of recording, or in one drawn among all that the graph allows: an edge that is missing then shows.
Result run(const Graph& graph) {
  if (settings().asynchronous) return run_beside(graph);
  uint64_t state = settings().order;
  std::vector<bool> done(graph.nodes.size());
  for (size_t count = 0; count < graph.nodes.size(); ++count) {
    size_t next = count;
    if (settings().order) {
      std::vector<size_t> ready;
      for (size_t i = 0; i < graph.nodes.size(); ++i) {
        auto& after = graph.nodes[i].after;
        if (!done[i] && std::all_of(after.begin(), after.end(), [&](int j) { return done[size_t(j)]; })) ready.push_back(i);
      }
      state = state * 6364136223846793005u + 1442695040888963407u;
      next = ready[size_t(state >> 33) % ready.size()];
    }
    done[next] = true;
    if (Result result = graph.nodes[next].work()) return result;
  }
  return SUCCESS;
}

int kernels_of(const Graph& graph) {
  int count = 0;
  for (auto& node : graph.nodes) count += node.kernels;
  return count;
}
}  // namespace
}  // namespace driver

using namespace driver;

EXPORT int cuStreamCreate(void** out, unsigned flags) {
  Context* context;
  if (Result result = current(context)) return result;
  Guard guard(lock());
  auto* stream = born(new Stream);
  stream->context = context;
  stream->blocking = !(flags & 1);
  context->streams.insert(stream);
  *out = stream;
  return SUCCESS;
}
EXPORT int cuStreamCreateWithPriority(void** out, unsigned flags, int) { return cuStreamCreate(out, flags); }

EXPORT int cuStreamDestroy_v2(void* handle) {
  Stream* stream;
  if (Result result = find(handle, stream, "stream")) return result;
  {
    Guard guard(lock());
    if (stream->capture) stream->capture->invalid = true;
    handles().erase(handle);
    stream->context->streams.erase(stream);
  }
  stream->drain();
  delete stream;
  return SUCCESS;
}

EXPORT int cuStreamSynchronize(void* handle) {
  Stream* stream;
  if (Result result = idle_stream(handle, stream, "cuStreamSynchronize")) return result;
  stream->drain();
  return stream->context->lost;
}

EXPORT int cuStreamQuery(void* handle) {
  Stream* stream;
  if (Result result = idle_stream(handle, stream, "cuStreamQuery")) return result;
  return stream->idle() ? stream->context->lost : NOT_READY;
}

EXPORT int cuStreamGetCtx(void* handle, void** out) {
  Stream* stream;
  if (Result result = stream_of(handle, stream)) return result;
  *out = stream->context;
  return SUCCESS;
}

EXPORT int cuLaunchHostFunc(void* handle, void (*function)(void*), void* state) {
  Stream* stream;
  if (Result result = stream_of(handle, stream)) return result;
  return enqueue(stream, [=] {
    function(state);
    return SUCCESS;
  });
}

EXPORT int cuEventCreate(void** out, unsigned flags) {
  Context* context;
  if (Result result = current(context)) return result;
  auto* event = born(new Event);
  event->timed = !(flags & 2);
  *out = event;
  return SUCCESS;
}

EXPORT int cuEventDestroy_v2(void* handle) {
  Event* event;
  if (Result result = find(handle, event, "event")) return result;
  Guard guard(lock());
  handles().erase(handle);
  delete event;
  return SUCCESS;
}

EXPORT int cuEventRecord(void* handle, void* on) {
  Event* event;
  Stream* stream;
  if (Result result = find(handle, event, "event")) return result;
  if (Result result = stream_of(on, stream)) return result;
  Guard guard(lock());
  event->capture = stream->capture;
  event->after = stream->after;
  if (stream->capture) return stream->capture->invalid ? CAPTURE_INVALIDATED : SUCCESS;
  auto mark = event->mark = std::make_shared<Mark>();
  if (!settings().asynchronous) {
    mark->reach();
    return SUCCESS;
  }
  stream->push([mark] {
    mark->reach();
    return SUCCESS;
  });
  return SUCCESS;
}
// Flag 1: a node of the graph, which the host may ask about once it has run; nothing but recordings may have it.
EXPORT int cuEventRecordWithFlags(void* handle, void* on, unsigned flags) {
  Event* event;
  Stream* stream;
  if (!(flags & 1)) return cuEventRecord(handle, on);
  if (Result result = find(handle, event, "event")) return result;
  if (Result result = stream_of(on, stream)) return result;
  if (!stream->capture) return wrong(INVALID_VALUE, "an external event on a stream that does not record");
  auto mark = std::make_shared<Mark>();
  {
    Guard guard(lock());
    event->capture = nullptr;
    event->mark = mark;
  }
  return enqueue(stream, [mark] {
    mark->reach();
    return SUCCESS;
  });
}

EXPORT int cuStreamWaitEvent(void* on, void* handle, unsigned) {
  Event* event;
  Stream* stream;
  if (Result result = find(handle, event, "event")) return result;
  if (Result result = stream_of(on, stream)) return result;
  Guard guard(lock());
  if (event->capture) {
    if (event->capture->over) return wrong(CAPTURED_EVENT, "a wait for an event of a recording that is over");
    if (stream->capture && stream->capture != event->capture) return CAPTURE_MERGE;
    stream->capture = event->capture;
    stream->after.insert(event->after.begin(), event->after.end());
    return SUCCESS;
  }
  if (stream->capture) {
    stream->capture->invalid = true;
    return wrong(CAPTURE_UNSUPPORTED, "a stream that records waits for an event of one that does not");
  }
  if (event->mark && settings().asynchronous) {
    stream->push([mark = event->mark] {
      mark->wait();
      return SUCCESS;
    });
  }
  return SUCCESS;
}

namespace {
Result recorded(void* handle, std::shared_ptr<Mark>& mark) {
  Event* event;
  Context* context;
  if (Result result = find(handle, event, "event")) return result;
  if (Result result = current(context)) return result;
  Guard guard(lock());
  if (event->capture) return wrong(CAPTURED_EVENT, "the host asks for an event that was recorded into a graph");
  mark = event->mark;
  return SUCCESS;
}
}  // namespace

EXPORT int cuEventSynchronize(void* handle) {
  std::shared_ptr<Mark> mark;
  if (Result result = recorded(handle, mark)) return result;
  if (mark) mark->wait();
  Context* context;
  return current(context);
}

EXPORT int cuEventQuery(void* handle) {
  std::shared_ptr<Mark> mark;
  if (Result result = recorded(handle, mark)) return result;
  return !mark || mark->reached() ? SUCCESS : NOT_READY;
}

EXPORT int cuEventElapsedTime_v2(float* milliseconds, void* first, void* last) {
  std::shared_ptr<Mark> from, to;
  if (Result result = recorded(first, from)) return result;
  if (Result result = recorded(last, to)) return result;
  bool timed = static_cast<Event*>(first)->timed && static_cast<Event*>(last)->timed;
  if (!from || !to || !timed) return wrong(INVALID_HANDLE, "the time between events that have none");
  if (!from->reached() || !to->reached()) return NOT_READY;
  *milliseconds = float(to->milliseconds - from->milliseconds);
  return SUCCESS;
}
EXPORT int cuEventElapsedTime(float* ms, void* first, void* last) { return cuEventElapsedTime_v2(ms, first, last); }

EXPORT int cuStreamBeginCapture_v2(void* handle, int mode) {
  Stream* stream;
  if (Result result = stream_of(handle, stream)) return result;
  Guard guard(lock());
  if (stream == stream->context->legacy.get()) return CAPTURE_UNSUPPORTED;
  if (stream->capture) return wrong(INVALID_VALUE, "a stream that records begins to record");
  auto capture = std::make_shared<Capture>();
  capture->origin = stream;
  capture->thread = std::this_thread::get_id();
  capture->relaxed = mode == 2;
  stream->capture = capture;
  stream->after.clear();
  recordings().push_back(capture);
  return SUCCESS;
}

EXPORT int cuStreamEndCapture(void* handle, void** out) {
  Context* context;
  Stream* stream;
  *out = nullptr;
  if (Result result = find(handle, stream, "stream")) return result;
  Guard guard(lock());
  auto capture = stream->capture;
  if (!capture) return wrong(INVALID_VALUE, "a stream that does not record ends a recording");
  if (capture->origin != stream) return CAPTURE_UNMATCHED;
  if (!capture->relaxed && capture->thread != std::this_thread::get_id()) return CAPTURE_WRONG_THREAD;
  bool whole = joined(*capture);
  capture->over = true;
  auto& all = recordings();
  all.erase(std::remove(all.begin(), all.end(), capture), all.end());
  for (auto* s : std::set<Stream*>(stream->context->streams)) {
    if (s->capture != capture) continue;
    s->capture = nullptr;
    s->after.clear();
  }
  if (Result result = current(context)) return result;
  if (capture->invalid) return CAPTURE_INVALIDATED;
  if (!whole) return wrong(CAPTURE_UNJOINED, "a recording ends with work that its first stream has not waited for");
  *out = born(new Graph{capture->nodes});
  return SUCCESS;
}

EXPORT int cuStreamIsCapturing(void* handle, int* status) {
  Stream* stream;
  if (Result result = stream_of(handle, stream)) return result;
  *status = !stream->capture ? 0 : stream->capture->invalid ? 2 : 1;
  return SUCCESS;
}

EXPORT int cuStreamGetCaptureInfo_v2(void* handle, int* status, uint64_t* id, void** graph, void** nodes, size_t* count) {
  if (int result = cuStreamIsCapturing(handle, status)) return result;
  if (id) *id = 1;
  if (graph) *graph = nullptr;
  if (nodes) *nodes = nullptr;
  if (count) *count = 0;
  return SUCCESS;
}
EXPORT int cuStreamGetCaptureInfo_v3(void* handle, int* status, uint64_t* id, void** graph, void** nodes, void** edges,
                                     size_t* count) {
  if (edges) *edges = nullptr;
  return cuStreamGetCaptureInfo_v2(handle, status, id, graph, nodes, count);
}
EXPORT int cuThreadExchangeStreamCaptureMode(int* mode) {
  static thread_local int held = 0;
  std::swap(*mode, held);
  return SUCCESS;
}

EXPORT int cuGraphInstantiateWithFlags(void** out, void* handle, unsigned long long) {
  Graph* graph;
  if (Result result = find(handle, graph, "graph")) return result;
  *out = born(new std::shared_ptr<Graph>(new Graph(*graph)));
  return SUCCESS;
}
EXPORT int cuGraphInstantiate_v2(void** out, void* graph, void**, char*, size_t) {
  return cuGraphInstantiateWithFlags(out, graph, 0);
}

EXPORT int cuGraphDestroy(void* handle) {
  Graph* graph;
  if (Result result = find(handle, graph, "graph")) return result;
  Guard guard(lock());
  handles().erase(handle);
  delete graph;
  return SUCCESS;
}

EXPORT int cuGraphExecDestroy(void* handle) {
  std::shared_ptr<Graph>* graph;
  if (Result result = find(handle, graph, "graph that can run")) return result;
  Guard guard(lock());
  handles().erase(handle);
  delete graph;
  return SUCCESS;
}

EXPORT int cuGraphUpload(void*, void*) { return SUCCESS; }

EXPORT int cuGraphLaunch(void* handle, void* on) {
  std::shared_ptr<Graph>* graph;
  Stream* stream;
  if (Result result = find(handle, graph, "graph that can run")) return result;
  if (Result result = stream_of(on, stream)) return result;
  return enqueue(stream, [graph = *graph] { return run(*graph); }, kernels_of(**graph));
}

EXPORT int cuGraphGetNodes(void* handle, void** nodes, size_t* count) {
  Graph* graph;
  if (Result result = find(handle, graph, "graph")) return result;
  if (nodes) {
    for (size_t i = 0; i < std::min(*count, graph->nodes.size()); ++i) nodes[i] = &graph->nodes[i];
  }
  *count = graph->nodes.size();
  return SUCCESS;
}

// For the other libraries, see stream.h.
EXPORT int phalanx_emulator_enqueue(void* handle, const std::function<int()>* work, int waits) {
  Stream* stream;
  if (Result result = stream_of(handle, stream)) return result;
  return enqueue(stream, [work = *work] { return Result(work()); }, 0, waits != 0);
}

EXPORT int phalanx_emulator_on_card(const void* p, size_t bytes) {
  return bytes == 0 || on_card(reinterpret_cast<uint64_t>(p), bytes);
}
