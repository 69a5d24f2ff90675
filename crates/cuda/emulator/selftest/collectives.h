// The stand-in NCCL: ranks as threads with a card each, and as processes.
#pragma once
#include <atomic>
#include <chrono>

struct UniqueId {
  char bytes[128];
};
template <class... A> int nc(const char* name, A... a) { return call("libnccl.so.2", name, a...); }
enum { U8 = 1, F32 = 7, F64 = 8, BF16 = 9 };

struct Rank {
  int rank = 0, size = 0;
  void *comm = nullptr, *on = nullptr, *on_too = nullptr;
};

static int join(Rank& r, const UniqueId& id, int card) {
  void* context;
  OK(cu("cuInit", 0u));
  OK(cu("cuDevicePrimaryCtxRetain", &context, card));
  OK(cu("cuCtxSetCurrent", context));
  r.on = stream();
  r.on_too = stream();
  return nc("ncclCommInitRank", &r.comm, r.size, id, r.rank);
}

static void ranks(int size, const std::function<void(Rank&)>& run) {
  UniqueId id;
  OK(nc("ncclGetUniqueId", &id));
  std::vector<std::thread> threads;
  for (int rank = 0; rank < size; ++rank) {
    threads.emplace_back([&, rank] {
      Rank r{rank, size};
      OK(join(r, id, rank));
      run(r);
      if (r.comm) OK(nc("ncclCommDestroy", r.comm));
    });
  }
  for (auto& t : threads) t.join();
}

static void wait(const Rank& r) {
  OK(cu("cuStreamSynchronize", r.on));
  OK(cu("cuStreamSynchronize", r.on_too));
}

static void collect(Rank& r) {
  constexpr size_t N = 300000;
  size_t size = size_t(r.size), rank = size_t(r.rank);
  Address x = memory(4 * N * size), y = memory(4 * N * size);
  std::vector<float> mine(N * size);
  auto value = [](size_t i, size_t of) { return float(i % 1000) + 0.25f * float(of); };
  for (size_t i = 0; i < mine.size(); ++i) mine[i] = value(i, rank);
  auto sum = [&](size_t i) {
    float s = value(i, 0);
    for (size_t k = 1; k < size; ++k) s += value(i, k);
    return s;
  };
  put(x, mine);
  OK(nc("ncclAllReduce", x, y, N, F32, 0, r.comm, r.on));
  wait(r);
  auto got = read(y, N);
  for (size_t i = 0; i < N; ++i) EXPECT(got[i] == sum(i));
  OK(nc("ncclReduceScatter", x, y, N, F32, 0, r.comm, r.on));
  wait(r);
  got = read(y, N);
  for (size_t i = 0; i < N; ++i) EXPECT(got[i] == sum(rank * N + i));
  // In place.
  OK(nc("ncclAllGather", x + 4 * N * rank, x, N, F32, r.comm, r.on));
  wait(r);
  got = read(x, N * size);
  for (size_t i = 0; i < N * size; ++i) EXPECT(got[i] == value(i, i / N));
  put(x, mine);
  OK(nc("ncclBroadcast", x, y, N, F32, r.size - 1, r.comm, r.on));
  wait(r);
  got = read(y, N);
  for (size_t i = 0; i < N; ++i) EXPECT(got[i] == value(i, size - 1));
  OK(nc("ncclAllReduce", x, y, N, BF16, 2, r.comm, r.on));
  OK(nc("ncclAllReduce", x, y, N / 2, F64, 0, r.comm, r.on));
  OK(nc("ncclAllReduce", x, y, N, U8, 0, r.comm, r.on));
  wait(r);
  // Each to the next, megabytes at once, and some to oneself.
  int next = (r.rank + 1) % r.size, last = (r.rank + r.size - 1) % r.size;
  OK(nc("ncclGroupStart"));
  OK(nc("ncclSend", x, N, F32, next, r.comm, r.on));
  OK(nc("ncclRecv", y, N, F32, last, r.comm, r.on));
  OK(nc("ncclSend", x, size_t(1), F32, r.rank, r.comm, r.on));
  OK(nc("ncclRecv", y + 4 * N, size_t(1), F32, r.rank, r.comm, r.on));
  OK(nc("ncclGroupEnd"));
  wait(r);
  got = read(y, N + 1);
  for (size_t i = 0; i < N; ++i) EXPECT(got[i] == value(i, size_t(last)));
  EXPECT(got[N] == value(0, rank));
  // Recorded, and run twice.
  void *graph, *ready;
  OK(cu("cuStreamBeginCapture_v2", r.on, 1));
  OK(nc("ncclAllReduce", x, x, size_t(4), F32, 0, r.comm, r.on));
  OK(cu("cuStreamEndCapture", r.on, &graph));
  OK(cu("cuGraphInstantiateWithFlags", &ready, graph, 0ull));
  for (int i = 0; i < 2; ++i) OK(cu("cuGraphLaunch", ready, r.on));
  wait(r);
  EXPECT(read(x, 1)[0] == sum(0) * float(size));
  EXPECT(nc("ncclAllReduce", x, y, N * size + 1, F32, 0, r.comm, r.on) == 4);
}
static void collects() { ranks(3, collect); }

// What a rank waits for comes only after what it offers later, on another stream.
static void overlaps() {
  ranks(2, [](Rank& r) {
    constexpr size_t N = 1 << 20;
    Address x = memory(4 * N), y = memory(4 * N);
    put(x, std::vector<float>(N, float(r.rank)));
    void* back;  // a communicator for the way back
    static UniqueId id;
    static std::atomic<bool> ready{false};
    if (r.rank == 0) {
      OK(nc("ncclGetUniqueId", &id));
      ready = true;
    }
    while (!ready) std::this_thread::yield();
    OK(nc("ncclCommInitRank", &back, 2, id, r.rank));
    if (r.rank == 0) {
      OK(nc("ncclRecv", y, N, F32, 1, back, r.on_too));
      OK(times(r.on, x, N, 3));
      OK(nc("ncclSend", x, N, F32, 1, r.comm, r.on));
    } else {
      OK(nc("ncclRecv", y, N, F32, 0, r.comm, r.on));
      OK(nc("ncclSend", x, N, F32, 0, back, r.on));
    }
    wait(r);
    EXPECT(read(y, N)[N - 1] == (r.rank == 0 ? 1 : 0));
    OK(nc("ncclCommDestroy", back));
  });
}

static void finds_mismatches() {
  ranks(2, [](Rank& r) {
    Address x = memory(1024);
    int error;
    EXPECT(nc("ncclAllReduce", x, x, size_t(8 + r.rank), F32, 0, r.comm, r.on) != 0);
    OK(nc("ncclCommGetAsyncError", r.comm, &error));
    EXPECT(error != 0);
    EXPECT(nc("ncclAllReduce", x, x, size_t(8), F32, 0, r.comm, r.on) != 0);
  });
}

static void aborts() {
  ranks(2, [](Rank& r) {
    Address x = memory(1024);
    if (r.rank == 1) {
      std::this_thread::sleep_for(std::chrono::milliseconds(300));
      OK(nc("ncclCommAbort", r.comm));
      r.comm = nullptr;
      return;
    }
    EXPECT(nc("ncclAllReduce", x, x, size_t(8), F32, 0, r.comm, r.on) == 6);
  });
  ranks(2, [](Rank& r) {
    Address x = memory(1024);
    std::thread other([&] {
      std::this_thread::sleep_for(std::chrono::milliseconds(300));
      if (r.rank == 0) OK(nc("ncclCommAbort", r.comm));
    });
    // Both wait for what nobody sends.
    EXPECT(nc("ncclRecv", x, size_t(8), F32, 1 - r.rank, r.comm, r.on) != 0);
    other.join();
    if (r.rank == 0) r.comm = nullptr;
  });
}

static void shares_no_card() {
  UniqueId id;
  OK(nc("ncclGetUniqueId", &id));
  std::vector<std::thread> threads;
  for (int rank = 0; rank < 2; ++rank) {
    threads.emplace_back([&, rank] {
      Rank r{rank, 2};
      EXPECT(join(r, id, 0) == 5);
    });
  }
  for (auto& t : threads) t.join();
}

// Processes with a card each; one dies, and the others say so.
static void crosses_processes() {
  UniqueId id;
  OK(nc("ncclGetUniqueId", &id));
  std::vector<pid_t> children;
  for (int rank = 0; rank < 3; ++rank) {
    children.push_back(fork());
    if (children.back() != 0) continue;
    setenv("CUDA_VISIBLE_DEVICES", std::to_string(rank).c_str(), 1);
    Rank r{rank, 3};
    OK(join(r, id, 0));
    collect(r);
    if (rank == 2) std::_Exit(0);
    Address x = memory(64);
    EXPECT(nc("ncclAllReduce", x, x, size_t(8), F32, 0, r.comm, r.on) == 6);
    std::_Exit(0);
  }
  for (pid_t child : children) {
    int status;
    waitpid(child, &status, 0);
    EXPECT(status == 0);
  }
}

// A configuration that does not block: ready when the others have come.
static void begins_later() {
  UniqueId id;
  OK(nc("ncclGetUniqueId", &id));
  struct { size_t size; unsigned magic, version; int blocking; char rest[80]; } config = {sizeof config, 0xcafebeef, 22800, 0, {}};
  auto run = [&](int rank) {
    void *context, *comm;
    OK(cu("cuInit", 0u));
    OK(cu("cuDevicePrimaryCtxRetain", &context, rank));
    OK(cu("cuCtxSetCurrent", context));
    EXPECT(nc("ncclCommInitRankConfig", &comm, 2, id, rank, (void*)&config) == 7);
    int error = 7;
    while (error == 7) OK(nc("ncclCommGetAsyncError", comm, &error));
    EXPECT(error == 0);
    OK(nc("ncclCommDestroy", comm));
  };
  std::thread late([&] {
    std::this_thread::sleep_for(std::chrono::milliseconds(200));
    run(1);
  });
  run(0);
  late.join();
}

#define COLLECTIVES                                                                                        \
  {"collects", collects, {"PHALANX_EMULATED_GPUS=3"}},                                                     \
      {"collects_async", collects, {"PHALANX_EMULATED_GPUS=3", "PHALANX_EMULATED_STREAMS=async"}},         \
      {"overlaps", overlaps, {"PHALANX_EMULATED_GPUS=2", "PHALANX_EMULATED_STREAMS=async"}},               \
      {"finds_mismatches", finds_mismatches, {"PHALANX_EMULATED_GPUS=2"}},                                 \
      {"aborts", aborts, {"PHALANX_EMULATED_GPUS=2"}}, {"shares_no_card", shares_no_card, {}},             \
      {"crosses_processes", crosses_processes, {"PHALANX_EMULATED_GPUS=3"}},                               \
      {"begins_later", begins_later, {"PHALANX_EMULATED_GPUS=2"}},
