// How the ranks of the stand-in NCCL meet and move bytes: TCP on the loopback, a connection for each pair.
#include <arpa/inet.h>
#include <fcntl.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cerrno>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <map>
#include <random>

#include "nccl.h"

namespace nccl {

namespace {
constexpr char MAGIC[8] = {'p', 'h', 'a', 'l', 'n', 'c', 'c', 'l'};
constexpr int PATIENCE = 300, TICK = 100;  // seconds until all must have met; milliseconds between looks at `aborted`

struct Address {
  char magic[8];
  uint64_t nonce;
  uint16_t port;
};
// What a rank tells the place where all meet, and what it says to each peer.
struct Hello {
  uint64_t nonce;
  int32_t rank, size;
  uint32_t card;
  uint16_t port;
};

sockaddr_in loopback(uint16_t port) {
  sockaddr_in to{};
  to.sin_family = AF_INET;
  to.sin_port = htons(port);
  to.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  return to;
}

int listener(uint16_t& port) {
  int s = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
  sockaddr_in at = loopback(0);
  socklen_t size = sizeof at;
  if (s < 0 || bind(s, reinterpret_cast<sockaddr*>(&at), size) || listen(s, 1024) ||
      getsockname(s, reinterpret_cast<sockaddr*>(&at), &size)) {
    close(s);
    return -1;
  }
  port = ntohs(at.sin_port);
  return s;
}

int connected(uint16_t port) {
  int s = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0), yes = 1;
  sockaddr_in to = loopback(port);
  if (s < 0 || connect(s, reinterpret_cast<sockaddr*>(&to), sizeof to)) {
    close(s);
    return -1;
  }
  setsockopt(s, IPPROTO_TCP, TCP_NODELAY, &yes, sizeof yes);
  return s;
}

int accepted(int from, const Comm* comm) {
  for (int waited = 0; waited < PATIENCE * 1000; waited += TICK) {
    if (comm && comm->aborted) break;
    pollfd p{from, POLLIN, 0};
    if (poll(&p, 1, TICK) != 1) continue;
    int s = accept4(from, nullptr, nullptr, SOCK_CLOEXEC), yes = 1;
    if (s >= 0) setsockopt(s, IPPROTO_TCP, TCP_NODELAY, &yes, sizeof yes);
    return s;
  }
  return -1;
}

struct Meeting {
  std::vector<int> sockets;
  std::vector<Hello> hellos;
  ~Meeting() {
    for (int s : sockets) {
      if (s >= 0) close(s);
    }
  }
};

// Hears all ranks, and tells each where the others listen, or what is wrong with them.
void host(int listens, uint64_t nonce) {
  Meeting all;
  int32_t status = SUCCESS, first = 0, second = 0;
  for (size_t heard = 0; all.sockets.empty() || heard < all.sockets.size();) {
    int s = accepted(listens, nullptr);
    Hello hello{};
    if (s < 0) break;
    bool sane = transfer(s, &hello, sizeof hello, false, nullptr, PATIENCE) == SUCCESS && hello.nonce == nonce &&
                hello.size > 0 && hello.rank >= 0 && hello.rank < hello.size;
    if (sane && all.sockets.empty()) {
      all.sockets.assign(size_t(hello.size), -1);
      all.hellos.resize(size_t(hello.size));
    }
    if (!sane || size_t(hello.size) != all.sockets.size() || all.sockets[size_t(hello.rank)] >= 0) {
      close(s);  // a stranger, or a rank that is taken
      continue;
    }
    for (size_t other = 0; other < all.hellos.size(); ++other) {
      if (all.sockets[other] < 0 || all.hellos[other].card != hello.card) continue;
      status = INVALID_USAGE;
      first = int32_t(other);
      second = hello.rank;
    }
    all.sockets[size_t(hello.rank)] = s;
    all.hellos[size_t(hello.rank)] = hello;
    ++heard;
  }
  close(listens);
  int32_t verdict[3] = {status, first, second};
  for (int s : all.sockets) {
    if (s < 0) continue;
    transfer(s, verdict, sizeof verdict, true, nullptr, PATIENCE);
    transfer(s, all.hellos.data(), all.hellos.size() * sizeof(Hello), true, nullptr, PATIENCE);
  }
}
}  // namespace

Comm::~Comm() {
  if (beginning.joinable()) beginning.join();
  for (int s : sockets) {
    if (s >= 0) close(s);
  }
}

Result transfer(int socket, void* at, size_t bytes, bool sending, const Comm* comm, int seconds) {
  auto end = std::chrono::steady_clock::now() + std::chrono::seconds(seconds);
  for (size_t done = 0; done < bytes;) {
    if (comm && comm->aborted) return fail(INTERNAL_ERROR, "the communicator was aborted");
    if (std::chrono::steady_clock::now() > end) return fail(SYSTEM_ERROR, "the other ranks do not come");
    pollfd p{socket, short(sending ? POLLOUT : POLLIN), 0};
    if (poll(&p, 1, TICK) != 1) continue;
    auto* from = static_cast<char*>(at) + done;
    ssize_t n = sending ? send(socket, from, bytes - done, MSG_NOSIGNAL | MSG_DONTWAIT)
                        : recv(socket, from, bytes - done, MSG_DONTWAIT);
    if (n < 0 && (errno == EAGAIN || errno == EINTR)) continue;
    if (n <= 0) return fail(REMOTE_ERROR, "a rank has left");
    done += size_t(n);
  }
  return SUCCESS;
}

UniqueId make_id() {
  UniqueId id{};
  Address address{};
  std::random_device random;
  std::memcpy(address.magic, MAGIC, sizeof MAGIC);
  address.nonce = uint64_t(random()) << 32 | random();
  int listens = listener(address.port);
  if (listens >= 0) std::thread(host, listens, address.nonce).detach();
  std::memcpy(id.bytes, &address, sizeof address);
  return id;
}

Result meet(Comm& comm, const UniqueId& id) {
  Address address;
  std::memcpy(&address, id.bytes, sizeof address);
  if (std::memcmp(address.magic, MAGIC, sizeof MAGIC) != 0) return fail(INVALID_ARGUMENT, "an id that is none");
  Meeting mine;
  Hello hello{address.nonce, comm.rank, comm.size, comm.card, 0};
  int listens = listener(hello.port), middle = connected(address.port);
  mine.sockets = {listens, middle};
  if (listens < 0 || middle < 0) return fail(SYSTEM_ERROR, "nobody listens where the ranks meet");
  int32_t verdict[3];
  std::vector<Hello> others(size_t(comm.size));
  if (Result r = transfer(middle, &hello, sizeof hello, true, &comm, PATIENCE)) return r;
  if (Result r = transfer(middle, verdict, sizeof verdict, false, &comm, PATIENCE)) return r;
  if (Result r = transfer(middle, others.data(), others.size() * sizeof(Hello), false, &comm, PATIENCE)) return r;
  if (verdict[0] != SUCCESS) {
    return fail(Result(verdict[0]), "Duplicate GPU detected : rank " + std::to_string(verdict[1]) + " and rank " +
                                        std::to_string(verdict[2]) + " are on the same card");
  }
  comm.sockets.assign(size_t(comm.size), -1);
  for (int peer = 0; peer < comm.rank; ++peer) {
    int s = connected(others[size_t(peer)].port);
    if (s < 0) return fail(REMOTE_ERROR, "a rank has left");
    comm.sockets[size_t(peer)] = s;
    if (Result r = transfer(s, &hello, sizeof hello, true, &comm, PATIENCE)) return r;
  }
  for (int waiting = comm.size - 1 - comm.rank; waiting > 0;) {
    int s = accepted(listens, &comm);
    if (s < 0) return fail(SYSTEM_ERROR, "a rank does not come");
    Hello from;
    Result r = transfer(s, &from, sizeof from, false, &comm, PATIENCE);
    if (r || from.nonce != address.nonce || from.rank <= comm.rank || from.rank >= comm.size) {
      close(s);
      continue;
    }
    comm.sockets[size_t(from.rank)] = s;
    --waiting;
  }
  return SUCCESS;
}

namespace {
// Spans of one connection and direction, first come first served: a header, then its bytes.
struct Lane {
  std::vector<Transfer*> todo;
  size_t next = 0, done = 0;
  Header heard;
  bool over() const { return next == todo.size(); }
};

// Whether a rank that has left is waited for.
bool hangs() {
  static const char* fault = std::getenv("PHALANX_EMULATED_FAULT");
  return fault && !std::strcmp(fault, "nccl-hang");
}

// Moves what can be moved without waiting.
Result advance(Lane& lane, int socket, bool sending) {
  while (!lane.over()) {
    Transfer& t = *lane.todo[lane.next];
    bool in_header = lane.done < sizeof(Header);
    Header& header = sending ? t.header : lane.heard;
    char* at = in_header ? reinterpret_cast<char*>(&header) + lane.done : t.at + (lane.done - sizeof(Header));
    size_t bytes = in_header ? sizeof(Header) - lane.done : sizeof(Header) + t.header.bytes - lane.done;
    if (bytes > 0) {
      ssize_t n = sending ? send(socket, at, bytes, MSG_NOSIGNAL | MSG_DONTWAIT) : recv(socket, at, bytes, MSG_DONTWAIT);
      if (n < 0 && (errno == EAGAIN || errno == EINTR)) return SUCCESS;
      if (n <= 0 && hangs()) {
        poll(nullptr, 0, TICK);
        return SUCCESS;
      }
      if (n <= 0) return fail(REMOTE_ERROR, "rank " + std::to_string(t.peer) + " has left");
      lane.done += size_t(n);
    }
    if (lane.done == sizeof(Header) && !sending && std::memcmp(&lane.heard, &t.header, sizeof(Header)) != 0) {
      auto say = [](const Header& h) {
        return "operation " + std::to_string(h.what) + " of " + std::to_string(h.bytes) + " bytes of type " + std::to_string(h.type);
      };
      return fail(INVALID_USAGE, "rank " + std::to_string(t.peer) + " does " + say(lane.heard) + ", expected " + say(t.header));
    }
    if (lane.done == sizeof(Header) + t.header.bytes) {
      ++lane.next;
      lane.done = 0;
    }
  }
  return SUCCESS;
}
}  // namespace

Result exchange(std::vector<Transfer>& transfers) {
  struct Wire {
    Comm* comm;
    Lane in, out;
  };
  std::map<int, Wire> wires;  // by socket
  for (auto& t : transfers) {
    auto& wire = wires[t.comm->sockets[size_t(t.peer)]];
    wire.comm = t.comm;
    (t.sending ? wire.out : wire.in).todo.push_back(&t);
  }
  for (;;) {
    std::vector<pollfd> waits;
    for (auto& [socket, wire] : wires) {
      if (wire.comm->aborted) return fail(INTERNAL_ERROR, "the communicator was aborted");
      short events = short((wire.in.over() ? 0 : POLLIN) | (wire.out.over() ? 0 : POLLOUT));
      if (events) waits.push_back({socket, events, 0});
    }
    if (waits.empty()) return SUCCESS;
    poll(waits.data(), nfds_t(waits.size()), TICK);
    for (auto& p : waits) {
      auto& wire = wires[p.fd];
      if (p.revents & (POLLOUT | POLLERR | POLLHUP)) {
        if (Result r = advance(wire.out, p.fd, true)) return r;
      }
      if (p.revents & (POLLIN | POLLERR | POLLHUP)) {
        if (Result r = advance(wire.in, p.fd, false)) return r;
      }
    }
  }
}

}  // namespace nccl
