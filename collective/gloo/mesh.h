#ifndef EDUBA_COLLECTIVE_GLOO_MESH_H_
#define EDUBA_COLLECTIVE_GLOO_MESH_H_

#include <array>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "absl/types/span.h"
#include "collective/gloo/gloo_communicator.h"
#include "collective/operation.h"
#include "collective/rendezvous.h"

namespace gloo::transport {
class Context;
class Device;
class UnboundBuffer;
}  // namespace gloo::transport

namespace eduba {

// One rank's connections to all the others, and the one primitive that the collectives are made of.
//
// Why a primitive of our own over Gloo's send and receive (docs/adr/0003-collectives.md has the numbers):
// - A Gloo message waits for its receiver to announce the receive. Here two receives per peer are announced
// ahead at all
//   times, so a message goes out at once, and an exchange costs one way through the network, not three.
// - Gloo ends the process when a message is longer than its receive. Here every receive has the frame's full
// size and no
//   message is longer, whatever the ranks call; the header in the frame then says whether they called the
//   same.
// - Gloo's timeouts close sockets one by one inside the waiting call, 10 ms each. Here a watcher thread owns
// the deadline: it
//   wakes the call at once and closes the sockets behind it.
class GlooMesh {
 public:
  // The call that an exchange is part of; the peers must agree.
  struct Call {
    Operation operation = Operation::kBarrier;
    int64_t count = 0;  // In elements.
  };
  // Numbers that go with every frame of a rank, for its peers to read; they need not agree.
  using Notes = std::array<int64_t, 4>;
  // The bytes that `peer` gets; at most capacity().
  using Outgoing = std::function<absl::Span<const std::byte>(int peer)>;
  // Called once for each peer, with the frame's whole payload (capacity() bytes, aligned to 64), of which as
  // many are set as the peer sent; that the calls agree tells how many.
  using Incoming = std::function<void(int peer, const std::byte* payload, const Notes& notes)>;

  static absl::StatusOr<std::unique_ptr<GlooMesh>> Connect(int rank, int size, Rendezvous& rendezvous,
                                                           const GlooOptions& options, absl::Time deadline);
  ~GlooMesh();
  GlooMesh(const GlooMesh&) = delete;
  GlooMesh& operator=(const GlooMesh&) = delete;

  int rank() const { return rank_; }
  int size() const { return size_; }
  int64_t capacity() const { return capacity_; }

  // Sends one frame to every peer and takes one from each. Errors as in Communicator; the first one ends the
  // mesh.
  absl::Status Exchange(const Call& call, const Notes& notes, const Outgoing& outgoing,
                        const Incoming& incoming, absl::Time deadline);

  // From any thread: an Exchange under way returns `status`, unless an earlier failure is being reported
  // already.
  void Fail(const absl::Status& status);

 private:
  struct FreeDeleter {
    void operator()(std::byte* p) const;
  };
  // Three frames (sent, received at even and at odd exchanges), each a wire header and then the payload, and
  // one Gloo buffer over them all. One, because when a connection breaks Gloo tells the buffers whose receive
  // has not begun, but not the one that it is in the middle of sending or receiving: here the next receive,
  // always announced, brings the word to both.
  struct Peer {
    std::unique_ptr<std::byte, FreeDeleter> frames;
    std::unique_ptr<gloo::transport::UnboundBuffer> buffer;
  };

  GlooMesh(int rank, int size);
  absl::Status MakePairs(const GlooOptions& options);
  absl::Status ConnectPairs(Rendezvous& rendezvous, absl::Time deadline);
  void MakeFrames(Peer& peer) const;
  int64_t FrameBytes() const;
  int64_t ReceiveOffset(uint64_t sequence) const;
  void Announce(int peer, uint64_t sequence);
  // Waits for the frame to be sent, or for the next one to be received. False: Fail was called.
  bool WaitSent(int peer);
  bool WaitReceived(int peer);
  absl::Status RunExchange(uint64_t sequence, const Call& call, const Notes& notes, const Outgoing& outgoing,
                           const Incoming& incoming, int& waiting_for);
  absl::Status Begin(absl::Time deadline);
  absl::Status End(const absl::Status& outcome, const std::string& waiting_for, absl::Time deadline);
  void Watch();

  const int rank_;
  const int size_;
  const int64_t capacity_;
  std::shared_ptr<gloo::transport::Device> device_;
  std::shared_ptr<gloo::transport::Context> context_;
  std::vector<Peer> peers_;  // By rank; this rank's own entry is empty.
  uint64_t next_sequence_ =
      0;  // Of the exchange, the same on all ranks; also Gloo's tag, so none is used twice.
  std::string
      announce_error_;  // Not empty: a receive could not be announced, so the next exchange cannot complete.

  std::mutex mutex_;
  std::condition_variable watcher_wakes_;
  absl::Status failure_;                          // Guarded by mutex_. Not OK: the mesh is dead.
  bool busy_ = false;                             // Guarded by mutex_: a call is under way.
  absl::Time deadline_ = absl::InfiniteFuture();  // Guarded by mutex_: of the call under way.
  absl::Time watcher_until_ =
      absl::InfiniteFuture();  // Guarded by mutex_: when the watcher next looks by itself.
  bool stopping_ = false;      // Guarded by mutex_.
  std::thread watcher_;
};

}  // namespace eduba

#endif  // EDUBA_COLLECTIVE_GLOO_MESH_H_
