#include "collective/gloo/mesh.h"

#include <gloo/common/error.h>
#include <gloo/transport/context.h>
#include <gloo/transport/device.h>
#include <gloo/transport/pair.h>
#include <gloo/transport/tcp/device.h>
#include <gloo/transport/unbound_buffer.h>
#include <netdb.h>
#include <signal.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <utility>

#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "base/check.h"
#include "base/status_macros.h"

namespace eduba {
namespace {

constexpr int64_t kAlignment = 64;
// Memory for the frames of one kind (sent, received at even exchanges, received at odd ones), for all peers
// together. With this much, a step's whole payload fits one frame in a small group, and a large group needs
// no more memory.
constexpr int64_t kFrameBudget = int64_t{1} << 20;
// Changes whenever the frame's layout does, so that builds that would misread each other say so.
constexpr uint64_t kFormat = 0xEDBA'0002;
// Gloo's own timeouts close sockets inside the waiting call, so they must never pass. The watcher keeps the
// deadline.
constexpr std::chrono::milliseconds kNever = std::chrono::hours(24 * 365);

struct WireHeader {
  uint64_t format;
  uint64_t sequence;
  int64_t operation;
  int64_t count;
  GlooMesh::Notes notes;
};
static_assert(sizeof(WireHeader) == kAlignment);

// Whether two ranks are in the same call.
bool Agree(const WireHeader& a, const WireHeader& b) {
  return a.format == b.format && a.sequence == b.sequence && a.operation == b.operation && a.count == b.count;
}

int64_t Capacity(int size) {
  const int64_t share = kFrameBudget / std::max(1, size - 1);
  return share / kAlignment * kAlignment;
}

// Gloo writes to connections without MSG_NOSIGNAL, from its thread and from ours, so a connection that a peer
// has closed would end the process. A handler that somebody else has set stays.
void IgnoreBrokenPipes() {
  struct sigaction current = {};
  if (sigaction(SIGPIPE, nullptr, &current) == 0 && current.sa_handler == SIG_DFL) signal(SIGPIPE, SIG_IGN);
}

// Returns the first of the host's addresses that belongs to this machine. This is not left to Gloo, which
// reads an unset pointer when a name has no address.
absl::StatusOr<gloo::transport::tcp::attr> Resolve(const std::string& host) {
  addrinfo hints = {};
  hints.ai_socktype = SOCK_STREAM;
  addrinfo* found = nullptr;
  if (const int error = getaddrinfo(host.c_str(), nullptr, &hints, &found); error != 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("host \"", host, "\" has no address: ", gai_strerror(error)));
  }
  const std::unique_ptr<addrinfo, void (*)(addrinfo*)> list(found, freeaddrinfo);
  for (const addrinfo* it = found; it != nullptr; it = it->ai_next) {
    const int fd = socket(it->ai_family, it->ai_socktype | SOCK_CLOEXEC, it->ai_protocol);
    if (fd == -1) continue;
    const bool ours = bind(fd, it->ai_addr, it->ai_addrlen) == 0;
    close(fd);
    if (!ours) continue;
    gloo::transport::tcp::attr attr(host.c_str());
    attr.ai_family = it->ai_family;
    attr.ai_socktype = it->ai_socktype;
    attr.ai_protocol = it->ai_protocol;
    attr.ai_addrlen = static_cast<int>(it->ai_addrlen);
    std::memcpy(&attr.ai_addr, it->ai_addr, it->ai_addrlen);
    return attr;
  }
  return absl::InvalidArgumentError(absl::StrCat(
      "host \"", host, "\" is no address of this machine; give one that the other ranks can reach"));
}

std::string Key(int rank) { return absl::StrCat("gloo/", rank); }

}  // namespace

void GlooMesh::FreeDeleter::operator()(std::byte* p) const { std::free(p); }

GlooMesh::GlooMesh(int rank, int size) : rank_(rank), size_(size), capacity_(Capacity(size)), peers_(size) {}

absl::StatusOr<std::unique_ptr<GlooMesh>> GlooMesh::Connect(int rank, int size, Rendezvous& rendezvous,
                                                            const GlooOptions& options, absl::Time deadline) {
  auto mesh = std::unique_ptr<GlooMesh>(new GlooMesh(rank, size));
  if (size == 1) return mesh;
  IgnoreBrokenPipes();
  EDUBA_RETURN_IF_ERROR(mesh->MakePairs(options));
  mesh->watcher_ = std::thread(&GlooMesh::Watch, mesh.get());
  EDUBA_RETURN_IF_ERROR(mesh->ConnectPairs(rendezvous, deadline));
  return mesh;
}

GlooMesh::~GlooMesh() {
  {
    MutexLock lock(mutex_);
    stopping_ = true;
  }
  watcher_wakes_.NotifyAll();
  if (watcher_.joinable()) watcher_.join();
  // The buffers need the connections, and the connections need the device with its thread, so they go in this
  // order.
  peers_.clear();
  context_.reset();
  device_.reset();
}

absl::Status GlooMesh::MakePairs(const GlooOptions& options) {
  EDUBA_ASSIGN_OR_RETURN(const gloo::transport::tcp::attr attr, Resolve(options.host));
  try {
    device_ = std::make_shared<gloo::transport::tcp::Device>(attr);
    context_ = device_->createContext(rank_, size_);
    context_->setTimeout(kNever);
    for (int peer = 0; peer < size_; ++peer) {
      if (peer == rank_) continue;
      context_->createPair(peer);
      MakeFrames(peers_[peer]);
    }
  } catch (const std::exception& e) {
    return absl::UnavailableError(absl::StrCat("cannot listen on ", options.host, ": ", e.what()));
  }
  return absl::OkStatus();
}

absl::Status GlooMesh::ConnectPairs(Rendezvous& rendezvous, absl::Time deadline) {
  // One address per peer, in the order of ranks, with this rank left out. It is written in hex, so that any
  // rendezvous store can keep it.
  std::string mine;
  int64_t address_bytes = 0;
  for (int peer = 0; peer < size_; ++peer) {
    if (peer == rank_) continue;
    const std::vector<char> address = context_->getPair(peer)->address().bytes();
    address_bytes = static_cast<int64_t>(address.size());
    mine.append(address.data(), address.size());
  }
  EDUBA_RETURN_IF_ERROR(rendezvous.Set(Key(rank_), absl::BytesToHexString(mine), deadline));

  for (int peer = 0; peer < size_; ++peer) {
    if (peer == rank_) continue;
    EDUBA_ASSIGN_OR_RETURN(const std::string hex, rendezvous.Get(Key(peer), deadline));
    const std::string theirs = absl::HexStringToBytes(hex);
    if (static_cast<int64_t>(theirs.size()) != address_bytes * (size_ - 1)) {
      return absl::FailedPreconditionError(
          absl::StrCat("rank ", peer, " published ", theirs.size(), " bytes of addresses, want ",
                       address_bytes * (size_ - 1), ": run the same build everywhere"));
    }
    const int64_t at = address_bytes * (rank_ > peer ? rank_ - 1 : rank_);
    EDUBA_RETURN_IF_ERROR(Begin(deadline));
    absl::Status connected;
    try {
      context_->getPair(peer)->connect(
          std::vector<char>(theirs.begin() + at, theirs.begin() + at + address_bytes));
      Announce(peer, 0);
      Announce(peer, 1);
    } catch (const std::exception& e) {
      connected = absl::UnavailableError(e.what());
    }
    EDUBA_RETURN_IF_ERROR(End(connected, absl::StrCat("connecting to rank ", peer), deadline));
  }
  return absl::OkStatus();
}

int64_t GlooMesh::FrameBytes() const { return kAlignment + capacity_; }

void GlooMesh::MakeFrames(Peer& peer) const {
  peer.frames.reset(static_cast<std::byte*>(std::aligned_alloc(kAlignment, 3 * FrameBytes())));
  EDUBA_CHECK(peer.frames != nullptr);
  peer.buffer = context_->createUnboundBuffer(peer.frames.get(), 3 * FrameBytes());
}

void GlooMesh::Announce(int peer, uint64_t sequence) {
  peers_[peer].buffer->recv(peer, sequence, ReceiveOffset(sequence), FrameBytes());
}

int64_t GlooMesh::ReceiveOffset(uint64_t sequence) const {
  return (1 + static_cast<int64_t>(sequence % 2)) * FrameBytes();
}

// A peer that leaves right after its last call has sent all that we wait for, but Gloo may look at the broken
// connection before it looks at the finished message. When it is asked a second time, it looks at the message
// first.
bool GlooMesh::WaitSent(int peer) {
  try {
    return peers_[peer].buffer->waitSend(kNever);
  } catch (const gloo::IoException&) {
    return peers_[peer].buffer->waitSend(kNever);
  }
}

bool GlooMesh::WaitReceived(int peer) {
  try {
    return peers_[peer].buffer->waitRecv(kNever);
  } catch (const gloo::IoException&) {
    return peers_[peer].buffer->waitRecv(kNever);
  }
}

absl::Status GlooMesh::Exchange(const Collective& call, const Notes& notes, const Outgoing& outgoing,
                                const Incoming& incoming, absl::Time deadline) {
  EDUBA_RETURN_IF_ERROR(Begin(deadline));
  int waiting_for = -1;
  absl::Status outcome;
  try {
    outcome = RunExchange(next_sequence_++, call, notes, outgoing, incoming, waiting_for);
  } catch (const std::exception& e) {
    outcome = absl::UnavailableError(e.what());
  }
  return End(outcome, absl::StrCat("waiting for rank ", waiting_for), deadline);
}

absl::Status GlooMesh::RunExchange(uint64_t sequence, const Collective& call, const Notes& notes,
                                   const Outgoing& outgoing, const Incoming& incoming, int& waiting_for) {
  if (!announce_error_.empty()) return absl::UnavailableError(announce_error_);
  const WireHeader mine = {.format = kFormat,
                           .sequence = sequence,
                           .operation = static_cast<int64_t>(call.operation),
                           .count = call.count,
                           .notes = notes};

  // 1. Send. Each rank starts with its own neighbour, so that no rank is the first one for all others.
  for (int i = 1; i < size_; ++i) {
    const int peer = waiting_for = (rank_ + i) % size_;
    const absl::Span<const std::byte> payload = outgoing(peer);
    EDUBA_CHECK(static_cast<int64_t>(payload.size()) <= capacity_);
    std::byte* const frame = peers_[peer].frames.get();
    std::memcpy(frame, &mine, sizeof(mine));
    if (!payload.empty()) std::memcpy(frame + kAlignment, payload.data(), payload.size());
    peers_[peer].buffer->send(peer, sequence, 0, kAlignment + payload.size());
  }

  // 2. Receive, in the order in which the peers sent to us.
  absl::Status difference;
  for (int i = 1; i < size_; ++i) {
    const int peer = waiting_for = (rank_ + size_ - i) % size_;
    if (!WaitReceived(peer)) return absl::CancelledError("");  // Fail was called and says why.
    const std::byte* const frame = peers_[peer].frames.get() + ReceiveOffset(sequence);
    WireHeader theirs;
    std::memcpy(&theirs, frame, sizeof(theirs));
    if (!Agree(theirs, mine)) {
      const std::string their_call =
          theirs.format == kFormat ? DescribeCall(static_cast<Operation>(theirs.operation), theirs.count)
                                   : "speaks another version of this transport";
      difference = absl::InternalError(absl::StrCat("the ranks made different calls: rank ", rank_, " ",
                                                    DescribeCall(call.operation, call.count), ", rank ", peer,
                                                    " ", their_call, " (exchange ", sequence, ")"));
      break;
    }
    incoming(peer, frame + kAlignment, theirs.notes);
    // The frame is free again, for the exchange after the next. A peer may have left after its last call, and
    // this exchange need not fail for that.
    try {
      Announce(peer, sequence + 2);
    } catch (const std::exception& e) {
      announce_error_ = absl::StrCat("rank ", peer, " left: ", e.what());
    }
  }

  // 3. Wait until the frames are out: before they are written again, and before a difference lets the caller
  // drop the connections.
  for (int peer = 0; peer < size_; ++peer) {
    if (peer == rank_) continue;
    try {
      if (!WaitSent(peer)) return absl::CancelledError("");
    } catch (const gloo::IoException&) {
      if (difference.ok()) throw;  // That peer found the difference first.
    }
  }
  return difference;
}

absl::Status GlooMesh::Begin(absl::Time deadline) {
  MutexLock lock(mutex_);
  EDUBA_CHECK(!busy_);  // One call at a time.
  if (!failure_.ok()) return failure_;
  busy_ = true;
  deadline_ = deadline;
  if (deadline < watcher_until_) watcher_wakes_.NotifyAll();
  return absl::OkStatus();
}

absl::Status GlooMesh::End(const absl::Status& outcome, const std::string& waiting_for, absl::Time deadline) {
  MutexLock lock(mutex_);
  busy_ = false;
  if (outcome.ok() && failure_.ok()) return outcome;
  if (failure_.ok()) {
    // A peer with the same deadline may have given up a moment before us and closed its connections.
    const bool late = absl::IsUnavailable(outcome) && absl::Now() >= deadline;
    failure_ = late ? absl::DeadlineExceededError(std::string(outcome.message())) : outcome;
    watcher_wakes_.NotifyAll();
  }
  return absl::IsInternal(failure_) ? failure_ : Annotate(failure_, waiting_for);
}

void GlooMesh::Fail(const absl::Status& status) {
  MutexLock lock(mutex_);
  if (!failure_.ok()) return;
  failure_ = status;
  watcher_wakes_.NotifyAll();
}

// Returns the failure that ends the mesh, or OK when the mesh is destroyed before it fails.
absl::Status GlooMesh::AwaitFailure() {
  MutexLock lock(mutex_);
  while (failure_.ok() && !stopping_) {
    if (busy_ && absl::Now() >= deadline_) {
      failure_ = absl::DeadlineExceededError("the deadline has passed");
      break;
    }
    // Between calls the last deadline stays set, so a stream of calls does not wake this thread each time.
    watcher_until_ = busy_ || deadline_ > absl::Now() ? deadline_ : absl::InfiniteFuture();
    if (watcher_until_ == absl::InfiniteFuture()) {
      watcher_wakes_.Wait(mutex_);
    } else {
      watcher_wakes_.WaitUntil(mutex_, absl::ToChronoTime(watcher_until_));
    }
  }
  return failure_;
}

void GlooMesh::Watch() {
  const absl::Status failure = AwaitFailure();
  if (failure.ok()) return;
  // The ranks made different calls: every peer gets our frame and finds the difference itself. Gloo closes a
  // connection with a reset, which would throw away the frames that are still under way.
  if (absl::IsInternal(failure)) return;
  // This rank's call is woken first, because closing takes Gloo's thread a tick (10 ms) for each connection.
  // The peers learn of the failure when their connection closes.
  for (Peer& peer : peers_) {
    if (peer.buffer == nullptr) continue;  // This rank itself.
    peer.buffer->abortWaitRecv();
    peer.buffer->abortWaitSend();
  }
  for (int peer = 0; peer < size_; ++peer) {
    if (peer != rank_) context_->getPair(peer)->close();
  }
}

}  // namespace eduba
